"""Andes: Defining and Enhancing Quality-of-Experience in LLM-Based Text Streaming Services. arXiv 2404.16283, 2024.

A reader does not care when tokens are made but when they can be read: nobody gains by text that comes faster than it is
read. `qoe` says how much of what a reader expected to have read, at every moment, there was to read; `TokenPacer` shows
tokens at reading speed, whatever the order in which they were served; and `Andes` serves, when not all can be, those
readers who gain most from it by the room they take, and sends those away for a while who are far ahead.

    >>> slow, early = np.array([3.0, 3.5, 4.0]), np.array([0.1, 0.1, 0.1])
    >>> [round(qoe(times, ttft=1.0, tds=2.0), 3) for times in (slow, early)]
    [0.273, 1.0]
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int, Int64

from anabranch.cell import Cell, Maybe
from anabranch.schedule.cluster import Work
from anabranch.schedule.scheduler import DECODING, RECOMPUTE, SWAP, SWAPPED, WAITING, Batch, Cost, Scheduler, View
from anabranch.schedule.serving import Result


def read_at(emitted: Float64[np.ndarray, " l"], tds: float) -> Float64[np.ndarray, " l"]:
    """When the reading of each token begins: once it is there, and that of the one before has taken its 1 / tds."""
    steps = np.arange(len(emitted)) / tds
    return np.maximum.accumulate(emitted - steps) + steps


def qoe(emitted: Float64[np.ndarray, " l"], ttft: float, tds: float) -> float:
    """How good it was to read a response, from 0 to 1.

    The area under the curve of what was read over that of what was expected, `tds` tokens a second from `ttft` on, both
    to the moment at which all was read. Early and excess tokens change nothing.

    Arguments:
        emitted: when the tokens came, seconds after the request.

    Raises:
        ValueError: if there is no token, `ttft` is negative, or `tds` is not positive.
    """
    if not len(emitted):
        raise ValueError("emitted must hold a token")
    if not (ttft >= 0 and tds > 0):
        raise ValueError(f"ttft must not be negative and tds must be positive, got {ttft} and {tds}")
    read = read_at(np.asarray(emitted, np.float64), tds)
    end = read[-1] + 1 / tds
    # Both curves rise by one over 1 / tds seconds for each token, from when its reading begins or should.
    since = np.maximum(end - ttft - np.arange(len(read)) / tds, 0.0)
    expected = np.where(since * tds < 1, since**2 * tds / 2, since - 0.5 / tds).sum()
    actual = (end - read - 0.5 / tds).sum()
    return float(np.clip(actual / expected, 0.0, 1.0)) if expected > 0 else 1.0


def qoes(result: Result) -> Float64[np.ndarray, " n"]:
    """That of each request; 0 if it got no token."""
    load, ends = result.workload, result.ends
    out = np.zeros(len(load))
    for i in range(len(load)):
        came = result.emitted[ends[i] : ends[i + 1]] - load.arrival[i]
        if np.isfinite(came).all():
            out[i] = qoe(came, load.ttft[i], load.tds[i])
    return out


class Pacer(NamedTuple):
    """Tokens that wait to be shown, and when the next one may be."""

    waiting: Int[Array, ""]
    next: Float[Array, ""]


class TokenPacer(Cell):
    """Shows the tokens of a response at reading speed.

    Stream: (time f32, tokens that have come since i32), one whenever the display is refreshed. Output: `Maybe` how many
    to show now. State: `Pacer`.

        >>> cell = TokenPacer(tds=2.0)
        >>> state, shown = cell.init(), []
        >>> for time, came in ((0.0, 5), (0.4, 0), (0.5, 0), (1.6, 0), (9.0, 0)):
        ...     state, y = cell.step(state, (jnp.float32(time), jnp.int32(came)))
        ...     shown.append(int(y.value))
        >>> shown
        [1, 0, 1, 2, 1]

    Raises:
        ValueError: if `tds` is not positive.
    """

    smooth: ClassVar[bool] = False

    tds: float = eqx.field(static=True, default=4.8)
    """Tokens a second."""

    def __check_init__(self):
        if not self.tds > 0:
            raise ValueError(f"tds must be positive, got {self.tds}")

    def init(self, *, key=None) -> Pacer:
        return Pacer(jnp.int32(0), jnp.float32(-jnp.inf))

    def step(self, state: Pacer, x: tuple[Float[Array, ""], Int[Array, ""]]) -> tuple[Pacer, Maybe[Int[Array, ""]]]:
        time, came = x
        waiting = state.waiting + came
        # Time during which there was nothing to show is lost: the reader has waited.
        due = jnp.where(state.waiting > 0, state.next, jnp.maximum(state.next, time))
        ready = jnp.where(time >= due, 1 + jnp.floor((time - due) * self.tds), 0).astype(jnp.int32)
        shown = jnp.minimum(jnp.maximum(ready, 0), waiting)
        after = jnp.where(shown > 0, due + shown / self.tds, due)
        return Pacer(waiting - shown, after), Maybe(shown, shown > 0)


class Readers(NamedTuple):
    """What is known of the reader in each slot."""

    id: Int64[np.ndarray, " N"]
    tokens: Int64[np.ndarray, " N"]
    """Tokens that have come."""
    last: Float64[np.ndarray, " N"]
    """When the reading of the last of them begins."""
    sum: Float64[np.ndarray, " N"]
    """Of these times over all tokens."""
    moved: int
    """Preemptions so far."""


FULL = 0.9
"""The share of all blocks from which on they count as scarce. Nobody is let in above it, so that those who are served
have room to grow."""


class Andes(Scheduler):
    """Serves those readers who gain most, when memory or time does not suffice for all; else as FCFS.

    State: `Readers`.

    Args:
        cost: what an iteration takes, by which it looks ahead.
        horizon: how far, in seconds.
        preemptions: that a request may suffer on average.
        swap: send caches to host memory; else drop them and make them again.
        link: bytes a second to that memory.

    Raises:
        ValueError: if the horizon is not positive or `preemptions` negative.
    """

    steady: ClassVar[bool] = False

    cost: Cost = eqx.field(static=True)
    horizon: float = eqx.field(static=True, default=20.0)
    preemptions: float = eqx.field(static=True, default=1.0)
    swap: bool = eqx.field(static=True, default=True)
    link: float = eqx.field(static=True, default=25e9)

    def __check_init__(self):
        if not self.horizon > 0:
            raise ValueError(f"horizon must be positive, got {self.horizon}")
        if not self.preemptions >= 0:
            raise ValueError(f"preemptions must not be negative, got {self.preemptions}")

    def init(self, *, key=None) -> Readers:
        none = np.zeros(0, np.int64)
        return Readers(none, none, none.astype(float), none.astype(float), 0)

    def act(self, state: Readers, x: View) -> tuple[Readers, Batch]:  # pyright: ignore
        state = _told(state, x)
        there = np.flatnonzero((x.status >= WAITING) & (x.status <= SWAPPED))
        length = np.where(x.status >= DECODING, x.done + 1, x.prompt + 1)[there]
        need = x.need(length)
        running = there[x.status[there] == DECODING]
        scarce = need.sum() > FULL * x.total_blocks or len(there) > x.max_seqs
        if not scarce and len(running):
            took = self.cost.iteration(Work(decodes=len(running), held=int(x.done[running].sum())))
            scarce = took > 1 / x.tds[there].max()
        if not scarce:
            return state, _serve(self.swap, x, there, there[:0])
        chosen = there[_choose(self, state, x, there, length, need)]
        others = np.setdiff1d(running, chosen)
        # Those who are not served keep their blocks, unless these are needed: then who gains least loses them first.
        lacks = int((x.need(length) - x.blocks[there])[np.isin(there, chosen)].clip(0).sum()) - x.free_blocks
        away = []
        for slot in sorted(others.tolist(), key=lambda slot: -x.done[slot]):
            if lacks <= 0:
                break
            away.append(slot)
            lacks -= int(x.own[slot])
        state = state._replace(moved=state.moved + len(away))
        return state, _serve(self.swap, x, chosen, np.array(away, np.int64))


# Functions and not methods: Equinox binds a method anew whenever it is asked for, which takes longer than these do.


def _told(state: Readers, x: View) -> Readers:
    """Count the tokens that have come since."""
    if len(state.id) != len(x.id):
        n = len(x.id)
        state = Readers(np.full(n, -1), np.zeros(n, np.int64), np.zeros(n), np.zeros(n), state.moved)
    new = state.id != x.id
    tokens, last, total = (np.where(new, 0, column) for column in (state.tokens, state.last, state.sum))
    more = x.generated > tokens
    with np.errstate(invalid="ignore"):
        read = np.where(tokens == 0, x.last_emit, np.maximum(x.last_emit, last + 1 / x.tds))
    return Readers(
        x.id.copy(), np.where(more, x.generated, tokens), np.where(more, read, last),
        np.where(more, total + read, total), state.moved,
    )  # fmt: skip


def _choose(
    andes: Andes, state: Readers, x: View, there: np.ndarray, length: np.ndarray, need: np.ndarray
) -> Bool[np.ndarray, " k"]:
    """Who is served: of several sizes of the batch the one with the largest gain, filled greedily."""
    cost, horizon, room = andes.cost, andes.horizon, x.total_blocks
    most = min(int((np.cumsum(np.sort(need)) <= room).sum()), x.max_seqs)
    contexts = np.sort(length)
    goal, least = 1 / x.tds[there].max(), 1
    taken = lambda size: cost.iteration(Work(decodes=size, held=int(contexts[:size].sum())))
    while least < most and taken(least + 1) <= goal:
        least += max(1, least // 8)
    sticky = x.status[there] == DECODING
    settled = state.moved >= andes.preemptions * (x.id.max() + 1)
    delay = _delay(cost, andes.link, x, there)
    best, found = -1.0, np.zeros(len(there), bool)
    for size in sorted({round(v) for v in np.linspace(min(least, most), most, 4)}):
        gain = _gain(horizon, state, x, there, delay, taken(size))
        order = np.lexsort((x.id[there], -gain / length, ~(sticky & settled)))
        take = _filled(order, need, np.where(sticky, room, FULL * room), size)
        if gain[take].sum() > best:
            best, found = float(gain[take].sum()), take
    return found


def _gain(
    horizon: float, state: Readers, x: View, there: np.ndarray, delay: np.ndarray, took: float
) -> Float64[np.ndarray, " k"]:
    """How much better a response is at the horizon if it is served from now on, every `took` seconds."""
    end, tds = x.now + horizon, x.tds[there]
    tokens, last, total = state.tokens[there], state.last[there], state.sum[there]
    begun, comes = tokens > 0, x.now + took + delay
    # What has come is read by the horizon, but for what lies beyond it.
    over = np.where(begun, np.maximum(last + 1 / tds - end, 0.0), 0.0) * tds
    had = np.where(begun, tokens * (end - 0.5 / tds) - total + over**2 / (2 * tds), 0.0)
    start = np.where(begun, np.maximum(comes, last + 1 / tds), comes)
    more = np.minimum(1 / took, tds) * np.maximum(end - start, 0.0) ** 2 / 2
    expected = tds * np.maximum(end - x.arrival[there] - x.ttft[there], 1e-9) ** 2 / 2
    return np.minimum((had + more) / expected, 1) - np.minimum(had / expected, 1)


def _delay(cost: Cost, link: float, x: View, there: np.ndarray) -> Float64[np.ndarray, " k"]:
    """Seconds until a request decodes: for its prompt, or for its cache to come back."""
    swapped = x.status[there] == SWAPPED
    out = np.where(swapped, x.done[there] * cost.kv_bytes / link, 0.0)
    for i in np.flatnonzero(x.status[there] < DECODING).tolist():
        out[i] = cost.iteration(Work.of([x.prompt[there[i]]], [0]))
    return out


def _serve(swap: bool, x: View, chosen: np.ndarray, away: np.ndarray) -> Batch:
    """Prompts of those chosen first, as FCFS does; else everybody's next token."""
    free = x.free_blocks + int(x.own[away].sum())
    preempt = dict.fromkeys(away.tolist(), SWAP if swap else RECOMPUTE)
    prefill, budget, served = {}, x.max_tokens, set(chosen.tolist())
    for slot in [slot for slot in x.prompts if slot in served]:
        need = int(x.need(x.prompt[slot] + 1) - x.blocks[slot])
        if need > free or (x.prompt[slot] > budget and prefill):
            break
        prefill[slot], _ = x.left(slot)
        free, budget = free - need, budget - prefill[slot]
    decode = []
    if not prefill:
        for slot in sorted(chosen[x.status[chosen] >= DECODING].tolist(), key=lambda slot: x.id[slot]):
            need = max(0, int(x.need(x.done[slot] + 1) - x.blocks[slot]))
            if need <= free:
                decode.append(slot)
                free -= need
    return Batch(decode, prefill, preempt)


def _filled(order: np.ndarray, need: np.ndarray, limit: np.ndarray, size: int) -> Bool[np.ndarray, " k"]:
    """The first `size` in this order that there is room for: each as long as no more than its limit is then held."""
    taken, held, count = np.zeros(len(need), bool), 0, 0
    for i in order.tolist():
        if count < size and held + need[i] <= limit[i]:
            taken[i], held, count = True, held + int(need[i]), count + 1
    return taken
