"""Run schedules on virtual devices, and compare with the model that is not cut: a process of its own, see `conftest`.

`python executed.py 'zb_h1(4, 8)' …` prints, for each schedule, the largest relative error of loss and gradients, and
the slots that were used.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp

from anabranch.schedule import base, controllable_memory, execute, two_stage_backprop, zero_bubble

WIDTH, LETTERS, LENGTH = 16, 11, 6


def norm(x, gain):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def stage(w, x):
    """A block of a transformer."""
    q, k, v = jnp.split(norm(x, w["gain"]) @ w["qkv"], 3, -1)
    scores = jnp.where(jnp.tri(LENGTH) > 0, q @ k.swapaxes(-1, -2) / WIDTH**0.5, -1e9)
    x = x + jax.nn.softmax(scores, -1) @ v @ w["o"]
    return x + jax.nn.silu(norm(x, w["gain2"]) @ w["up"] + w["bias"]) @ w["down"]


def blocks(key, stages):
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "o": (WIDTH, WIDTH), "up": (WIDTH, 32), "down": (32, WIDTH), "bias": (32,)}
    keys = jax.random.split(key, len(shapes))
    drawn = {n: 0.3 * jax.random.normal(k, (stages, *s)) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return drawn | {"gain": jnp.ones((stages, WIDTH)), "gain2": jnp.ones((stages, WIDTH))}


def last(outer, x, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(x @ outer["head"]), targets[..., None], -1).mean()


MODEL = execute.Model(lambda outer, ids: outer["embedding"][ids], stage, last)


def compare(schedule):
    """Errors and slots of one schedule."""
    keys = jax.random.split(jax.random.PRNGKey(0), 5)
    weights, m = blocks(keys[0], schedule.stages), schedule.micros
    outer = {
        "embedding": jax.random.normal(keys[1], (LETTERS, WIDTH)),
        "head": jax.random.normal(keys[2], (WIDTH, LETTERS)),
    }
    ids, targets = (jax.random.randint(key, (m, 2, LENGTH), 0, LETTERS) for key in keys[3:])
    ran = execute.execute(schedule.plan(), MODEL, weights, outer, ids, targets)
    loss, grads = jax.jit(jax.value_and_grad(MODEL.loss, (0, 1)))(weights, outer, ids, targets)
    pairs = zip(jax.tree.leaves((ran.loss, ran.grads)), jax.tree.leaves((loss, grads)), strict=True)
    worst = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    return {"error": worst, "slots": ran.slots, "ticks": ran.ticks}


if __name__ == "__main__":
    known = {}
    for module in (base, two_stage_backprop, zero_bubble, controllable_memory):
        known |= vars(module)
    print(json.dumps({said: compare(eval(said, known)) for said in sys.argv[1:]}))
