"""The cell that all servers serve, a GRU(128) with a linear output, and the batched step that the peers have of it."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from anabranch.cell import Cell

INPUTS, WIDTH, OUTPUTS = 16, 128, 16
SIZES = tuple(2**i for i in range(3, 11))
"""Compiled sizes of a batch; a smaller one is padded."""


class Gru(Cell):
    """A GRU and a linear output; the state is the hidden vector. The products are written so that a batch has rows."""

    inputs: Float[Array, "16 384"]
    hidden: Float[Array, "128 384"]
    bias: Float[Array, " 384"]
    new_bias: Float[Array, " 128"]
    output: Float[Array, "128 16"]

    def init(self, *, key=None) -> Float[Array, " 128"]:
        return jnp.zeros(WIDTH)

    def step(self, state: Float[Array, " 128"], x: Float[Array, " 16"]):
        r, z, new = jnp.split(x @ self.inputs + self.bias, 3)
        hr, hz, hnew = jnp.split(state @ self.hidden, 3)
        r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
        new = jnp.tanh(new + r * (hnew + self.new_bias))
        state = new + z * (state - new)
        return state, state @ self.output


def make() -> Gru:
    """The cell, with the same random weights in every process."""
    shapes = (INPUTS, 3 * WIDTH), (WIDTH, 3 * WIDTH), (3 * WIDTH,), (WIDTH,), (WIDTH, OUTPUTS)
    keys, bound = jax.random.split(jax.random.PRNGKey(0), len(shapes)), WIDTH**-0.5
    return Gru(*(jax.random.uniform(k, shape, minval=-bound, maxval=bound) for k, shape in zip(keys, shapes)))


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
