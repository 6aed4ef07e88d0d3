"""Bounds that are valid whatever the network is, tight at optimal duals, and better once it has been trained."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linprog

from anabranch.cell import Event, Maybe
from anabranch.contract import check
from anabranch.decide.dual_lagrangian import (
    DLL,
    BoundedLP,
    Knapsack,
    LPInstance,
    OnlineDLL,
    Planning,
    cone_project,
    dual_loss,
    example,
    knapsack_completion,
    lp_completion,
    rsoc_completion,
)
from anabranch.drive import scan
from anabranch.fit import fit


def batch(problem, n, seed=0, **options):
    return jax.vmap(lambda key: problem.sample(key, **options))(jax.random.split(jax.random.PRNGKey(seed), n))


def host(xs):
    xs = jax.tree.map(lambda leaf: np.asarray(leaf, float), xs)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], xs) for i in range(len(xs[0]))]


@eqx.filter_jit
def answers(model, xs):
    return jax.vmap(model)(xs)


def relaxed(x):
    """The optimum of a knapsack and its duals."""
    found = linprog(-x.p, A_ub=x.W, b_ub=x.b, bounds=(0, 1))
    return found.fun, found.ineqlin.marginals


def bisection(x):
    low, high = -1e6, 0.0
    for _ in range(200):
        y = (low + high) / 2
        low, high = (y, high) if x.b > (x.r * np.sqrt(x.e / (x.d - x.r * y))).sum() else (low, y)
    return high


def test_bounds_are_tight_at_optimal_duals():
    """Strong duality, in float64."""
    problem = Knapsack(3, 12)
    for x in host(batch(problem, 20)):
        best, y = relaxed(x)
        z_l, z_u = knapsack_completion(x.p, x.W, y)
        np.testing.assert_allclose(x.b @ y - z_u.sum(), best, rtol=1e-9)
        np.testing.assert_allclose(x.W.T @ y + z_l - z_u, -x.p, atol=1e-9)
        assert (z_l >= 0).all() and (z_u >= 0).all()
    draw = np.random.default_rng(0)
    for _ in range(20):
        A, c, l = draw.normal(size=(3, 8)), draw.normal(size=8), draw.normal(size=8)
        u = l + draw.uniform(size=8)
        b = A @ (l + u) / 2 - 0.1
        found = linprog(c, A_ub=-A, b_ub=-b, bounds=np.stack([l, u], axis=1))
        y = -found.ineqlin.marginals
        z_l, z_u = lp_completion(c, A, y)
        np.testing.assert_allclose(b @ y + l @ z_l - u @ z_u, found.fun, rtol=1e-9)


def test_planning_equals_interior_point_solvers():
    from anabranch.claim import load

    for solver in ("clarabel", "highspy", "scs"):
        pytest.importorskip(solver)
    claim = load("dual_lagrangian")[1]
    for x in host(batch(Planning(1, 6), 5)):
        y = bisection(x)
        pi, tau, sigma = rsoc_completion(x.d, x.e, x.r, y)
        bound = x.b * y - 2**0.5 * sigma.sum()
        np.testing.assert_allclose(bound, claim.planning_by_clarabel(x), rtol=1e-6)
        np.testing.assert_allclose(bound, claim.planning_optimum(x)[0], rtol=1e-9)
        np.testing.assert_allclose(2 * pi * tau, sigma**2)
        np.testing.assert_allclose(bound, claim.planning_by_scs(x), rtol=1e-4)
    for x in host(batch(Knapsack(3, 12), 5)):
        best, duals = claim.knapsack_optimum(x)
        np.testing.assert_allclose(best, relaxed(x)[0], rtol=1e-9)
        np.testing.assert_allclose(duals, relaxed(x)[1], atol=1e-9)


@pytest.mark.parametrize("problem", [Knapsack(4, 15), Planning(1, 15), BoundedLP(3, 10)])
def test_untrained_bounds_are_valid(problem):
    if isinstance(problem, BoundedLP):
        draw = np.random.default_rng(0)
        A, l = draw.normal(size=(50, 3, 10)), draw.normal(size=(50, 10))
        u = l + draw.uniform(0, 2, size=(50, 10))
        given = draw.normal(size=(50, 10)) * 100, A, np.einsum("sij,sj->si", A, (l + u) / 2) - 0.1, l, u
        xs = LPInstance(*(jnp.asarray(v, jnp.float32) for v in given))
        best = [linprog(x.c, A_ub=-x.A, b_ub=-x.b, bounds=np.stack([x.l, x.u], 1)).fun for x in host(xs)]
    else:
        xs = batch(problem, 50)
        best = [relaxed(x)[0] if isinstance(problem, Knapsack) else bisection(x) for x in host(xs)]
        if isinstance(problem, Planning):
            best = [x.b * y + 2 * np.sqrt((x.d - x.r * y) * x.e).sum() for x, y in zip(host(xs), best)]
    best = np.array(best)
    gaps = []
    for seed in range(5):
        model = DLL(problem, key=jax.random.PRNGKey(seed))
        model = jax.tree.map(lambda leaf: 5 * leaf if hasattr(leaf, "shape") else leaf, model)
        answer = jax.tree.map(lambda leaf: np.asarray(leaf, float), answers(model, xs))
        assert (answer.bound <= best + 1e-5 * np.abs(best)).all()
        gaps.append(best - answer.bound)
        # The value of the duals that come with it, recomputed in float64, is the bound.
        for x, b, duals in zip(host(xs), answer.bound, host(answer.duals)):
            np.testing.assert_allclose(problem.value(x, duals), b, rtol=1e-4)
            sign = 1 if isinstance(problem, BoundedLP) else -1
            assert (sign * np.asarray(duals.y) >= 0).all()
    assert np.std(gaps) > 0


def test_scaling_and_the_order_of_items_do_not_matter():
    def bounds(problem, *xs):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *xs)
        return np.asarray(answers(DLL(problem, key=jax.random.PRNGKey(0)), stacked).bound)

    problem, order = Knapsack(3, 12), np.random.default_rng(0).permutation(12)
    x = problem.sample(jax.random.PRNGKey(1))
    permuted, heavier = x._replace(p=x.p[order], W=x.W[:, order]), x._replace(b=4 * x.b, W=4 * x.W)
    found = bounds(problem, x, permuted, heavier, x._replace(p=8 * x.p))
    np.testing.assert_allclose(found, found[0] * np.array([1, 1, 1, 8]), rtol=1e-5)
    problem = Planning(1, 12)
    x = problem.sample(jax.random.PRNGKey(1))
    other = x._replace(d=4 * x.d, e=x.e / 4, r=4 * x.r)  # x in units four times as large
    found = bounds(problem, x, other)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_training_closes_the_gap_and_start_is_where_it_begins():
    problem, xs = Knapsack(2, 10), batch(Knapsack(2, 10), 64)
    best, duals = map(np.array, zip(*map(relaxed, host(xs))))
    scales = np.asarray(jax.vmap(lambda x: problem.scale(x)[1])(xs))
    constant = (duals / scales).mean(0)
    before = DLL(problem, start=constant, key=jax.random.PRNGKey(0))

    def gap(model):
        return float(((best - answers(model, xs).bound) / np.abs(best)).mean())

    @jax.jit
    @jax.vmap
    def fixed(x):
        unit, _, one = problem.scale(x)
        return one * problem.value(unit, problem.complete(unit, jnp.asarray(constant)))

    assert abs(gap(before) - ((best - fixed(xs)) / np.abs(best)).mean()) < 0.01
    sample = lambda key, i: jax.vmap(problem.sample)(jax.random.split(key, 32))
    after, _ = fit(dual_loss, before, sample, optax.adam(3e-3), 300, key=jax.random.PRNGKey(1))
    assert gap(after) < 0.4 * gap(before)


def test_online_follows_a_shift():
    problem, n = Knapsack(2, 10), 600
    learner = OnlineDLL(DLL(problem, key=jax.random.PRNGKey(0)), optax.adam(3e-3))
    xs = batch(problem, n, tightness=0.5)
    best = np.array([relaxed(x)[0] for x in host(jax.tree.map(lambda leaf: leaf[-100:], xs))])
    state, given = scan(learner, Event(xs, Maybe((), jnp.ones(n, bool)), jnp.ones(n)))
    gap = ((best - given.bound[-100:]) / np.abs(best)).mean()
    frozen = ((best - answers(learner.model, xs).bound[-100:]) / np.abs(best)).mean()
    assert 0 < gap < 0.5 * frozen
    np.testing.assert_allclose(answers(learner.now(state), xs).bound[-1], given.bound[-1], rtol=1e-2)


def test_projections():
    """Idempotent, in the cone, and nearest: what is cut off is orthogonal to what is left (Moreau)."""
    draw = np.random.default_rng(0)
    soc, psd = (jax.jit(lambda v, cone=cone: cone_project(v, cone)) for cone in ("second_order", "psd"))
    radial = jax.jit(lambda v: cone_project(v, "second_order", radial=True))
    for _ in range(30):
        v = draw.normal(size=4).astype(np.float32)
        p = np.asarray(soc(v))
        assert np.linalg.norm(p[1:]) <= p[0] + 1e-5
        np.testing.assert_allclose(soc(p), p, atol=1e-5)
        np.testing.assert_allclose(p @ (v - p), 0.0, atol=1e-4)
        assert np.linalg.norm((p - v)[1:]) <= (p - v)[0] + 1e-5
        q = np.asarray(radial(v))
        assert np.linalg.norm(q[1:]) <= q[0] + 1e-5 and q[0] == max(v[0], 0.0)
        M = draw.normal(size=(3, 3)).astype(np.float32)
        P = np.asarray(psd(M))
        assert np.linalg.eigvalsh(P).min() > -1e-5
        np.testing.assert_allclose((P * ((M + M.T) / 2 - P)).sum(), 0.0, atol=1e-4)
    assert jnp.isfinite(jax.grad(lambda v: cone_project(v, "second_order").sum())(jnp.zeros(4))).all()
    assert cone_project(jnp.array([-1.0, 2.0]), "nonnegative").tolist() == [0.0, 2.0]


def test_contract():
    report = check(*example(), key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: cone_project(jnp.zeros(3), "cube"), "cone.*cube"),  # pyright: ignore
        (lambda: DLL(Knapsack(2, 3), start=[1.0, -1.0], key=jax.random.PRNGKey(0)), "start.*1.0"),
        (lambda: Knapsack(0, 3), "m = 0"),
        (lambda: Planning(2, 3), "m = 2"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
