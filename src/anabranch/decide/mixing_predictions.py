"""A changing mixture of predictors for metrical task systems.

Antoniadis, Coester, Eliáš, Polak, Simon: Mixing predictions for online metric algorithms (arXiv 2304.01781, ICML 2023).

In a metrical task system (`anabranch.decide.metrical`) each of ℓ predictors says at each step where to go. The
benchmark is not the best of them but the best sequence: DYN_m may change m times whom it follows, and DYN as often as
it likes. The stream is the steps and what it costs to follow whom; the state is the weights of the predictors, ℓ
floats, and whom we follow.

    >>> from anabranch.decide.metrical import MTS, dynamic_optimum
    >>> from anabranch.drive import play
    >>> service = jnp.zeros((100, 2)).at[:50, 0].set(1.0).at[50:, 1].set(1.0)  # first predictor 1 is right, then 0
    >>> env = MTS(service, jnp.broadcast_to(1.0 - jnp.eye(2), (100, 2, 2)))
    >>> result = play(ShareMix(2, diameter=1.0, epsilon=1.0), env, 100, key=jax.random.PRNGKey(0))
    >>> dynamic_optimum(env, switches=0).item(), dynamic_optimum(env, switches=1).item()
    (50.0, 1.0)
    >>> bool(-result.ticks.feedback.reward.sum() < 15)
    True

`ShareMix` and `BanditShareMix` are the (1 + ε)-competitive side of the paper: exponential weights which share what they
lose (Blum, Burch: On-line learning and the metrical task system problem, COLT 1997), so that weights move in proportion
to costs, not to time. `LayeredMix` has the structure of the O(ℓ²) side, mirror descent on the tree of shortest paths
through the layers of suggestions; its regulariser is simpler than the paper's and the bound is not claimed. Constants
are ours throughout, and so is what a branch that forks does: it goes with the nearer child. Splitting evenly is as free
at that moment, but then pays for nearly all forks, of which there are many.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from anabranch.cell import Decision, Feedback, Maybe, Policy, noise
from anabranch.decide.metrical import TINY, Costs, Move, couple, transport


class MixState(NamedTuple):
    """The weights of the predictors, and the one that we follow: a draw from them."""

    w: Float[Array, " l"]
    i: Int[Array, ""]
    t: Int[Array, ""]
    key: PRNGKeyArray


class _Mix(Policy):
    """What both mixtures share.

    A predictor that pays f loses the share 1 - exp(-η f / D) of its weight; of what all have lost, the part α = ε/10 is
    given back to all alike, so that one that was bad for long comes back after it was good for a while. With f at most
    r D, following the weights costs up to (1 + η r / 2) / (1 - α) times what DYN_m pays, and an amount for each change,
    about (D / η) ln(ℓ / α); moving with the weights, η times as much again. η is as large as ε then allows.

    Raises:
        ValueError: `n`, `diameter` or `most` is not positive, `epsilon` not in (0, 1], or `share` not in [0, 1).
    """

    n: int = eqx.field(static=True)
    """Predictors, ℓ."""
    diameter: float
    """D: no two suggestions are further apart."""
    epsilon: float = 0.25
    most: float | None = None
    """The most that a predictor pays in a step, service and move, by default D. What is above counts as this much."""
    share: float | None = None
    """α; by default ε/10, and 0 gives Hedge, which does not forget."""

    def __check_init__(self):
        if self.n < 1:
            raise ValueError(f"a mixture needs at least one predictor, got n = {self.n}")
        if not self.diameter > 0:
            raise ValueError(f"diameter must be positive, got {self.diameter}")
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon must be in (0, 1], got {self.epsilon}")
        if self.most is not None and not self.most > 0:
            raise ValueError(f"most must be positive, got {self.most}")
        if self.share is not None and not 0 <= self.share < 1:
            raise ValueError(f"share must be in [0, 1), got {self.share}")

    @property
    def limit(self) -> float:
        return self.diameter if self.most is None else self.most

    @property
    def alpha(self) -> float:
        return self.epsilon / 10 if self.share is None else self.share

    def eta(self, epsilon: float, r: float) -> float:
        """The solution of (1 + η) (1 + η r / 2) = (1 + ε) (1 - ε / 10)."""
        gain = (1 + epsilon) * (1 - epsilon / 10) - 1
        return 2 * gain / (1 + r / 2 + ((1 + r / 2) ** 2 + 2 * r * gain) ** 0.5)

    def init(self, *, key=None):
        key = jax.random.PRNGKey(0) if key is None else key
        first = jax.random.randint(noise(key, 0, "first"), (), 0, self.n)
        return MixState(jnp.full(self.n, 1 / self.n), first, jnp.zeros((), jnp.int32), key)

    def reweigh(self, w: Float[Array, " l"], loss: Float[Array, " l"]) -> Float[Array, " l"]:
        """The weights after each has lost the share 1 - exp(-loss), and all have been given some back."""
        lost = -jnp.expm1(-loss) * w
        w = w - lost + self.alpha * lost.mean()
        return w / w.sum()


class ShareMix(_Mix):
    """The mixture that sees all costs before it moves. Observation: `Costs`.

    It moves as rarely as the weights allow or, with `by_transport`, as cheaply: the next predictor is then drawn from
    the optimal transport of the old weights to the new ones at the prices of the step.
    """

    by_transport: bool = eqx.field(static=True, default=False)

    def act(self, state: MixState, x: Costs):
        eta, paid = self.eta(self.epsilon, self.limit / self.diameter), jnp.minimum(x.following, self.limit)
        w, key = self.reweigh(state.w, eta * paid / self.diameter), noise(state.key, state.t)
        if self.by_transport:
            row = transport(state.w, w, x.move)[state.i]
            row = jnp.where(row.sum() > 0, row, w)
            i = jax.random.categorical(key, jnp.log(jnp.maximum(row, TINY))).astype(jnp.int32)
        else:
            i = couple(state.w, w, state.i, key)
        return MixState(w, i, state.t + 1, state.key), Decision(Move(i, i), jnp.log(jnp.maximum(w[i], TINY)))


class BanditShareMix(_Mix):
    """The mixture that asks one predictor a step, nearly always the one that it follows; for `MTS(reveal="bandit")`.

    With probability γ = ε/4 it asks any, and serves the step astray. Only these answers count, divided by γ/ℓ, the
    probability of each: whom we follow depends on what we have learned, and would bias it. Going astray may take ε/2 of
    the ε, so that η has the other half to keep.
    """

    def act(self, state: MixState, x=()):
        draw, whom = jax.random.split(noise(state.key, state.t))
        explore = jax.random.uniform(draw) < self.epsilon / 4
        query = jnp.where(explore, jax.random.randint(whom, (), 0, self.n), state.i)
        logp = jnp.where(explore, jnp.log(self.epsilon / 4 / self.n), jnp.log1p(-self.epsilon / 4))
        return state, Decision(Move(state.i, query), logp, explore)

    def learn(self, state: MixState, x, decision: Decision, feedback: Feedback):
        scale = self.n / (self.epsilon / 4) / self.diameter
        asked = decision.aux & (jnp.arange(self.n) == decision.action.query)
        paid = jnp.where(asked, jnp.minimum(feedback.info, self.limit) * scale, 0.0)
        w = self.reweigh(state.w, self.eta(self.epsilon / 2, self.limit * scale) * paid)
        i = couple(state.w, w, state.i, noise(state.key, state.t, "move"))
        return MixState(w, i, state.t + 1, state.key)


class CheapestState(NamedTuple):
    """What each predictor has paid, and whom we follow."""

    paid: Float[Array, " l"]
    i: Int[Array, ""]


class Cheapest(Policy):
    """The MIN operator: stay with a predictor until it has paid twice what another has, then follow the cheapest.

    Fiat, Rabani, Ravid: Competitive k-server algorithms (FOCS 1990).
    """

    n: int = eqx.field(static=True)

    def init(self, *, key=None):
        return CheapestState(jnp.zeros(self.n), jnp.zeros((), jnp.int32))

    def act(self, state, x: Costs):
        paid = state.paid + x.following
        i = jnp.where(paid[state.i] > 2 * paid.min(), jnp.argmin(paid), state.i).astype(jnp.int32)
        return CheapestState(paid, i), Decision(Move(i, i))


# The tree of shortest paths


class TreeState(NamedTuple):
    """The tree of the cheapest ways to the ℓ suggestions of this step, without what leads nowhere or does not branch.

    Nodes 0 … ℓ - 1 are its leaves, the last is the root, others are branchings or unused.
    """

    parent: Int[Array, " 2l"]
    work: Float[Array, " 2l"]
    """What the cheapest way from the root to the node costs."""
    q: Float[Array, " 2l"]
    """The probability of going to the node, given its parent."""
    picked: Bool[Array, " 2l"]
    """One child of each parent, drawn by `q`; we are at the leaf that picked nodes lead to."""
    t: Int[Array, ""]
    key: PRNGKeyArray


class LayeredMix(Policy):
    """Mirror descent, scale by scale, on the tree of shortest paths. Observation: `Costs`.

    The suggestions of a step are a layer of a graph whose edges are what following them costs. The cheapest ways to all
    nodes of the newest layer are a tree, of which we follow one branch. When the edges to leaves grow, each branching
    weighs its children anew, by how much they grew relative to their length, ω (down to the furthest leaf):

        q ← ((q + δ) exp(κ (λ - growth) / ω) - δ)₊, with λ such that they sum to 1, κ = ½ and δ = 1 / 2ℓ.
    """

    n: int = eqx.field(static=True)

    def __check_init__(self):
        if self.n < 2:
            raise ValueError(f"a tree needs at least two predictors, got n = {self.n}")

    def init(self, *, key=None):
        n, key = self.n, jax.random.PRNGKey(0) if key is None else key
        leaf = jnp.arange(2 * n) < n
        first = jnp.arange(2 * n) == jax.random.randint(noise(key, 0, "first"), (), 0, n)
        zero = jnp.zeros(2 * n)
        return TreeState(jnp.full(2 * n, 2 * n - 1), zero, leaf / n, first, jnp.zeros((), jnp.int32), key)

    def act(self, state: TreeState, x: Costs):
        grow, draw = jax.random.split(noise(state.key, state.t))
        tree, growth = self.extend(state, x, grow)
        tree = self.descend(tree, growth, draw)
        at = jnp.where(_above(tree.parent) & (jnp.arange(2 * self.n) < 2 * self.n - 1), tree.picked, True).all(1)
        i = jnp.argmax(at[: self.n]).astype(jnp.int32)
        return tree._replace(t=state.t + 1), Decision(Move(i, i))

    def extend(self, state: TreeState, x: Costs, key: PRNGKeyArray) -> tuple[TreeState, Float[Array, " l"]]:
        """The tree with a new layer of leaves, pruned and contracted, and how much each leaf's edge has grown."""
        n, root = self.n, 3 * self.n - 1
        ways = state.work[:n, None] + x.move + x.service
        back = ways.argmin(0)
        growth = ways.min(0) - state.work[back]
        # New leaves first, then all nodes of the old tree.
        parent = jnp.concatenate([n + back, n + state.parent])
        work = jnp.concatenate([ways.min(0), state.work])
        above = _above(parent)
        alive = above[:n].any(0)
        child = alive[:, None] & (parent[:, None] == jnp.arange(3 * n)) & (jnp.arange(3 * n)[:, None] != root)
        before = jnp.concatenate([jnp.zeros(n), state.q])
        now = jnp.where(child.any(1), before, 0.0)
        total = (now @ child)[parent]
        # A leaf that forks is left for the nearest of its children: they begin where it is, so that costs nothing.
        least = jnp.where(child, (work - work[parent])[:, None], jnp.inf).min(0)
        nearest = child.any(1) & (work - work[parent] <= least[parent])
        first = nearest & (jnp.cumsum(child & nearest[:, None], axis=0)[jnp.arange(3 * n), parent] == 1)
        now = jnp.where(total > 0, now / jnp.maximum(total, TINY), first)
        picked = jnp.concatenate([jnp.zeros(n, bool), state.picked])
        picked = _couple(before, now, picked, parent, key)
        # A node with one child is none: its child takes its place.
        keep = (child.sum(0) > 1) | (jnp.arange(3 * n) < n) | (jnp.arange(3 * n) == root)
        proper = above & keep & ~jnp.eye(3 * n, dtype=bool)
        up = jnp.argmax(jnp.where(proper, above.sum(1), -1), axis=1)  # the deepest that is kept
        chain = above & ~above[up]
        now, picked = jnp.where(chain, now, 1.0).prod(1), jnp.where(chain, picked, True).all(1)
        # Leaves keep their places, branchings come after them, the root is last; what is not kept goes nowhere.
        slot = jnp.where(keep, jnp.cumsum(keep) - 1, 2 * n).at[root].set(2 * n - 1)
        # The root follows its only child, so that numbers stay small.
        start = jnp.where(child[:, root].sum() > 1, 0.0, jnp.where(keep, work, jnp.inf)[:root].min())
        values = slot[up], jnp.maximum(work - start, 0.0), now, picked
        nobody = jnp.full(2 * n, 2 * n - 1), jnp.zeros(2 * n), jnp.zeros(2 * n), jnp.zeros(2 * n, bool)
        slot = slot.at[root].set(2 * n)
        parent, work, q, picked = (old.at[slot].set(new, mode="drop") for old, new in zip(nobody, values))
        return TreeState(parent, work, q, picked, state.t, state.key), growth

    def descend(self, tree: TreeState, growth: Float[Array, " l"], key: PRNGKeyArray) -> TreeState:
        """All branchings weigh their children anew."""
        n, delta, kappa = self.n, 1 / (2 * self.n), 0.5
        above = _above(tree.parent)
        under = above[:n]  # (leaf, node)
        chain = above[:n, None, :] & ~above[None]  # from a leaf up to, and without, a node
        reach = jnp.where(under, jnp.where(chain, tree.q, 1.0).prod(-1), 0.0)
        cost = growth @ reach
        size = jnp.where(under, tree.work[:n, None], -jnp.inf).max(0) - tree.work[tree.parent]
        used = under.any(0) & (jnp.arange(2 * n) < 2 * n - 1)
        child = used[:, None] & (tree.parent[:, None] == jnp.arange(2 * n))

        def weigh(level):  # by the λ of each parent: the q of its children, and their sum
            rise = jnp.minimum((level[tree.parent] - cost) / jnp.maximum(size, TINY), 60.0)
            q = jnp.clip((tree.q + delta) * jnp.exp(kappa * rise) - delta, 0.0, 1.0) * used
            return q, q @ child

        def halve(_, bounds):
            low, high = bounds
            level = (low + high) / 2
            enough = weigh(level)[1] >= 1
            return jnp.where(enough, low, level), jnp.where(enough, level, high)

        bounds = jnp.zeros(2 * n), jnp.where(child, cost[:, None], 0.0).max(0)
        (below, low), (beyond, high) = map(weigh, jax.lax.fori_loop(0, 20, halve, bounds))
        part = ((1 - low) / jnp.maximum(high - low, TINY))[tree.parent]
        q = jnp.where(used, below + jnp.clip(part, 0.0, 1.0) * (beyond - below), 0.0)
        return tree._replace(q=q, picked=_couple(tree.q, q, tree.picked, tree.parent, key))


def _above(parent: Int[Array, " m"]) -> Bool[Array, "m m"]:
    """Row v: the ancestors of v, and v."""
    m = parent.shape[0]
    above = jnp.eye(m) + (parent[:, None] == jnp.arange(m))
    for _ in range((m - 1).bit_length()):
        above = (above @ above > 0).astype(jnp.float32)
    return above > 0


def _couple(old, new, picked, parent, key):
    """What each parent picks, drawn from `new`, with as few changes from `old` as can be."""
    siblings = parent[:, None] == parent
    stay, draw = jax.random.split(key)
    kept = picked & (jax.random.uniform(stay, parent.shape) * old < new)
    score = jnp.log(jnp.maximum(new - old, TINY)) + jax.random.gumbel(draw, parent.shape)
    score = jnp.where(new > 0, score, -jnp.inf)
    best = (score >= jnp.where(siblings, score, -jnp.inf).max(1)) & (new > 0)
    return jnp.where((siblings & kept).any(1), kept, best)


def example() -> tuple[ShareMix, tuple]:
    """A mixture of three predictors on a line, and 64 steps of a random system."""
    draw = np.random.default_rng(0)
    places, service = jnp.asarray(draw.uniform(size=(65, 3))), jnp.asarray(draw.uniform(size=(64, 3)))
    costs = Costs(service, jnp.abs(places[:-1, :, None] - places[1:, None]))
    zero, never = jnp.zeros(64), jnp.zeros(64, bool)
    decision = Decision(Move(zero.astype(jnp.int32), zero.astype(jnp.int32)), zero)
    feedback = Feedback(zero, terminal=never, truncated=never, info=zero)
    return ShareMix(3, diameter=1.0), (costs, Maybe((costs, decision, feedback), never))
