"""One step of a small transformer by a schedule, on virtual devices, against the model that is not cut.

`python -m anabranch.schedule.proof SEED 'zb_h1(4, 8)' …` prints as JSON, for each schedule, the largest relative error
of loss and gradients, and the slots that were used. `run` does so from another process: the number of virtual devices
is settled before JAX starts.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

import anabranch.schedule
from anabranch.plan import Op
from anabranch.schedule.base import Plan, Schedule
from anabranch.schedule.execute import Model, execute

WIDTH, LETTERS, LENGTH = 16, 11, 6


def norm(x: Float[Array, "... d"], gain: Float[Array, " d"]) -> Float[Array, "... d"]:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain


def stage(w: dict[str, Array], x: Float[Array, "n T d"]) -> Float[Array, "n T d"]:
    """A block of a transformer."""
    q, k, v = jnp.split(norm(x, w["gain"]) @ w["qkv"], 3, -1)
    scores = jnp.where(jnp.tri(LENGTH) > 0, q @ k.swapaxes(-1, -2) / WIDTH**0.5, -1e9)
    x = x + jax.nn.softmax(scores, -1) @ v @ w["o"]
    return x + jax.nn.silu(norm(x, w["gain2"]) @ w["up"] + w["bias"]) @ w["down"]


def blocks(key: PRNGKeyArray, stages: int) -> dict[str, Array]:
    """Weights of so many, stacked."""
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "o": (WIDTH, WIDTH), "up": (WIDTH, 32), "down": (32, WIDTH), "bias": (32,)}
    keys = jax.random.split(key, len(shapes))
    drawn = {n: 0.3 * jax.random.normal(k, (stages, *s)) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return drawn | {"gain": jnp.ones((stages, WIDTH)), "gain2": jnp.ones((stages, WIDTH))}


def last(outer: dict[str, Array], x: Float[Array, "n T d"], targets: Int[Array, "n T"]) -> Float[Array, ""]:
    """The mean loss of the next letters."""
    return -jnp.take_along_axis(jax.nn.log_softmax(x @ outer["head"]), targets[..., None], -1).mean()


MODEL = Model(lambda outer, ids: outer["embedding"][ids], stage, last)


def compare(given: Schedule | Plan, seed: int = 0) -> dict[str, Any]:
    """Errors and slots of one schedule or plan, with weights and texts drawn by a seed."""
    plan = given.plan() if isinstance(given, Schedule) else given
    keys = jax.random.split(jax.random.PRNGKey(seed), 5)
    weights, m = blocks(keys[0], int(plan.stage.max()) + 1), int(plan.micro.max()) + 1
    outer = {
        "embedding": jax.random.normal(keys[1], (LETTERS, WIDTH)),
        "head": jax.random.normal(keys[2], (WIDTH, LETTERS)),
    }
    ids, targets = (jax.random.randint(key, (m, 2, LENGTH), 0, LETTERS) for key in keys[3:])
    group = 2 if (plan.kind == Op.AG).any() else 1
    ran = execute(plan, MODEL, weights, outer, ids, targets, group=group)
    loss, grads = jax.jit(jax.value_and_grad(MODEL.loss, (0, 1)))(weights, outer, ids, targets)
    pairs = zip(jax.tree.leaves((ran.loss, ran.grads)), jax.tree.leaves((loss, grads)), strict=True)
    worst = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    return {"error": worst, "slots": ran.slots, "ticks": ran.ticks}


def run(*schedules: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """What `compare` gives for schedules such as `zb_h1(4, 8)`, by name.

    Raises:
        RuntimeError: if the process fails; the message is what it said.
    """
    env = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "anabranch.schedule.proof", str(seed), *schedules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    known: dict[str, Any] = {}
    for module in pkgutil.iter_modules(anabranch.schedule.__path__, "anabranch.schedule."):
        if module.name != "anabranch.schedule.proof":
            known |= vars(importlib.import_module(module.name))
    print(json.dumps({said: compare(eval(said, known), int(sys.argv[1])) for said in sys.argv[2:]}))
