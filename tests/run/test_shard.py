"""A sharded cell must answer as the whole one does, with an eighth of the bytes on each of eight devices.

The devices are virtual: XLA makes them when it starts, so the test is run again in a process of its own.
"""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from anabranch import Cell
from anabranch.run.shard import Sharded, shard, shardings

DEVICES, WIDTH, HEADS, PAST, LAYERS = 8, 64, 8, 32, 2


class Block(eqx.Module):
    """Attention over what is remembered, and a layer of hidden units."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    out: jax.Array
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        q, k, v, o, up, down = jax.random.split(key, 6)
        make = lambda key: jax.random.normal(key, (HEADS, WIDTH, WIDTH // HEADS)) / WIDTH**0.5
        self.query, self.key, self.value = make(q), make(k), make(v)
        self.out = jax.random.normal(o, (HEADS, WIDTH // HEADS, WIDTH)) / WIDTH**0.5
        self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, use_bias=False, key=up)
        self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, use_bias=False, key=down)

    def __call__(self, memory, n, x):
        project = lambda w: jnp.einsum("d,hdk->hk", x, w)
        keys = memory["keys"].at[:, n % PAST].set(project(self.key))
        values = memory["values"].at[:, n % PAST].set(project(self.value))
        score = jnp.einsum("hk,hpk->hp", project(self.query), keys)
        weight = jax.nn.softmax(jnp.where(jnp.arange(PAST) <= n, score, -jnp.inf))
        x = x + jnp.einsum("hp,hpk,hkd->d", weight, values, self.out)
        return {"keys": keys, "values": values}, x + self.down(jax.nn.gelu(self.up(x)))


class Transformer(Cell):
    """Two blocks that remember the last inputs."""

    blocks: list[Block]

    def __init__(self):
        self.blocks = [Block(key) for key in jax.random.split(jax.random.PRNGKey(0), LAYERS)]

    def init(self, *, key=None):
        shape = (HEADS, PAST, WIDTH // HEADS)
        memory = {"keys": jnp.zeros(shape), "values": jnp.zeros(shape)}
        return {"n": jnp.zeros((), jnp.int32), "memory": [memory for _ in self.blocks]}

    def step(self, state, x):
        memory = []
        for block, m in zip(self.blocks, state["memory"]):
            m, x = block(m, state["n"], x)
            memory.append(m)
        return {"n": state["n"] + 1, "memory": memory}, x


P = PartitionSpec
RULES = [("memory", P("model")), (".down.weight", P(None, "model")), (".up.weight", P("model")), ("blocks", P("model"))]
here = pytest.mark.skipif(jax.device_count() != DEVICES, reason="runs in the process that has eight devices")


def test_on_eight_devices():
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "pytest", __file__, "-k", "sharded or rows", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def bytes_on(device, tree):
    shards = [s for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for s in leaf.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == device)


def spread_evenly(tree):
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))
    return all(bytes_on(device, tree) <= whole / DEVICES + 16 for device in jax.devices())  # 16: the counter


@here
def test_sharded_steps_equal_those_of_the_whole():
    assert "xla_backend_extra_options" in os.environ["XLA_FLAGS"]  # the package's own flags apply beside ours
    mesh = jax.make_mesh((DEVICES,), ("model",))
    whole, cell = Transformer(), Sharded(Transformer, mesh, RULES)
    xs = jax.random.normal(jax.random.PRNGKey(1), (PAST + 9, WIDTH))
    advance = eqx.filter_jit(lambda cell, state, xs: cell.advance(state, xs))
    expected, ys = advance(whole, whole.init(), xs)
    state, found = advance(cell, cell.init(), xs)
    np.testing.assert_allclose(found, ys, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, expected)
    step = eqx.filter_jit(lambda cell, state, x: cell.step(state, x))
    one = cell.init()
    for x, y in zip(xs, ys):
        one, out = step(cell, one, x)
        np.testing.assert_allclose(out, y, atol=1e-5)
    for tree in (cell, cell.init(), state, one):
        assert spread_evenly(tree)
    assert not spread_evenly(whole)


@here
def test_rows_of_many_streams_are_spread_over_devices():
    cell, mesh = Transformer(), jax.make_mesh((DEVICES,), ("data",))
    xs = jax.random.normal(jax.random.PRNGKey(1), (16, 5, WIDTH))
    states = jax.vmap(lambda _: cell.init())(jnp.arange(16))
    run = eqx.filter_jit(lambda states, xs: jax.vmap(cell.advance)(states, xs))
    expected, ys = run(states, xs)
    rows = [("", P("data"))]
    state, found = run(shard(states, mesh, rows), shard(xs, mesh, rows))
    np.testing.assert_allclose(found, ys, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, expected)
    assert spread_evenly(state) and spread_evenly(found)


@here
def test_sharded_refuses_rules_that_do_not_fit():
    mesh = jax.make_mesh((DEVICES,), ("model",))
    with pytest.raises(ValueError, match=r"'\.wieght' fits no leaf of Transformer"):
        Sharded(Transformer, mesh, [*RULES, (".wieght", P("model"))])
    with pytest.raises(ValueError, match=r"\['h'\] of shape \(12,\) cannot lie as"):
        shardings({"h": jnp.zeros(12)}, mesh, [("h", P("model"))])
    with pytest.raises(ValueError, match=r"\['h'\] .* cannot lie as .*'rows'"):
        shardings({"h": jnp.zeros(16)}, mesh, [("h", P("rows"))])
