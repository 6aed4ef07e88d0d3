"""The nouns of the family. Now: caches by key, as cells of fixed shape.

A cache takes one `Request` a step and answers with an `Access`: whether the key was there, in which slot it is now, and
which key had to leave. It holds no values: the slot is where the caller keeps them.

    >>> cache = LRU(2)
    >>> state, seen = cache.advance(cache.init(), requests([7, 8, 7, 9, 8]))
    >>> seen.hit.tolist(), seen.slot.tolist(), seen.evicted.tolist()
    ([False, False, True, False, False], [0, 1, 0, 1, 0], [0, 0, 0, 8, 7])

A step compares all keys and all scores at once: no pointers, one compiled scan over a trace, one `vmap` over caches.
Ages are differences to the clock, so the clock may wrap around.
"""

import heapq
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, PRNGKeyArray, Shaped, UInt32

from anabranch.cell import Cell

EVICTIONS = 64
"""How many entries one step may evict to make room for a large one."""


class Request(NamedTuple):
    """One request. What a miss costs is read on a miss only; any u32 may be a key."""

    key: UInt32[Array, ""] | int
    cost: Float[Array, ""] | float = 1.0
    size: Float[Array, ""] | float = 1.0


class Access(NamedTuple):
    """What became of a request."""

    hit: Bool[Array, ""]
    slot: Int[Array, ""]
    """Where the key is held after the step; -1 if it was refused."""
    evicted: UInt32[Array, ""]
    """The key that left, the last one if several did; 0 if none. `live` of the state says which slots are in use."""
    admitted: Bool[Array, ""]
    """The key was put in now."""


def requests(keys: Any, cost: Any = 1.0, size: Any = 1.0) -> Request:
    """T requests, stacked, from T keys and their costs and sizes (each T numbers or one).

    Raises:
        ValueError: a key is no integer in [0, 2^32); a cost is negative or not finite; a size is not positive.
    """
    keys = np.asarray(keys)
    if not np.issubdtype(keys.dtype, np.integer) or (keys.size and (keys.min() < 0 or keys.max() >= 2**32)):
        wrong = keys.dtype if not np.issubdtype(keys.dtype, np.integer) else (keys.min(), keys.max())
        raise ValueError(f"keys must be integers in [0, 2^32), got {wrong}: hash them, for instance with zlib.crc32")
    cost, size = (np.broadcast_to(np.asarray(v, np.float32), keys.shape) for v in (cost, size))
    if not (np.isfinite(cost) & (cost >= 0)).all():
        raise ValueError(f"cost must be finite and not negative, got {cost[~(np.isfinite(cost) & (cost >= 0))][0]}")
    if not (np.isfinite(size) & (size > 0)).all():
        raise ValueError(f"size must be finite and positive, got {size[~(np.isfinite(size) & (size > 0))][0]}")
    return Request(jnp.asarray(keys.astype(np.uint32)), jnp.asarray(cost), jnp.asarray(size))


def first(mask: Bool[Array, " n"]) -> Int[Array, ""]:
    """The lowest index where `mask` is True; n where there is none."""
    n = mask.shape[0]  # a minimum of integers is vectorised by XLA on CPU; argmax is not
    return jnp.min(jnp.where(mask, jnp.arange(n, dtype=jnp.int32), n))


def smallest(mask: Bool[Array, " n"], *orders: Shaped[Array, " n"]) -> Int[Array, ""]:
    """The index, among those in `mask`, of the lexicographically smallest; n if the mask is empty."""
    for order in orders:
        top = jnp.inf if jnp.issubdtype(order.dtype, jnp.floating) else jnp.iinfo(order.dtype).max
        order = jnp.where(mask, order, jnp.asarray(top, order.dtype))
        mask = mask & (order == jnp.min(order))
    return first(mask)


class Cache(Cell):
    """A bounded set of keys: `step(state, Request) -> (state, Access)`.

    Raises:
        ValueError: `capacity` is no positive integer.
    """

    capacity: int
    """How many keys it holds, C."""

    def __check_init__(self):
        if not isinstance(self.capacity, int) or self.capacity < 1:
            raise ValueError(f"capacity must be a positive integer, got {self.capacity!r}")


class Entries(NamedTuple):
    """What a `Ranked` cache knows of its slots."""

    key: UInt32[Array, " C"]
    live: Bool[Array, " C"]
    cost: Float[Array, " C"]
    size: Float[Array, " C"]
    last: Int[Array, " C"]
    """The clock when the entry was last touched (FIFO: put in)."""
    freq: Int[Array, " C"]
    """Requests since it was put in, the first included."""
    score: Float[Array, " C"]
    floor: Float[Array, ""]
    """The largest score evicted so far (L of the GreedyDual family)."""
    clock: Int[Array, ""]

    @property
    def age(self) -> Int[Array, " C"]:
        """Minus the number of steps since the last touch; right across an overflow of the clock."""
        return self.last - self.clock


class Ranked(Cache):
    """A cache that admits every key and evicts the smallest by `order`.

    With a `budget` the sizes of the entries add up to no more than that. A key that is larger, or that does not fit
    after 64 evictions, is refused.

    Raises:
        ValueError: `budget` is not positive.
    """

    budget: float | None = None
    """Total size; None: every entry takes one slot, whatever its size."""
    renews: ClassVar[bool] = True
    """Whether a hit makes an entry young again."""

    def __check_init__(self):
        if self.budget is not None and not (self.budget > 0 and math.isfinite(self.budget)):
            raise ValueError(f"budget must be positive and finite, got {self.budget!r}")

    def order(self, state: Entries) -> tuple[Shaped[Array, " C"], ...]:
        """What leaves first: arrays of C numbers, compared one after the other; the smallest leaves."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `order`")

    def score(self, freq: Int[Array, ""], cost: Float[Array, ""], size: Float[Array, ""]) -> Float[Array, ""]:
        """The score, above the floor, of an entry that is touched now."""
        return jnp.float32(0)

    def init(self, *, key: PRNGKeyArray | None = None) -> Entries:
        f, i = jnp.zeros(self.capacity, jnp.float32), jnp.zeros(self.capacity, jnp.int32)
        return Entries(i.astype(jnp.uint32), i.astype(bool), f, f, i, i, f, jnp.float32(0), jnp.int32(0))

    def step(self, state: Entries, x: Request) -> tuple[Entries, Access]:
        key, cost, size = jnp.asarray(x.key, jnp.uint32), jnp.float32(x.cost), jnp.float32(x.size)
        found = first(state.live & (state.key == key))
        hit = found < self.capacity
        state, room, evicted = self._make_room(state, hit, size)
        slot = jnp.where(hit, found, room)
        freq = jnp.where(hit, state.freq[slot] + 1, 1)
        cost, size = jnp.where(hit, state.cost[slot], cost), jnp.where(hit, state.size[slot], size)
        last = state.clock if self.renews else jnp.where(hit, state.last[slot], state.clock)
        state = Entries(
            key=state.key.at[slot].set(key),  # a refused key has slot C: out of bounds, nothing is written
            live=state.live.at[slot].set(True),
            cost=state.cost.at[slot].set(cost),
            size=state.size.at[slot].set(size),
            last=state.last.at[slot].set(last),
            freq=state.freq.at[slot].set(freq),
            score=state.score.at[slot].set(state.floor + self.score(freq, cost, size)),
            floor=state.floor,
            clock=state.clock + 1,
        )
        held = slot < self.capacity
        return state, Access(hit, jnp.where(held, slot, -1), evicted, held & ~hit)

    def _make_room(self, state: Entries, hit, size) -> tuple[Entries, Int[Array, ""], UInt32[Array, ""]]:
        """The state after the evictions of a miss, a free slot (C: refused), the last key that left (0: none)."""

        def evict(state, slot, when):
            gone = when & state.live[slot]
            floor = jnp.where(gone, jnp.maximum(state.floor, state.score[slot]), state.floor)
            live = state.live.at[slot].set(state.live[slot] & ~gone)
            return state._replace(live=live, floor=floor), jnp.where(gone, state.key[slot], 0)

        if self.budget is None:  # the first empty slot, else that of the entry that leaves next
            primary, *ties = self.order(state)
            low = -jnp.inf if jnp.issubdtype(primary.dtype, jnp.floating) else jnp.iinfo(primary.dtype).min
            slot = smallest(jnp.ones_like(state.live), jnp.where(state.live, primary, low), *ties)
            state, evicted = evict(state, slot, ~hit)
            return state, slot, evicted

        def crowded(state):
            return state.live.all() | (jnp.sum(jnp.where(state.live, state.size, 0)) + size > self.budget)

        def more(carry):
            state, n, _ = carry
            return ~hit & (size <= self.budget) & (n < EVICTIONS) & crowded(state)

        def body(carry):
            state, n, _ = carry
            state, evicted = evict(state, smallest(state.live, *self.order(state)), True)
            return state, n + 1, evicted

        state, _, evicted = jax.lax.while_loop(more, body, (state, jnp.int32(0), jnp.uint32(0)))
        return state, jnp.where(crowded(state), self.capacity, first(~state.live)), evicted


class FIFO(Ranked):
    """First in, first out."""

    renews: ClassVar[bool] = False

    def order(self, state):
        return (state.age,)


class LRU(Ranked):
    """Least recently used."""

    def order(self, state):
        return (state.age,)


class LFU(Ranked):
    """Least frequently used since it was put in; of several, the least recently used."""

    def order(self, state):
        return state.freq, state.age


class GDSF(Ranked):
    """Greedy-dual-size with frequency: the smallest H = L + freq·cost/size leaves, and L becomes its H.

    Cherkasova, 1998: "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy". Of several
    equal H the smallest key leaves.
    """

    def order(self, state):
        return state.score, state.key

    def score(self, freq, cost, size):
        return freq * cost / size

    def step(self, state, x):
        # Only differences of H matter. Without this, float32 would lose the increments below a floor that only grows.
        shift = jnp.where(state.floor > 4096 * jnp.float32(x.cost) / jnp.float32(x.size), state.floor, 0)
        return super().step(state._replace(score=state.score - shift, floor=state.floor - shift), x)


T1, T2, B1, B2 = 1, 2, 3, 4
"""Tags of ARC's directory: held and seen once, held and seen again, and the keys that left each (ghosts)."""


class Directory(NamedTuple):
    """The state of `ARC`: 2C keys, of which C are held."""

    key: UInt32[Array, " 2C"]
    tag: Int8[Array, " 2C"]
    """0: empty."""
    last: Int[Array, " 2C"]
    slot: Int[Array, " 2C"]
    """Where a held key is held."""
    n: Int[Array, " 5"]
    """How many keys have each tag."""
    p: Float[Array, ""]
    """The size that T1 should have."""
    clock: Int[Array, ""]

    @property
    def live(self) -> Bool[Array, " 2C"]:
        return (self.tag == T1) | (self.tag == T2)


class ARC(Cache):
    """Adaptive replacement: recency and frequency lists whose sizes follow the hits on what each lost.

    Megiddo and Modha, 2003: "ARC: a self-tuning, low overhead replacement cache" (figure 4). One size for all.
    """

    def init(self, *, key: PRNGKeyArray | None = None) -> Directory:
        i = jnp.zeros(2 * self.capacity, jnp.int32)
        n = jnp.zeros(5, jnp.int32).at[0].set(2 * self.capacity)
        return Directory(i.astype(jnp.uint32), i.astype(jnp.int8), i, i, n, jnp.float32(0), jnp.int32(0))

    def step(self, state: Directory, x: Request) -> tuple[Directory, Access]:
        c, key, n = self.capacity, jnp.asarray(x.key, jnp.uint32), state.n
        found = first((state.tag > 0) & (state.key == key))
        tag = jnp.where(found < 2 * c, state.tag[found], 0)
        hit, new = (tag == T1) | (tag == T2), tag == 0

        b1, b2 = n[B1].astype(jnp.float32), n[B2].astype(jnp.float32)
        up, down = jnp.maximum(1, b2 / jnp.maximum(b1, 1)), jnp.maximum(1, b1 / jnp.maximum(b2, 1))
        p = jnp.where(tag == B1, jnp.minimum(c, state.p + up), state.p)
        p = jnp.where(tag == B2, jnp.maximum(0, p - down), p)

        # A new key may push one out of the directory: T1 ∪ B1 stays within c keys, everything within 2c.
        full = n[T1] + n[B1] == c
        drop = jnp.where(full, jnp.where(n[T1] < c, B1, T1), jnp.where(n[0] == 0, B2, 0))
        demote = ~hit & (n[T1] + n[T2] == c) & ~(new & (drop == T1))  # else there is room, or T1 lost one for good
        loser = jnp.where((n[T1] > 0) & ((n[T1] > p) | ((tag == B2) & (n[T1] == p))), T1, T2)

        age = state.last - state.clock
        place = jnp.where(new, smallest(state.tag == drop, age), found)  # drop = 0: an empty place
        out = jnp.where(demote, smallest(state.tag == loser, age), 2 * c)  # 2c: out of bounds, nothing is written
        reused = new & (drop == T1)  # a new key takes the place of one that was held
        slot = jnp.where(demote, state.slot[out], jnp.where(hit | reused, state.slot[place], n[T1] + n[T2]))
        evicted = jnp.where(demote, state.key[out], jnp.where(reused, state.key[place], 0))

        to = jnp.where(new, T1, T2)
        n = n.at[jnp.where(new, drop, tag)].add(-1).at[to].add(1)
        n = n.at[loser].add(-demote.astype(jnp.int32)).at[loser + 2].add(demote.astype(jnp.int32))
        state = Directory(
            key=state.key.at[place].set(key),
            tag=state.tag.at[out].set((loser + 2).astype(jnp.int8)).at[place].set(to.astype(jnp.int8)),
            last=state.last.at[place].set(state.clock),
            slot=state.slot.at[place].set(slot),
            n=n,
            p=p,
            clock=state.clock + 1,
        )
        return state, Access(hit, slot, evicted, ~hit)


SMALL, MAIN = 1, 2
"""Tags of the two queues of S3-FIFO."""


class Queues(NamedTuple):
    """The state of `S3FIFO`."""

    key: UInt32[Array, " C"]
    tag: Int8[Array, " C"]
    """0: empty."""
    freq: Int8[Array, " C"]
    """Hits, at most 3."""
    last: Int[Array, " C"]
    """Place in its queue."""
    tail: Int[Array, ""]
    """The next place."""
    n: Int[Array, " 3"]
    """How many slots have each tag."""
    ghost: UInt32[Array, " M"]
    ghost_live: Bool[Array, " M"]
    ghost_last: Int[Array, " M"]

    @property
    def live(self) -> Bool[Array, " C"]:
        return self.tag > 0


class S3FIFO(Cache):
    """Three FIFO queues: a small one that filters, the main one, and the ghosts of those the filter threw out.

    Yang et al., 2023: "FIFO queues are all you need for cache eviction". One hit in the small queue (a tenth of the
    capacity) promotes; the main queue gives an entry one more round for each hit, at most three. Both queues keep to
    their shares from the start; in the paper's pseudo-code the small one first fills the whole empty cache. One size
    for all. A step moves as many entries as hits have earned moves: amortised one or two, at most 4C.

    Raises:
        ValueError: `capacity` is below 2.
    """

    def __check_init__(self):
        if self.capacity < 2:
            raise ValueError(f"capacity of S3FIFO must be at least 2 (two queues), got {self.capacity}")

    @property
    def small(self) -> int:
        """Capacity of the small queue."""
        return max(1, self.capacity // 10)

    @property
    def main(self) -> int:
        """Capacity of the main queue, and of the ghosts."""
        return self.capacity - self.small

    def init(self, *, key: PRNGKeyArray | None = None) -> Queues:
        i, g = jnp.zeros(self.capacity, jnp.int32), jnp.zeros(self.main, jnp.int32)
        n, flat, u = jnp.zeros(3, jnp.int32).at[0].set(self.capacity), i.astype(jnp.int8), jnp.uint32
        return Queues(i.astype(u), flat, flat, i, jnp.int32(0), n, g.astype(u), g.astype(bool), g)

    def step(self, state: Queues, x: Request) -> tuple[Queues, Access]:
        key = jnp.asarray(x.key, jnp.uint32)
        found = first((state.tag > 0) & (state.key == key))
        hit = found < self.capacity
        ghost = first(state.ghost_live & (state.ghost == key))
        known = ~hit & (ghost < self.main)
        state = state._replace(
            freq=state.freq.at[found].min(2).at[found].add(1),  # at most 3
            ghost_live=state.ghost_live.at[jnp.where(known, ghost, self.main)].set(False),
        )

        def more(carry):
            state, sieve, _ = carry
            return sieve | (~hit & (state.n[MAIN] >= self.main + jnp.where(known, 0, 1)))

        def move(carry):  # the head of a queue: to the tail of main, or out
            state, sieve, evicted = carry
            i = smallest(state.tag == jnp.where(sieve, SMALL, MAIN), state.last - state.tail)
            stays = state.freq[i] > 0
            to = jnp.where(stays, MAIN, 0)
            key = state.key[i]
            oldest = jnp.where(state.ghost_live, state.ghost_last - state.tail, jnp.iinfo(jnp.int32).min)
            grave = jnp.where(sieve & ~stays, smallest(jnp.ones_like(state.ghost_live), oldest), self.main)
            n = state.n.at[jnp.where(sieve, SMALL, MAIN)].add(-1).at[to].add(1)
            state = state._replace(
                tag=state.tag.at[i].set(to.astype(jnp.int8)),
                freq=state.freq.at[i].set(jnp.where(sieve, 0, state.freq[i] - 1).astype(jnp.int8)),
                last=state.last.at[i].set(state.tail),
                tail=state.tail + 1,
                n=n,
                ghost=state.ghost.at[grave].set(key),
                ghost_live=state.ghost_live.at[grave].set(True),
                ghost_last=state.ghost_last.at[grave].set(state.tail),
            )
            return state, sieve & stays & (n[SMALL] > 0), jnp.where(stays, evicted, key)

        sieve = ~hit & ~known & (state.n[SMALL] >= self.small)  # goes on until it has thrown one out
        state, _, evicted = jax.lax.while_loop(more, move, (state, sieve, jnp.uint32(0)))
        slot = jnp.where(hit, found, first(state.tag == 0))
        to = jnp.where(known, MAIN, SMALL)
        place = jnp.where(hit, self.capacity, slot)
        new = (~hit).astype(jnp.int32)
        state = state._replace(
            key=state.key.at[place].set(key),
            tag=state.tag.at[place].set(to.astype(jnp.int8)),
            freq=state.freq.at[place].set(0),
            last=state.last.at[place].set(state.tail),
            tail=state.tail + new,
            n=state.n.at[0].add(-new).at[to].add(new),
        )
        return state, Access(hit, slot, evicted, ~hit)


def belady(keys: Any, capacity: int) -> np.ndarray:
    """Which of the requests the offline optimum hits: it evicts the key whose next request is farthest away.

    Belady, 1966: "A study of replacement algorithms for a virtual-storage computer". Unit sizes; every key is admitted.

        >>> belady([1, 2, 3, 1, 2, 1], capacity=2).tolist()
        [False, False, False, True, False, True]

    Raises:
        ValueError: `capacity` is no positive integer.
    """
    if not isinstance(capacity, int) or capacity < 1:
        raise ValueError(f"capacity must be a positive integer, got {capacity!r}")
    keys = np.asarray(keys).tolist()
    following, seen = [0] * len(keys), {}
    for t in range(len(keys) - 1, -1, -1):
        following[t] = seen.get(keys[t], len(keys))
        seen[keys[t]] = t
    hits, held, heap = np.zeros(len(keys), bool), {}, []
    for t, key in enumerate(keys):
        hits[t] = key in held
        if not hits[t] and len(held) >= capacity:
            while True:  # what the heap says of a key that was requested since is out of date
                use, loser = heapq.heappop(heap)
                if held.get(loser) == -use:
                    break
            del held[loser]
        held[key] = following[t]
        heapq.heappush(heap, (-following[t], key))
    return hits
