"""semi-PD: Efficient LLM Serving via Phase-Wise Disaggregated Computation and Unified Storage. arXiv 2504.19867, 2025.

Prefill and decode run as two workers that do not wait for each other, on shares (x, y) of one device: no decode stands
behind a prompt, and as both use one copy of the weights and one cache, nothing is handed over and no memory is split.
The shares follow the goals for the time to the first token (TTFT) and for each further one (TPOT): every so many
iterations a model of both is fitted to what was seen, and the phase that misses its goal gets as much more as the model
says it needs.

    >>> x = jnp.array([0.4, 0.5, 0.6, 0.7])
    >>> seen = jnp.stack([0.06 / (x - 0.3) + 0.1, 0.008 / (1 - x) + 0.004], 1)  # what a queue and a device would give
    >>> events = Event(jnp.stack([x, 1 - x], 1), Maybe(seen, jnp.ones(4, bool)), jnp.ones(4))
    >>> model = LatencyModel()
    >>> state, _ = model.advance(model.init(), events)
    >>> [round(float(v), 3) for v in model.predict(state, jnp.array([0.8, 0.2]))]
    [0.22, 0.044]

Shares are of the device's units, in percent, each at most 100; together they may be more, and the workers then compete
(`side_by_side` in `cluster.py`). A new share holds from a worker's next iteration on, for each worker by itself: the
next process is made ready in the background and takes over when the old one has finished.

The stream of `LatencyModel` is one observation a window; its state is the last eight of each phase and the five
parameters. `SemiPD` reads its `View` and how long iterations took, and nothing else, so that it decides for time slices
of a live engine as well (`TimeSlices`). The authors' code has neither the model nor the adjustment: it runs
at 80 and 100 percent. From it are the blocks that one place gives out to both workers and what happens when they run
out: the decodes that came last go back to the queue of the prompts. From the paper are the model and Algorithm 1. Its
constants, how the model is fitted, and the age of the oldest request without a token as one more TTFT, without which an
overloaded window looks good, are choices made here.
"""

import threading
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int64

from anabranch.cell import Event, Learner, Maybe
from anabranch.schedule.baselines import admit, batch, running
from anabranch.schedule.scheduler import Batch, Scheduler, View

KEPT = 8
"""Observations of each phase."""
FADE = 0.8
"""What an observation counts, for each that came after it."""
GRID = 32
"""Values of λ that are tried."""
NEAR = 0.01
"""How near a share may come to λ, where the model would explode."""


class Latencies(NamedTuple):
    """What a `LatencyModel` knows."""

    prefill: Float[Array, "8 3"]
    """Share, seconds and weight of each observation, the latest first; the weight is 0 where there is none."""
    decode: Float[Array, "8 3"]
    params: Float[Array, " 5"]
    """a1, b1, λ, a2, b2."""


def line(z: Float[Array, " n"], y: Float[Array, " n"], weight: Float[Array, " n"]) -> Float[Array, " 3"]:
    """The rising line a z + b by weighted least squares, and its squared error; the mean where no line rises."""
    total = jnp.maximum(weight.sum(), 1e-12)
    z0, y0 = (weight @ z) / total, (weight @ y) / total
    var, cov = weight @ (z - z0) ** 2, weight @ ((z - z0) * (y - y0))
    apart = var > 1e-6 * total * z0**2  # else it is one share, but for rounding
    a = jnp.where(apart, jnp.maximum(cov / jnp.where(apart, var, 1.0), 0.0), 0.0)
    b = y0 - a * z0
    return jnp.stack([a, b, weight @ (y - a * z - b) ** 2])


def fit_prefill(seen: Float[Array, "n 3"]) -> Float[Array, " 3"]:
    """a, b, λ of TTFT = a / (x - λ) + b, the queue M/M/1 at a share x; of the λ that fit as well, the smallest."""
    share, seconds, weight = seen.T
    least = jnp.where(weight > 0, share, jnp.inf).min()
    tried = jnp.where(jnp.isfinite(least), least, 1.0) * jnp.arange(GRID) / GRID
    z = 1 / jnp.maximum(share - tried[:, None], NEAR)
    a, b, error = jax.vmap(line, (0, None, None))(z, seconds, weight).T
    mean = (weight @ seconds) / jnp.maximum(weight.sum(), 1e-12)
    best = jnp.argmax(error <= error.min() + 1e-5 * (weight @ (seconds - mean) ** 2))
    return jnp.stack([a[best], b[best], tried[best]])


def fit_decode(seen: Float[Array, "n 3"]) -> Float[Array, " 2"]:
    """a, b of TPOT = a / y + b."""
    share, seconds, weight = seen.T
    return line(1 / jnp.maximum(share, NEAR), seconds, weight)[:2]


class LatencyModel(Learner):
    """TTFT and TPOT, in seconds, by the shares of prefill and decode that add up to 1.

    Stream: shares (x, y) f32[2], targets (TTFT, TPOT) f32[2], NaN where a phase was not seen. State: `Latencies`.
    """

    smooth = False

    def init(self, *, key=None) -> Latencies:
        none = jnp.zeros((KEPT, 3))
        return Latencies(none, none, jnp.zeros(5))

    def predict(self, state: Latencies, x: Float[Array, " 2"]) -> Float[Array, " 2"]:
        """Never below 0; as near to λ as `NEAR`, it is the most that the model says."""
        a1, b1, queue, a2, b2 = state.params
        ttft = a1 / jnp.maximum(x[0] - queue, NEAR) + b1
        return jnp.maximum(jnp.stack([ttft, a2 / jnp.maximum(x[1], NEAR) + b2]), 0.0)

    def learn(self, state: Latencies, x: Float[Array, " 2"], target: Float[Array, " 2"], weight=1.0) -> Latencies:
        def push(seen, share, seconds):
            new = jnp.stack([share, seconds, jnp.asarray(weight, share.dtype)])
            moved = jnp.roll(seen, 1, 0) * jnp.array([1.0, 1.0, FADE])
            return jnp.where(jnp.isfinite(seconds), moved.at[0].set(new), seen)

        prefill, decode = push(state.prefill, x[0], target[0]), push(state.decode, x[1], target[1])
        return Latencies(prefill, decode, jnp.concatenate([fit_prefill(prefill), fit_decode(decode)]))


def example() -> tuple[LatencyModel, Event]:
    """A model, and observations of shares that wander."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.3, 0.7, 24).astype(np.float32)
    target = np.stack([0.05 / (x - 0.2) + 0.1, 0.01 / (1 - x) + 0.005], 1) * rng.uniform(0.9, 1.1, (24, 2))
    known = Maybe(target.astype(np.float32), np.arange(24) % 5 > 0)
    return LatencyModel(), Event(np.stack([x, 1 - x], 1), known, np.ones(24, np.float32))


@eqx.filter_jit
def adjusted(
    model: LatencyModel, state: Latencies, shares: Float[np.ndarray, " 2"], seen: Float[np.ndarray, " 2"],
    goals: Float[np.ndarray, " 2"], step_size: float, max_step: int,
) -> tuple[Latencies, Float[Array, " 2"]]:  # fmt: skip
    """Algorithm 1 of the paper at the end of a window: what is learned, and the shares from here on.

    Arguments:
        shares: of prefill and decode, percent.
        seen: TTFT and TPOT of the window at the percentile of the goals; NaN where there was none.
        step_size: percent.
        max_step: steps at once.
    """
    part = lambda shares: shares / shares.sum()
    x, observed, goal = (jnp.asarray(one, jnp.float32) for one in (shares, seen, goals))
    state = model.learn(state, part(x), observed)
    failed = observed > goal
    # Nothing can be given where both miss their goals, need not be where both hold, and is not where one is not seen.
    one = jnp.argmax(failed)
    moves = (failed.sum() == 1) & jnp.isfinite(observed).all()

    def turn(_, x):
        up = x.at[one].add(step_size)
        down = x.at[1 - one].set(jnp.maximum(x[1 - one] - step_size, jnp.minimum(x[1 - one], step_size)))
        wanted = model.predict(state, part(x))[one] > goal[one]
        return jnp.where(moves & wanted, jnp.where(up[one] > 100, down, up), x)

    return state, jax.lax.fori_loop(0, max_step, turn, x)


class Fixed(NamedTuple):
    """What `FixedShares` knows."""

    shares: tuple[float, float]
    """Of prefill and decode, percent."""


class FixedShares(Scheduler):
    """Whole prompts, first come first, on one worker, all decodes on the other, at shares that stay as they are.

    For engines with two workers. State: `Fixed`.

    Args:
        shares: of the device's units for prefill and decode, percent.
        saturating: tokens from which on a prefill takes time in proportion; prompts are put together up to this.

    Raises:
        ValueError: if a share is not within (0, 100], or `saturating` is not positive; when it acts for an engine with
            one worker.
    """

    shares: tuple[float, float] = eqx.field(static=True, default=(100.0, 100.0))
    saturating: int = eqx.field(static=True, default=512)

    def __check_init__(self):
        if not all(0 < share <= 100 for share in self.shares):
            raise ValueError(f"shares must be above 0 and at most 100 percent, got {self.shares}")
        if self.saturating < 1:
            raise ValueError(f"saturating must be positive, got {self.saturating}")

    def init(self, *, key=None) -> Any:
        return Fixed(self.shares)

    def act(self, state: Any, x: View):  # pyright: ignore[reportIncompatibleMethodOverride]
        prefill, decode = state.shares
        if x.worker == "prefill":
            seats, budget = x.max_seqs - len(x.decoding), min(self.saturating, x.max_tokens)
            found = admit(x, x.prompts, x.free_blocks, budget, seats, whole=True)
            return state, Batch(prefill=found, share=prefill / 100)
        if x.worker != "decode":
            raise ValueError(f"{type(self).__name__} is for engines with two workers, got the worker {x.worker!r}")
        slots, preempted, left = running(x)
        if left < 0:  # the prompt that is under way holds what the only decode needs
            slots = preempted = []
        return state, batch(slots, preempted, {})._replace(share=decode / 100)


class Control(NamedTuple):
    """What `SemiPD` knows."""

    shares: tuple[float, float]
    """Of prefill and decode, percent."""
    iterations: int
    """In this window."""
    seen: Float32[np.ndarray, "2 window"]
    """TTFTs and TPOTs of this window, seconds; NaN where there is none yet."""
    n: Int64[np.ndarray, " 2"]
    """How many there were of each; the last `window` are kept."""
    model: Latencies


class SemiPD(FixedShares):
    """Shares that follow the goals.

    The TTFT of a window is that of the prompts that were done, and the age of the oldest request that is not; its TPOT
    that of the iterations that decoded. State: `Control`.

    Args:
        ttft: goal, seconds.
        tpot: goal, seconds.
        shares: to begin with, percent.
        window: iterations of both workers from one adjustment to the next.
        percentile: of the requests for which the goals are.
        step_size: percent.
        max_step: steps in one adjustment.

    Raises:
        ValueError: if a goal, the window or a step is not positive, or the percentile is not within 0 and 100.
    """

    ttft: float = eqx.field(static=True, default=0.5)
    tpot: float = eqx.field(static=True, default=0.1)
    shares: tuple[float, float] = eqx.field(static=True, default=(60.0, 60.0))
    window: int = eqx.field(static=True, default=50)
    percentile: float = eqx.field(static=True, default=90.0)
    step_size: float = eqx.field(static=True, default=5.0)
    max_step: int = eqx.field(static=True, default=4)
    model: LatencyModel = LatencyModel()

    def __check_init__(self):
        for name in ("ttft", "tpot", "window", "step_size", "max_step"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must be within 0 and 100, got {self.percentile}")

    def init(self, *, key=None) -> Control:
        none = np.full((2, self.window), np.nan, np.float32)
        return Control(self.shares, 0, none, np.zeros(2, np.int64), self.model.init())

    def learn(self, state: Control, x: View, decision: Batch, feedback: float) -> Control:  # pyright: ignore
        now = x.now + feedback
        through = np.array(list(decision.prefill), np.int64)
        first = now - x.arrival[through[x.preempted[through] == 0]]
        phase, found = (0, first) if len(through) else (1, np.array([feedback]))
        seen, n = state.seen.copy(), state.n.copy()
        seen[phase, (n[phase] + np.arange(len(found))) % self.window] = found
        n[phase] += len(found)
        state = Control(state.shares, state.iterations + 1, seen, n, state.model)
        return self._adjust(state, x, now, through) if state.iterations >= self.window else state

    def _adjust(self, state: Control, view: View, now: float, through: np.ndarray) -> Control:
        """The end of a window."""
        waits = (view.id >= 0) & np.isnan(view.first_emit)
        waits[through] = False
        waiting = view.arrival[waits]
        ttft = np.append(state.seen[0], now - waiting.min() if len(waiting) else np.nan)
        both = [one[np.isfinite(one)] for one in (ttft, state.seen[1])]
        seen = np.array([np.percentile(one, self.percentile) if len(one) else np.nan for one in both])
        goals = np.array([self.ttft, self.tpot])
        shares = np.array(state.shares)
        model, shares = adjusted(self.model, state.model, shares, seen, goals, self.step_size, self.max_step)
        x, y = np.asarray(shares).tolist()
        return Control((x, y), 0, np.full_like(state.seen, np.nan), 0 * state.n, model)


class UnifiedBlocks:
    """The blocks of one cache, that workers in threads of their own take and give back.

    To ask how many are free and to take them is one operation; as two, both workers would find the same ones free.

        >>> blocks = UnifiedBlocks(3)
        >>> mine = blocks.take(2)
        >>> blocks.take(2) is None, blocks.free
        (True, 1)
        >>> blocks.give(mine)
        >>> blocks.free
        3

    Raises:
        ValueError: if there is no block.
    """

    def __init__(self, blocks: int):
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        self._lock = threading.Lock()
        self._left = list(range(blocks))
        self._held = [False] * blocks

    @property
    def free(self) -> int:
        """Blocks that nobody has."""
        return len(self._left)

    def take(self, count: int) -> list[int] | None:
        """So many blocks, or none at all if fewer are free.

        Raises:
            ValueError: if `count` is negative.
        """
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        with self._lock:
            if count > len(self._left):
                return None
            cut = len(self._left) - count
            found, self._left = self._left[cut:], self._left[:cut]
            for block in found:
                self._held[block] = True
            return found

    def give(self, blocks: list[int]) -> None:
        """Give blocks back.

        Raises:
            ValueError: if one was not taken; then none is given back.
        """
        with self._lock:
            wrong = [block for block in blocks if not (0 <= block < len(self._held) and self._held[block])]
            if wrong or len(set(blocks)) < len(blocks):
                raise ValueError(f"blocks must each have been taken, got {wrong or blocks}")
            for block in blocks:
                self._held[block] = False
            self._left.extend(blocks)


WORKERS = ("prefill", "decode")


class Sliced(NamedTuple):
    """What `TimeSlices` knows."""

    inner: Any
    """The state of its scheduler."""
    used: tuple[float, float]
    """Seconds of prefill and decode, each over its share; the larger of two that begin together is 0."""


class TimeSlices(Scheduler):
    """A scheduler of two workers where there is but one: its device is theirs in turns, by their shares.

    Whoever has had less of its share is asked next. One that had nothing to do is owed nothing for that. State:
    `Sliced`.
    """

    scheduler: FixedShares = FixedShares()
    steady: ClassVar[bool] = False

    def init(self, *, key=None) -> Sliced:
        return Sliced(self.scheduler.init(), (0.0, 0.0))

    def act(self, state: Sliced, x: View):  # pyright: ignore[reportIncompatibleMethodOverride]
        inner, used = state
        first = int(used[1] < used[0])
        for turn in (first, 1 - first):
            inner, made = self.scheduler.act(inner, x.of(WORKERS[turn]))
            if len(made.decode) or made.prefill:
                break
            used = used[1 - turn], used[1 - turn]  # it has nothing to do: the other goes on from where both are
        return Sliced(inner, used), made

    def learn(self, state: Sliced, x: View, decision: Batch, feedback: float) -> Sliced:  # pyright: ignore
        turn = 0 if decision.prefill else 1
        inner = self.scheduler.learn(state.inner, x.of(WORKERS[turn]), decision, feedback)
        used = list(state.used)
        used[turn] += feedback / state.inner.shares[turn]
        return Sliced(inner, (used[0] - min(used), used[1] - min(used)))
