"""The cell that all servers serve, a GRU(128) with a linear output, and the batched step that the peers have of it."""

from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anabranch.cell import Cell

INPUTS, WIDTH, OUTPUTS = 16, 128, 16
SIZES = tuple(2**i for i in range(3, 11))
"""Compiled sizes of a batch; a smaller one is padded."""


class Gru(Cell):
    """A GRU and a linear output; the state is the hidden vector."""

    gru: eqx.nn.GRUCell
    out: eqx.nn.Linear

    def init(self, *, key=None) -> Float[Array, " 128"]:
        return jnp.zeros(WIDTH)

    def step(self, state: Float[Array, " 128"], x: Float[Array, " 16"]):
        state = self.gru(x, state)
        return state, self.out(state)


def make() -> Gru:
    """The cell, with the same random weights in every process."""
    a, b = jax.random.split(jax.random.PRNGKey(0))
    return Gru(eqx.nn.GRUCell(INPUTS, WIDTH, key=a), eqx.nn.Linear(WIDTH, OUTPUTS, key=b))


class Batched:
    """States of many streams in one array that a jitted step updates in place, a padded batch at a time.

    Arguments:
        capacity: streams there is room for.
    """

    def __init__(self, capacity: int = 65_536):
        cell = make()

        @partial(jax.jit, donate_argnums=0)
        def step(states, slots, xs):
            new, ys = jax.vmap(cell.step)(states[slots], xs)
            return states.at[slots].set(new, mode="drop"), ys

        self._step, self._capacity = step, capacity
        self._slots: dict[str, int] = {}
        self._states = jnp.zeros((capacity, WIDTH))
        for size in SIZES:
            self._go(np.full(size, capacity, np.int32), np.zeros((size, INPUTS), np.float32))

    def _go(self, slots: np.ndarray, xs: np.ndarray) -> np.ndarray:
        self._states, ys = self._step(self._states, slots, xs)
        return np.asarray(ys)

    def __call__(self, streams: Sequence[str], xs: Sequence[bytes]) -> list[bytes]:
        """The output of one event of each of these streams, which are distinct and at most `SIZES[-1]`."""
        n = len(streams)
        size = next(size for size in SIZES if size >= n)
        slots, inputs = np.full(size, self._capacity, np.int32), np.zeros((size, INPUTS), np.float32)
        slots[:n] = [self._slots.setdefault(stream, len(self._slots)) for stream in streams]
        inputs[:n] = np.frombuffer(b"".join(xs), np.float32).reshape(n, INPUTS)
        return [y.tobytes() for y in self._go(slots, inputs)[:n]]
