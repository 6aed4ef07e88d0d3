"""Dual Lagrangian learning: a network that answers an optimisation problem with a bound that is always valid.

Tanneau, Van Hentenryck: Dual Lagrangian Learning for Conic Optimization (NeurIPS 2024).

The stream is instances of one conic problem, min c·x subject to A x ⪰ b and bounds. A network predicts some of the dual
variables y; they are projected onto the dual cone; a closed form completes them to the best dual solution that has this
y. Its value is then a lower bound of the optimum, whatever the network says, and training is nothing but raising the
mean bound: no instance is ever solved. `DLL` has no state; `OnlineDLL` is a learner whose state is the network and the
optimiser, and which learns from each instance that passes.

    >>> problem = Knapsack(m=2, n=10)
    >>> model = DLL(problem, key=jax.random.PRNGKey(0))  # not trained
    >>> x = problem.sample(jax.random.PRNGKey(1))
    >>> answer = model(x)
    >>> greedy = -x.p[jnp.cumsum(x.W, axis=1).max(0) <= x.b.min()].sum()  # some feasible solution
    >>> bool(answer.bound <= greedy)
    True

Instances are brought to the scale of 1, and their items into one order, before they reach the network, and bounds back:
in float32, weights of a thousand would drown the gap. The paper's networks have sigmoid units and see instances as they
are. Of an integer problem the bound is that of its relaxation.
"""

from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from anabranch.cell import Cell, Learner


def cone_project(
    v: Float[Array, "..."], cone: Literal["nonnegative", "second_order", "psd"], radial: bool = False
) -> Float[Array, "..."]:
    """The nearest point of a self-dual cone.

    Of `v` = (t, x) in the second-order cone ‖x‖ ≤ t; with `radial`, (t₊, x) with x shortened to t₊ instead. A matrix
    (n, n) is made symmetric first; its negative eigenvalues become 0.

        >>> cone_project(jnp.array([0.0, 3.0, 4.0]), "second_order").tolist()
        [2.5, 1.5, 2.0]

    Raises:
        ValueError: an unknown cone.
    """
    if cone == "nonnegative":
        return jnp.maximum(v, 0.0)
    if cone == "psd":
        values, vectors = jnp.linalg.eigh((v + v.T) / 2)
        return (vectors * jnp.maximum(values, 0.0)) @ vectors.T
    if cone != "second_order":
        raise ValueError(f'cone must be "nonnegative", "second_order" or "psd", got {cone!r}')
    t, x = v[0], v[1:]
    inside = jnp.sum(x**2)
    length = jnp.where(inside > 0, jnp.sqrt(jnp.where(inside > 0, inside, 1.0)), 0.0)  # with a gradient at 0
    if radial:
        t = jnp.maximum(t, 0.0)
        return jnp.concatenate([t[None], x * jnp.where(length > t, t / jnp.where(length > t, length, 1.0), 1.0)])
    middle = (t + length) / 2
    edge = jnp.concatenate([middle[None], middle * x / jnp.where(length > 0, length, 1.0)])
    return jnp.where(length <= t, v, jnp.where(length <= -t, 0.0, edge))


# The completions are plain arithmetic: given NumPy arrays of float64, they work in float64.


def lp_completion(c, A, y):
    """The best (z_l, z_u) ≥ 0 with Aᵀy + z_l - z_u = c, for bounds l ≤ x ≤ u: (n,), (m, n), (m,) -> (n,), (n,)."""
    r = c - A.T @ y
    return r.clip(0), (-r).clip(0)


def knapsack_completion(p, W, y):
    """The best (z_l, z_u) ≥ 0 with Wᵀy + z_l - z_u = -p: (n,), (m, n), (m,) -> (n,), (n,)."""
    return lp_completion(-p, W, y)


def rsoc_completion(d, e, r, y):
    """The best (π, τ, σ) in the rotated cone 2 π τ ≥ σ² with π = d - r y and τ = e, for x t ≥ 1: (n,) each, y ()."""
    pi = d - r * y
    return pi, e, -((2 * pi * e) ** 0.5)


class LPInstance(NamedTuple):
    """min c·x subject to A x ≥ b and l ≤ x ≤ u."""

    c: Float[Array, " n"]
    A: Float[Array, "m n"]
    b: Float[Array, " m"]
    l: Float[Array, " n"]
    u: Float[Array, " n"]


class LPDuals(NamedTuple):
    """Of the rows, and of the lower and upper bounds of x."""

    y: Float[Array, " m"]
    z_l: Float[Array, " n"]
    z_u: Float[Array, " n"]


class KnapsackInstance(NamedTuple):
    """min -p·x subject to W x ≤ b and 0 ≤ x ≤ 1: value, capacities and weights."""

    p: Float[Array, " n"]
    b: Float[Array, " m"]
    W: Float[Array, "m n"]


class PlanningInstance(NamedTuple):
    """min d·x + e·t subject to r·x ≤ b and x_i t_i ≥ 1: costs of holding and ordering, resource used, capacity."""

    d: Float[Array, " n"]
    e: Float[Array, " n"]
    r: Float[Array, " n"]
    b: Float[Array, ""]


class PlanningDuals(NamedTuple):
    """Of the capacity, and of the cone of each item."""

    y: Float[Array, ""]
    pi: Float[Array, " n"]
    tau: Float[Array, " n"]
    sigma: Float[Array, " n"]


class Problem(eqx.Module):
    """What DLL asks of a family of problems of one size.

    Raises:
        ValueError: `m` or `n` is not positive.
    """

    m: int
    """How many numbers the network predicts."""
    n: int
    """Items, or variables."""

    def __check_init__(self):
        for name in ("m", "n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {name} = {getattr(self, name)}")

    @property
    def width(self) -> int:
        """The number of hidden units of the paper's network."""
        return 2 * (self.m + self.n)

    @property
    def like(self) -> PyTree:
        """The shapes of an instance."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it does not say what an instance is like")

    def scale(self, x: PyTree) -> tuple[PyTree, Array, Array]:
        """The instance on the scale of 1, and what turns its y and its bound into those of `x`, by multiplication."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `scale`")

    def features(self, x: PyTree) -> Float[Array, " f"]:
        """What the network sees of a scaled instance."""
        return jnp.concatenate([jnp.ravel(leaf) for leaf in x])

    def project(self, raw: Float[Array, " m"]) -> Float[Array, "..."]:
        """The dual cone: y from any numbers."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `project`")

    def complete(self, x: PyTree, y: Float[Array, "..."]) -> PyTree:
        """The best dual solution with this y."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `complete`")

    def value(self, x: PyTree, duals: PyTree) -> Float[Array, ""]:
        """The dual objective."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: it defines no `value`")


class BoundedLP(Problem):
    """Linear programmes with bounded variables, `LPInstance`: y ≥ 0. Bounds must be finite."""

    @property
    def like(self):
        n, m = jnp.zeros(self.n), jnp.zeros(self.m)
        return LPInstance(n, jnp.zeros((self.m, self.n)), m, n, n)

    def scale(self, x):
        one = jnp.abs(x.c).max()
        return x._replace(c=x.c / one), jnp.full(self.m, one), one

    def project(self, raw):
        return jax.nn.softplus(raw)

    def complete(self, x, y):
        return LPDuals(y, *lp_completion(x.c, x.A, y))

    def value(self, x, duals):
        return x.b @ duals.y + x.l @ duals.z_l - x.u @ duals.z_u


class Knapsack(Problem):
    """Knapsacks with n items and m capacities, `KnapsackInstance`: y ≤ 0.

    `sample` draws as the paper does: weights 0 … 1000, values the mean weight of the item and up to 100 more,
    capacities the share `tightness` of all weights.
    """

    @property
    def like(self):
        return jax.eval_shape(self.sample, jax.random.PRNGKey(0))

    def sample(self, key: PRNGKeyArray, tightness: float | Float[Array, ""] = 0.25) -> KnapsackInstance:
        weights, values = jax.random.split(key)
        W = jax.random.randint(weights, (self.m, self.n), 0, 1001).astype(jnp.float32)
        p = jnp.round(W.mean(0) + 100 * jax.random.uniform(values, (self.n,)))
        return KnapsackInstance(p, jnp.round(tightness * W.sum(1)), W)

    def scale(self, x):
        # The order of items means nothing to y. Sorted by value for weight, there is but one for the network to learn.
        top, W = x.p.max(), x.W / x.b[:, None]
        items = _sorted(x.p / jnp.maximum(W.sum(0), 1e-12), jnp.concatenate([x.p[None] / top, W]))
        return KnapsackInstance(items[0], jnp.ones(self.m), items[1:]), top / x.b, top

    def features(self, x):
        total = x.W.sum(1, keepdims=True)  # inputs around 0: otherwise what all instances share drowns the rest
        return jnp.concatenate([2 * x.p - 1, (self.n * x.W / total - 1).ravel(), 1 / total[:, 0]])

    def project(self, raw):
        return -jax.nn.softplus(raw)

    def complete(self, x, y):
        return LPDuals(y, *knapsack_completion(x.p, x.W, y))

    def value(self, x, duals):
        return x.b @ duals.y - duals.z_u.sum()


class Planning(Problem):
    """Production planning with one resource, `PlanningInstance`: a second-order cone programme, y ≤ 0.

    `Planning(1, n)`. `sample` draws as the paper does.

    Raises:
        ValueError: `m` is not 1.
    """

    def __check_init__(self):
        if self.m != 1:
            raise ValueError(f"planning has one resource and so one dual to predict, got m = {self.m}")

    @property
    def width(self):
        return max(128, 4 * self.n)

    @property
    def like(self):
        return jax.eval_shape(self.sample, jax.random.PRNGKey(0))

    def sample(self, key: PRNGKeyArray) -> PlanningInstance:
        def draw(i, low, high, shape=(self.n,)):
            return jax.random.uniform(jax.random.fold_in(key, i), shape, minval=low, maxval=high)

        demand, cost, rate = draw(0, 1.0, 100.0), draw(1, 1.0, 10.0), draw(2, 0.05, 2.0)
        order, resource = draw(3, 0.1, 1.5) * cost, draw(4, 0.1, 2.0) * cost
        return PlanningInstance(cost * rate / 2, order * demand, resource, draw(5, 0.25, 0.75, ()) * resource.sum())

    def scale(self, x):
        unit = x.b / x.r.sum()  # x = unit uses all of the resource
        d, e, r = unit * x.d, x.e / unit, x.r / x.r.sum()
        one = (d + e).mean()
        d, e, r = _sorted(r * (e / d) ** 0.5, jnp.stack([d / one, e / one, r]))  # by what each uses where that is free
        return PlanningInstance(d, e, r, jnp.ones(())), one / x.b, one

    def features(self, x):
        return jnp.concatenate([jnp.log(x.d), jnp.log(x.e), self.n * x.r - 1])

    def project(self, raw):
        return -jax.nn.softplus(raw[0])

    def complete(self, x, y):
        return PlanningDuals(y, *rsoc_completion(x.d, x.e, x.r, y))

    def value(self, x, duals):
        return x.b * duals.y - 2**0.5 * duals.sigma.sum()


def _sorted(by: Float[Array, " n"], items: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """The columns in order of `by`. On a CPU, comparing a hundred numbers each with each is quicker than a sort."""
    i = jnp.arange(by.shape[0])
    rank = ((by < by[:, None]) | ((by == by[:, None]) & (i < i[:, None]))).sum(1)
    return jnp.zeros_like(items.T).at[rank].set(items.T).T


class Bounded(NamedTuple):
    """An answer: no solution of the instance costs less than `bound`."""

    bound: Float[Array, ""]
    duals: PyTree


class DLL(Cell):
    """An instance in, a bound and a dual solution out: `step((), x) -> ((), Bounded)`, or `model(x)`.

    Feasible up to rounding whatever the weights are. `start` (m,) are duals, on the scale of 1, that the untrained
    network answers with whatever it sees.

    Raises:
        ValueError: `start` is not of the cone.
    """

    problem: Problem
    net: eqx.nn.MLP

    def __init__(self, problem: Problem, *, width: int | None = None, start=None, key: PRNGKeyArray):
        self.problem = problem
        self.net = network(problem, problem.m, width, key)
        if start is not None:
            size = jnp.abs(jnp.atleast_1d(jnp.asarray(start, jnp.float32)))
            raw = jnp.log(jnp.expm1(jnp.maximum(size, 1e-6)))
            if not jnp.allclose(problem.project(raw), jnp.asarray(start), atol=1e-4):
                raise ValueError(f"start must lie in the dual cone, got {start}")
            last = lambda net: (net.layers[-1].weight, net.layers[-1].bias)
            self.net = eqx.tree_at(last, self.net, (0.1 * self.net.layers[-1].weight, raw))

    def init(self, *, key=None):
        return ()

    def step(self, state, x):
        return state, self(x)

    def offline(self, xs):
        return jax.vmap(self)(xs)

    def scaled(self, x: PyTree) -> tuple[PyTree, Float[Array, ""], Float[Array, ""]]:
        """The predicted y in units of `x`, the bound on the scale of 1, and that scale."""
        unit, y_scale, scale = self.problem.scale(x)
        y = self.problem.project(self.net(self.problem.features(unit)))
        return y * y_scale, self.problem.value(unit, self.problem.complete(unit, y)), scale

    def __call__(self, x: PyTree) -> Bounded:
        y, value, scale = self.scaled(x)
        return Bounded(scale * value, self.problem.complete(x, y))


def network(problem: Problem, outputs: int, width: int | None, key: PRNGKeyArray) -> eqx.nn.MLP:
    """Two hidden layers on the features of a problem."""
    x = jax.eval_shape(lambda x: problem.features(problem.scale(x)[0]), problem.like)
    width = problem.width if width is None else width
    return eqx.nn.MLP(x.shape[0], outputs, width, 2, jax.nn.silu, key=key)


def dual_loss(model: DLL, xs: PyTree, key: PRNGKeyArray) -> Float[Array, ""]:
    """Minus the mean bound of a batch, on the scale of 1: for `anabranch.fit.fit`."""
    return -jax.vmap(lambda x: model.scaled(x)[1])(xs).mean()


class OnlineState(NamedTuple):
    """The network that answers now, and its optimiser."""

    model: PyTree
    opt: PyTree


class OnlineDLL(Learner):
    """DLL that learns from every instance, for streams whose instances change. Targets mean nothing: there are none."""

    model: DLL
    optimizer: optax.GradientTransformation = eqx.field(static=True)

    def init(self, *, key=None):
        weights = eqx.filter(self.model, eqx.is_inexact_array)
        return OnlineState(weights, self.optimizer.init(weights))

    def now(self, state: OnlineState) -> DLL:
        """The model as it is now."""
        return eqx.combine(state.model, self.model)

    def predict(self, state, x):
        return self.now(state)(x)

    def learn(self, state, x, target=None, weight=1.0):
        def cost(weights):
            return -jnp.asarray(weight) * eqx.combine(weights, self.model).scaled(x)[1]

        updates, opt = self.optimizer.update(jax.grad(cost)(state.model), state.opt, state.model)
        return OnlineState(eqx.apply_updates(state.model, updates), opt)


def example() -> tuple[DLL, KnapsackInstance]:
    """Bounds of 32 small knapsacks."""
    problem = Knapsack(2, 8)
    xs = jax.vmap(problem.sample)(jax.random.split(jax.random.PRNGKey(1), 32))
    return DLL(problem, key=jax.random.PRNGKey(0)), xs
