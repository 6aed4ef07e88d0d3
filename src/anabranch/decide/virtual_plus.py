"""Virtual+: to pick the best k of n items that pass by, each once and for good; and the online attack that it serves.

Mladenovic, Bose, Berard, Hamilton, Lacoste-Julien, Vincent, Gidel: Online Adversarial Attacks (arXiv 2103.02014, ICLR
2022); the other rules are those that it compares with.

The stream is the values of n items in random order; the action is whether to pick the one that passes. All rules watch
the first t items and keep the k largest as references, sorted: that is the state, k values and k indices. They differ
in which reference an item must exceed, and in what then becomes of the references. The aim is to have picked as many of
the k largest as possible, or, where values are noisy estimates, of the items whose true values are the k largest.

    >>> values = jnp.array([3.0, 1.0, 2.0, 5.0, 0.0, 4.0, 6.0])
    >>> picks(VirtualPlus(n=7, k=2, t=3), values).tolist()  # references 3 2, then 5 3, then 5 4: two are picked
    [False, False, False, True, False, True, False]
    >>> picks(Virtual(n=7, k=2, t=3), values).tolist()  # 4 replaces 3, and 6 replaces 4, which was no longer watched
    [False, False, False, True, False, True, False]
    >>> picks(Optimistic(n=7, k=2, t=3), values).tolist()  # must exceed 2, then 3
    [False, False, False, True, False, True, False]

The official code takes item t into the sample too, and its `Optimistic` gives up two references at a time; here both
are as in the paper.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import Cell, Decision, Feedback, Maybe, Policy, noise

Model = Callable[[Float[Array, "..."]], Float[Array, " classes"]]
Attack = Callable[[Model, Float[Array, "..."], Int[Array, ""], PRNGKeyArray], Float[Array, "..."]]


class PickerState(NamedTuple):
    """References, and how far we are."""

    val: Float[Array, " k"]
    """The references, largest first; -∞ where there is none."""
    idx: Int[Array, " k"]
    """Which item each was, from 0; -1 where there is none."""
    last: Int[Array, ""]
    """Which of them an item must exceed."""
    i: Int[Array, ""]
    """Items seen."""
    picked: Int[Array, ""]
    bad: Int[Array, ""]
    """Items whose value was NaN: they count as -∞."""
    key: PRNGKeyArray


class Picker(Policy):
    """At most `k` of `n` items, none of the first `t`. Observation: the value; action: bool, to pick it.

    With `exhaust` the last items are all picked when no more are to come than may be picked. Nothing is picked after
    n items. Ties: an item must exceed its reference, not equal it.

    Raises:
        ValueError: `n`, `k` and `t` do not satisfy 1 ≤ k ≤ t < n.
    """

    n: int
    k: int
    t: int | None = None
    """The length of the sample; if nobody says, what is best for the rule: `sample`."""
    exhaust: bool = False

    def __check_init__(self):
        if not 1 <= self.k <= self.sample < self.n:
            raise ValueError(f"picking needs 1 <= k <= t < n, got k = {self.k}, t = {self.sample}, n = {self.n}")

    @property
    def sample(self) -> int:
        """How many items are only watched."""
        return math.floor(self.n / math.e) if self.t is None else self.t

    def init(self, *, key=None):
        zero = jnp.zeros((), jnp.int32)
        key = jax.random.PRNGKey(0) if key is None else key
        return PickerState(jnp.full(self.k, -jnp.inf), jnp.full(self.k, -1), self.rank(), zero, zero, zero, key)

    def rank(self) -> Int[Array, ""]:
        """The reference, from 0, that the first item after the sample must exceed."""
        return jnp.asarray(self.k - 1, jnp.int32)

    def choose(self, state: PickerState, above: Bool[Array, ""]) -> tuple[Any, Any, Any]:
        """Whether to pick an item that is or is not above its reference, to make it one, and then the next `last`.

        Picks do not count in the sample, nor once there are k.
        """
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `choose`")

    def act(self, state: PickerState, x: Float[Array, ""]):
        x = jnp.asarray(x, jnp.float32)
        value = jnp.where(jnp.isnan(x), -jnp.inf, x)
        sampling, room = state.i < self.sample, (state.picked < self.k) & (state.i < self.n)
        pick, insert, last = self.choose(state, value > state.val[state.last])
        pick = pick & ~sampling & room
        if self.exhaust:
            pick = pick | (room & ~sampling & (self.n - state.i <= self.k - state.picked))
        place = jnp.where(sampling | insert, (state.val >= value).sum(), self.k)
        val, idx = (_insert(old, new, place) for old, new in ((state.val, value), (state.idx, state.i)))
        last = jnp.where(pick, last, state.last)
        bad = state.bad + jnp.isnan(x)
        new = PickerState(val, idx, last, state.i + 1, state.picked + pick, bad.astype(jnp.int32), state.key)
        return new, Decision(pick)


def _insert(old, new, place):
    """`old` with `new` at `place`, the rest shifted and the last dropped; as it was if `place` is its length."""
    at = jnp.arange(old.shape[0])
    return jnp.where(at < place, old, jnp.where(at == place, new, jnp.roll(old, 1)))


class VirtualPlus(Picker):
    """Pick what exceeds the smallest reference; it replaces that reference."""

    def choose(self, state, above):
        pick = above & (state.picked < self.k)
        return pick, pick, state.last


class Virtual(Picker):
    """What exceeds the smallest reference replaces it, and is picked if that one was in the sample.

    Babaioff, Immorlica, Kempe, Kleinberg: A knapsack secretary problem with applications (APPROX 2007).
    """

    def choose(self, state, above):
        return above & (state.idx[-1] < self.sample), above, state.last


class Optimistic(Picker):
    """Pick what exceeds the last reference, which is then removed, unless it is the only one; none is added.

    From the same paper as `Virtual`.
    """

    def choose(self, state, above):
        return above, False, jnp.maximum(state.last - 1, 0)


SINGLE = {
    1: (1, 0.3678), 2: (1, 0.2545), 3: (2, 0.3475), 4: (2, 0.2928), 5: (2, 0.2525), 10: (3, 0.2159), 100: (15, 0.1331),
}  # fmt: skip
"""The best rank and share of the sample of `SingleRef`, by k."""


class SingleRef(Picker):
    """Pick whatever exceeds the r-th largest of the sample. With `r` and `t` unsaid they are the best for this k.

    Albers, Ladewig: New results for the k-secretary problem (ISAAC 2019), whose table is known here for some k only.

    Raises:
        ValueError: `r` is not in 1 … k, or not said for a k that is not in the table.
    """

    r: int | None = None

    def __check_init__(self):
        if self.k not in SINGLE and (self.r is None or self.t is None):
            raise ValueError(f"r and t must be given for k = {self.k}: the best are known for k in {sorted(SINGLE)}")
        if self.r is not None and not 1 <= self.r <= self.k:
            raise ValueError(f"r must be in 1 ... k = {self.k}, got {self.r}")

    @property
    def sample(self):
        return math.floor(SINGLE[self.k][1] * self.n) if self.t is None else self.t

    def rank(self):
        return jnp.asarray((SINGLE[self.k][0] if self.r is None else self.r) - 1, jnp.int32)

    def choose(self, state, above):
        return above, False, state.last


class RandomPicks(Picker):
    """Any k items, all choices alike, whatever their values; also of the first t."""

    def act(self, state, x):
        left = jnp.maximum(self.n - state.i, 1)
        p = jnp.where(state.i < self.n, (self.k - state.picked) / left, 0.0)
        pick = jax.random.uniform(noise(state.key, state.i)) < p
        logp = jnp.log(jnp.where(pick, p, 1 - p))
        return state._replace(i=state.i + 1, picked=state.picked + pick), Decision(pick, logp)


def picks(picker: Picker, values: Float[Array, " n"], key: PRNGKeyArray | None = None) -> Bool[Array, " n"]:
    """What is picked of a whole stream of values.

    Raises:
        ValueError: the stream is not as long as the picker was told.
    """
    if values.shape != (picker.n,):
        raise ValueError(f"values must be the {picker.n} of which to pick, got shape {values.shape}")

    def step(state, value):
        state, decision = picker.act(state, value)
        return state, decision.action

    return jax.lax.scan(step, picker.init(key=key), values)[1]


def competitive_ratio(picked: Bool[Array, " n"], truth: Float[Array, " n"], k: int) -> Float[Array, ""]:
    """The share of the k largest true values that was picked."""
    return picked[jax.lax.top_k(truth, k)[1]].sum() / k


# Attacks


def loss(model: Model, x: Float[Array, "..."], y: Int[Array, ""]) -> Float[Array, ""]:
    """Cross-entropy of the model's logits."""
    return -jax.nn.log_softmax(model(x))[y]


def fgsm(epsilon: float) -> Attack:
    """One step of `epsilon` along the sign of the gradient; pixels stay in [0, 1].

    Goodfellow, Shlens, Szegedy: Explaining and harnessing adversarial examples (ICLR 2015).
    """

    def attack(model, x, y, key):
        return jnp.clip(x + epsilon * jnp.sign(jax.grad(loss, 1)(model, x, y)), 0.0, 1.0)

    return attack


def pgd(epsilon: float, steps: int = 40, size: float = 0.01) -> Attack:
    """`steps` such steps of `size` from a random start, never further than `epsilon` from the input in any pixel.

    Madry, Makelov, Schmidt, Tsipras, Vladu: Towards deep learning models resistant to adversarial attacks (ICLR 2018).
    """

    def attack(model, x, y, key):
        def step(_, moved):
            moved = moved + size * jnp.sign(jax.grad(loss, 1)(model, moved, y))
            return jnp.clip(jnp.clip(moved, x - epsilon, x + epsilon), 0.0, 1.0)

        start = x + jax.random.uniform(key, x.shape, minval=-epsilon, maxval=epsilon)
        return jax.lax.fori_loop(0, steps, step, jnp.clip(start, 0.0, 1.0))

    return attack


class Attacked(NamedTuple):
    """An input after the attack, its loss on the surrogate, and whether it is submitted to the target."""

    x: Float[Array, "..."]
    value: Float[Array, ""]
    pick: Bool[Array, ""]


class AttackStream(Cell):
    """The online attack as a cell: each (x, y) is attacked on the surrogate, and its loss there is what is picked by.

    The target is not asked until an input is submitted, and then once. A tool to measure how robust models of one's own
    are; a stream that drifts is not in random order, and the guarantees of the rules do not hold for it.
    """

    surrogate: Model
    picker: Picker
    attack: Attack = eqx.field(static=True)

    def init(self, *, key=None):
        return self.picker.init(key=key)

    def attacked(self, x, i, key) -> tuple[Float[Array, "..."], Float[Array, ""]]:
        moved = self.attack(self.surrogate, x[0], x[1], noise(key, i, "attack"))
        return moved, loss(self.surrogate, moved, x[1])

    def step(self, state: PickerState, x):
        moved, value = self.attacked(x, state.i, state.key)
        state, decision = self.picker.act(state, value)
        return state, Attacked(moved, value, decision.action)

    def advance(self, state, xs):
        """A block: all attacks at once, then the picks in their order."""
        i = state.i + jnp.arange(xs[1].shape[0])
        moved, values = jax.vmap(self.attacked, (0, 0, None))(xs, i, state.key)

        def step(state, value):
            state, decision = self.picker.act(state, value)
            return state, decision.action

        state, picked = jax.lax.scan(step, state, values)
        return state, Attacked(moved, values, picked)


def fooled(target: Model, x: Float[Array, "n ..."], y: Int[Array, " n"]) -> Bool[Array, " n"]:
    """Which inputs the target gets wrong."""
    return jnp.argmax(jax.vmap(target)(x), axis=-1) != y


def example() -> tuple[VirtualPlus, tuple]:
    """Three of 60 random values."""
    values = jax.random.normal(jax.random.PRNGKey(0), (60,))
    never = jnp.zeros(60, bool)
    outcome = values, Decision(never, jnp.zeros(60)), Feedback(jnp.zeros(60), terminal=never, truncated=never)
    return VirtualPlus(60, 3), (values, Maybe(outcome, never))
