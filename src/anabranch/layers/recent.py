"""What has been going on lately: decayed means in event time."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from anabranch.cell import Cell, Event, Maybe, Timed  # noqa: F401 (Maybe: in the example)


class RecentState(NamedTuple):
    """Sums and weights for C columns and H half-lives, and the last value of each column and when it came."""

    total: Float[Array, "C H"]
    weight: Float[Array, "C H"]
    last: Float[Array, " C"]
    time: Int[Array, " C"]


class Recent(Cell):
    """Decayed means of some columns, over several half-lives, as of now.

    The columns are the inputs, observed when they come, and after them the targets, observed when they become known. An
    observation loses half of its weight with every half-life of event time; one that is NaN is none. For each column
    the output has, of what was known before this event: the mean over each half-life, pulled towards 0 by one
    observation's weight; the logarithm of 1 + the weight behind each; the last value; and the logarithm of 1 + the
    minutes since it came (at most `memory` of them).

    Arguments:
        features: number of inputs, Ci.
        targets: number of targets, Ct; the output is f32[(Ci + Ct) * (2 H + 2)].
        half_lives: H half-lives, in seconds.
        clip: observations are clipped to this range.
        memory: minutes after which an age no longer grows.

    >>> cell = Recent(features=1, targets=0, half_lives=[60.0])
    >>> event = lambda t, x: Event(Timed(jnp.int32(t), jnp.array([x])), Maybe(jnp.zeros(0), False))
    >>> state, _ = cell.step(cell.init(), event(0, 8.0))
    >>> state, y = cell.step(state, event(60, float("nan")))  # half of the weight is left: 8 / 2 / (1 / 2 + 1)
    >>> round(float(y[0]), 3), float(y[2])
    (2.667, 8.0)

    Raises:
        ValueError: if there is no column or no half-life, or a half-life is not positive.
    """

    features: int = eqx.field(static=True)
    targets: int = eqx.field(static=True)
    half_lives: tuple[float, ...] = eqx.field(static=True)
    clip: tuple[float, float] = eqx.field(static=True)
    memory: float = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        targets: int,
        half_lives: list[float],
        clip: tuple[float, float] = (-1e6, 1e6),
        memory: float = 2880.0,
    ):
        if features < 0 or targets < 0 or features + targets < 1:
            raise ValueError(f"there must be a column, got features = {features}, targets = {targets}")
        if not half_lives or min(half_lives) <= 0:
            raise ValueError(f"half-lives must be positive seconds, got {half_lives}")
        self.features, self.targets, self.half_lives = features, targets, tuple(map(float, half_lives))
        self.clip, self.memory = (float(clip[0]), float(clip[1])), memory

    def init(self, *, key=None):
        c, h = self.features + self.targets, len(self.half_lives)
        return RecentState(jnp.zeros((c, h)), jnp.zeros((c, h)), jnp.zeros(c), jnp.full(c, -1, jnp.int32))

    def step(self, state: RecentState, x: Event) -> tuple[RecentState, Float[Array, " features"]]:
        now = x.x.time
        age = jnp.where(state.time >= 0, now - state.time, 0).astype(jnp.float32)
        fade = jnp.exp2(-age[:, None] / jnp.array(self.half_lives))
        total, weight = state.total * fade, state.weight * fade
        minutes = jnp.where(state.time >= 0, jnp.minimum(age / 60, self.memory), self.memory)
        lately = jnp.concatenate(
            [total / (weight + 1), jnp.log1p(weight), state.last[:, None], jnp.log1p(minutes)[:, None]], axis=1
        )
        told = x.target.valid
        value = jnp.concatenate(
            [jnp.where(told, jnp.nan, x.x.x), jnp.where(told, x.target.value, jnp.nan)[: self.targets]]
        )
        there = jnp.isfinite(value)
        value = jnp.where(there, jnp.clip(value, *self.clip), 0.0)
        seen = there[:, None]
        state = RecentState(
            total=jnp.where(seen, total + value[:, None], state.total),
            weight=jnp.where(seen, weight + 1, state.weight),
            last=jnp.where(there, value, state.last),
            time=jnp.where(there, now, state.time),
        )
        return state, lately.reshape(-1)
