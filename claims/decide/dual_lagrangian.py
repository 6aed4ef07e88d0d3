"""Networks that predict dual solutions give valid bounds, close to the optimum, far faster than a solver.

Knapsacks with (5, 50) and (10, 100) capacities and items, production planning with 10 and 50 items, drawn as in the
paper; all instances of training are fresh. Baselines: DC3 with the same steps, batches and rate; the average of optimal
duals, for all instances; the dual of the average instance. Optima by HiGHS, and by bisection for planning.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from jaxtyping import Array

from anabranch.cell import Event, Maybe
from anabranch.claim import Comparison, Size
from anabranch.decide.dual_lagrangian import (
    DLL,
    Knapsack,
    KnapsackInstance,
    OnlineDLL,
    Planning,
    PlanningInstance,
    Problem,
    dual_loss,
    network,
)
from anabranch.drive import scan
from anabranch.fit import fit

try:
    import clarabel
    import highspy
    import scs
except ImportError as error:
    raise ImportError(f"{error}; the solvers are not there: pip install clarabel highspy scs") from None

FIRST_SEED = 100  # those below were used to choose rates and steps
PAPER = "gaps under 0.5 % on average, 1000 x faster than interior-point solvers (GPU)"
BATCH, RATE, ONLINE_RATE = 64, 2e-3, 3e-4
CORRECTION = 0.01
"""Of DC3, the best of 0.001, 0.01 and 0.1 on both problems."""


# Optima


def knapsack_optimum(x: KnapsackInstance) -> tuple[float, np.ndarray]:
    """The optimum and the duals of the capacities, by HiGHS on one thread."""
    p, b, W = (np.asarray(leaf, float) for leaf in x)
    m, n = W.shape
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, m
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = -p, np.zeros(n), np.ones(n)
    lp.row_lower_, lp.row_upper_ = np.full(m, -highspy.kHighsInf), b
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = m * np.arange(n + 1), np.tile(np.arange(m), n)
    lp.a_matrix_.value_ = W.T.ravel()
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.passModel(lp)
    solver.run()
    return solver.getInfo().objective_function_value, np.array(solver.getSolution().row_dual)


def planning_optimum(x: PlanningInstance) -> tuple[float, np.ndarray]:
    """The optimum and the dual of the capacity: the dual objective is concave in one number."""
    d, e, r, b = (np.asarray(leaf, float) for leaf in x)
    low, high = -1.0, 0.0

    def slope(y):
        return b - (r * np.sqrt(e / (d - r * y))).sum()

    if slope(0.0) >= 0:
        return 2 * np.sqrt(d * e).sum(), np.zeros(1)
    while slope(low) < 0:
        low *= 2
    for _ in range(100):
        y = (low + high) / 2
        low, high = (y, high) if slope(y) > 0 else (low, y)
    return b * y + 2 * np.sqrt((d - r * y) * e).sum(), np.array([y])


def cone_form(x: PlanningInstance) -> tuple:
    """Cost, A and side of A v + s = side for v = (x, t), with s ≥ 0 in row 0 and (x + t, x - t, 2) in n cones."""
    d, e, r, b = (np.asarray(leaf, float) for leaf in x)
    n = len(d)
    eye, zero = scipy.sparse.identity(n), scipy.sparse.csr_matrix((n, n))
    rows = scipy.sparse.vstack([scipy.sparse.hstack(row) for row in ([eye, eye], [eye, -eye], [zero, zero])])
    rows = rows.tocsr()[np.arange(3 * n).reshape(3, n).T.ravel()]
    top = scipy.sparse.csr_matrix(np.concatenate([r, np.zeros(n)])[None])
    side = np.concatenate([[b], np.tile([0.0, 0.0, 2.0], n)])
    return np.concatenate([d, e]), scipy.sparse.vstack([top, -rows]).tocsc(), side


def planning_by_clarabel(x: PlanningInstance) -> float:
    """The optimum by an interior-point solver."""
    cost, A, side = cone_form(x)
    cones = [clarabel.NonnegativeConeT(1)] + [clarabel.SecondOrderConeT(3)] * (len(cost) // 2)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    nothing = scipy.sparse.csc_matrix((len(cost), len(cost)))
    return clarabel.DefaultSolver(nothing, cost, A, side, cones, settings).solve().obj_val


def planning_by_scs(x: PlanningInstance) -> float:
    """The optimum by a first-order solver, to its default precision."""
    cost, A, side = cone_form(x)
    cone = {"l": 1, "q": [3] * (len(cost) // 2)}
    return scs.SCS({"A": A, "b": side, "c": cost}, cone, verbose=False).solve()["info"]["pobj"]


def optimum(x) -> tuple[float, np.ndarray]:
    return knapsack_optimum(x) if isinstance(x, KnapsackInstance) else planning_optimum(x)


def rows(xs) -> list:
    """The instances of a batch, on the host."""
    xs = jax.tree.map(np.asarray, xs)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], xs) for i in range(len(jax.tree.leaves(xs)[0]))]


# The learned baseline


class DC3(eqx.Module):
    """Donti, Rolnick, Kolter: DC3 (ICLR 2021), on the dual as in the official code of DLL.

    The network predicts all but the last block of duals; that one follows from the equalities; ten gradient steps then
    reduce the violation of inequalities, and what is left is punished in training.
    """

    problem: Problem
    net: eqx.nn.MLP
    size: float
    """Of a correction."""

    def violation(self, unit, given):
        """The squared violations of all inequalities."""
        if isinstance(self.problem, Knapsack):
            y, z_l = given
            return sum((jnp.maximum(v, 0) ** 2).sum() for v in (y, -z_l, -self.upper(unit, given)))
        y, sigma = given
        pi = unit.d - unit.r * y
        return sum((jnp.maximum(v, 0) ** 2).sum() for v in (y, -pi, sigma**2 - 2 * pi * unit.e))

    def upper(self, unit, given):
        return unit.p + unit.W.T @ given[0] + given[1]

    def __call__(self, unit):
        """The corrected prediction for a scaled instance."""
        raw = self.net(self.problem.features(unit))
        m = self.problem.m
        given = (raw[:m] if isinstance(self.problem, Knapsack) else raw[0]), raw[m:]

        def correct(given, _):
            slopes = jax.grad(lambda given: self.violation(unit, given))(given)
            return jax.tree.map(lambda v, g: v - self.size * g, given, slopes), None

        return jax.lax.scan(correct, given, length=10)[0]

    def objective(self, unit):
        """The dual objective, less 10 times the violation."""
        given = self(unit)
        if isinstance(self.problem, Knapsack):
            value = unit.b @ given[0] - self.upper(unit, given).sum()
        else:
            value = unit.b * given[0] - 2**0.5 * given[1].sum()
        return value - 10 * self.violation(unit, given)

    def bound(self, x):
        """A valid bound: y is clipped to its cone and completed as in DLL. And the violation before."""
        unit, _, scale = self.problem.scale(x)
        given = self(unit)
        y = jnp.minimum(given[0], 0)
        return scale * self.problem.value(unit, self.problem.complete(unit, y)), self.violation(unit, given)


def dc3_loss(model: DC3, xs, key):
    return -jax.vmap(lambda x: model.objective(model.problem.scale(x)[0]))(xs).mean()


# Training and testing


def trained(loss, model, problem, steps: int, key):
    def batch(key, i):
        return jax.vmap(problem.sample)(jax.random.split(key, BATCH))

    return fit(loss, model, batch, optax.adam(optax.cosine_decay_schedule(RATE, steps)), steps, key=key)[0]


class Tested(NamedTuple):
    """Mean gaps in per cent of |z*|, and what else was found on the test instances of a seed."""

    dll: float
    dc3: float
    constant: float
    average: float
    violation: float
    """The largest violation of the dual equalities, relative to the terms in them; in float64."""
    excess: float
    """The most by which a bound is above the optimum, relative to it."""
    dc3_feasible: float
    """The share of DC3's answers that violate nothing by more than 1e-6."""
    model: DLL
    xs: Array


def violation(x, duals) -> float:
    """The largest relative violation of dual equalities, signs and cones."""
    x, duals = jax.tree.map(lambda leaf: np.asarray(leaf, float), (x, duals))
    if isinstance(x, KnapsackInstance):
        wide = np.abs(x.W.T @ duals.y) + x.p
        gap = np.abs(x.W.T @ duals.y + duals.z_l - duals.z_u + x.p) / wide
        signs = [duals.y, -duals.z_l, -duals.z_u]
    else:
        gap = np.abs(duals.pi - (x.d - x.r * duals.y)) / (x.d + np.abs(x.r * duals.y))
        gap = np.maximum(gap, (duals.sigma**2 - 2 * duals.pi * duals.tau).clip(0) / duals.sigma**2)
        signs = [duals.y, -duals.pi, -duals.tau, np.abs(duals.tau - x.e)]
    return max(gap.max(), max(v.max() for v in signs))


def tested(problem: Problem, size: Size, seed: int, steps: int, tests: int) -> Tested:
    key = jax.random.PRNGKey(FIRST_SEED + seed)
    train, test = (jax.random.fold_in(key, i) for i in range(2))
    draw = jax.jit(lambda key, n: jax.vmap(problem.sample)(jax.random.split(key, n)), static_argnums=1)
    known, xs = draw(train, tests), draw(test, tests)
    duals = np.stack([optimum(x)[1] for x in rows(known)])
    scales = np.asarray(jax.jit(jax.vmap(lambda x: problem.scale(x)[1]))(known))
    constant = (duals / scales.reshape(tests, -1)).mean(0)
    middle = optimum(jax.tree.map(lambda leaf: np.asarray(leaf, float).mean(0), known))[1]

    start = constant if isinstance(problem, Knapsack) else constant[0]
    ours = DLL(problem, start=start, key=train)
    outputs = problem.m + problem.n
    theirs = DC3(problem, network(problem, outputs, 2 * problem.width, train), CORRECTION)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(trained, loss, model, problem, steps, train)
            for loss, model in ((dual_loss, ours), (dc3_loss, theirs))
        ]
        ours, theirs = (job.result() for job in jobs)

    z = np.array([optimum(x)[0] for x in rows(xs)])
    answers = eqx.filter_jit(eqx.filter_vmap(ours, in_axes=0))(xs)
    other, violated = eqx.filter_jit(lambda model, xs: jax.vmap(model.bound)(xs))(theirs, xs)

    def fixed(y, scaled):
        def bound(x):
            unit, unit_y, scale = problem.scale(x)
            y_unit = jnp.asarray(y, jnp.float32) / (1.0 if scaled else unit_y)
            return scale * problem.value(unit, problem.complete(unit, y_unit))

        return jax.jit(jax.vmap(bound))(xs)

    def gap(bounds):
        return float(100 * ((z - np.asarray(bounds, float)) / np.abs(z)).mean())

    worst = max(violation(x, answer.duals) for x, answer in zip(rows(xs), rows(answers)))
    middle = middle if isinstance(problem, Knapsack) else middle[0]
    return Tested(
        gap(answers.bound), gap(other), gap(fixed(start, True)), gap(fixed(middle, False)), worst,
        float(((np.asarray(answers.bound, float) - z) / np.abs(z)).max()),
        float((np.asarray(violated) <= 1e-12).mean()), ours, xs,
    )  # fmt: skip


# Streams that change, and speed


def shifted(model: DLL, size: Size, seed: int) -> tuple[float, float]:
    """Mean gaps in per cent, online and frozen, on the last fifth of a stream whose capacities double half-way."""
    problem, events = model.problem, 200 if size.smoke else 4000
    assert isinstance(problem, Knapsack)
    keys = jax.random.split(jax.random.PRNGKey(FIRST_SEED + seed + 50), events)
    tightness = jnp.where(jnp.arange(events) < events // 2, 0.25, 0.5)
    xs = jax.jit(jax.vmap(problem.sample))(keys, tightness)
    learner = OnlineDLL(model, optax.adam(ONLINE_RATE))
    online = scan(learner, Event(xs, Maybe((), jnp.ones(events, bool)), jnp.ones(events)))[1].bound
    frozen = eqx.filter_jit(eqx.filter_vmap(model, in_axes=0))(xs).bound
    last = slice(events - events // 5, events)
    z = np.array([optimum(x)[0] for x in rows(jax.tree.map(lambda leaf: leaf[last], xs))])
    online, frozen = (100 * ((z - np.asarray(b, float)[last]) / np.abs(z)).mean() for b in (online, frozen))
    return float(online), float(frozen)


def speed(model: DLL, xs, solve, name: str, smoke: bool) -> Comparison:
    """Instances a second, ten times: a compiled batch of 512, against the solver on one after the other."""
    xs = jax.tree.map(lambda leaf: jnp.resize(leaf, (512, *leaf.shape[1:])), xs)
    run = eqx.filter_jit(eqx.filter_vmap(model, in_axes=0))
    jax.block_until_ready(run(xs))
    instances, ours, theirs = rows(xs)[: 4 if smoke else 32], [], []
    for _ in range(2 if smoke else 10):
        start = time.perf_counter()
        for _ in range(20):
            jax.block_until_ready(run(xs))
        ours.append(20 * 512 / (time.perf_counter() - start))
        start = time.perf_counter()
        for x in instances:
            solve(x)
        theirs.append(len(instances) / (time.perf_counter() - start))
    note = f"{1e6 / np.median(ours):.2f} us an instance, {name} {1e6 / np.median(theirs):.0f} us; no commercial solver"
    if isinstance(model.problem, Planning):
        start = time.perf_counter()
        for x in instances:
            planning_by_scs(x)
        note += f"; SCS {1e6 * (time.perf_counter() - start) / len(instances):.0f} us"
    return Comparison(
        f"instances a second, {label(model.problem)} ({name})", ours, theirs, 100.0, kind="ratio", note=note
    )


def label(problem: Problem) -> str:
    return f"knapsack ({problem.m}, {problem.n})" if isinstance(problem, Knapsack) else f"planning {problem.n}"


def experiment(size: Size) -> list[Comparison]:
    # problem, seeds, steps of training, threshold of the mean gap
    plan = [(Knapsack(5, 50), 3, 3000, 1.2), (Knapsack(10, 100), 1, 2500, 1.2)]
    plan += [(Planning(1, n), 3, 2000, 0.5) for n in (10, 50)]
    if size.smoke:
        plan = [(Knapsack(2, 8), 1, 20, 1.2)]
    out, drift = [], []
    for problem, seeds, steps, limit in plan:
        found = [tested(problem, size, seed, steps, 16 if size.smoke else 256) for seed in size.seeds(seeds)]
        name, zero = label(problem), [0.0] * len(found)
        dll, dc3, constant = ([getattr(t, field) for t in found] for field in ("dll", "dc3", "constant"))
        note = (
            f"the dual of the average instance: {np.mean([t.average for t in found]):.2f} %; largest excess of a bound "
            f"over the optimum {max(t.excess for t in found):.1e}; answers of DC3 that are feasible before they are "
            f"clipped: {100 * np.mean([t.dc3_feasible for t in found]):.0f} %"
        )
        lower = {"better": "lower", "paper": PAPER}
        out += [
            Comparison(f"gap, %, {name} (none)", dll, zero, limit, note=note, **lower),
            Comparison(f"gap, {name} (average of optimal duals)", dll, constant, 0.5, kind="ratio", **lower),
            Comparison(f"gap, {name} (DC3, clipped and completed)", dll, dc3, 1.0, kind="ratio", **lower),
            Comparison(f"largest violation, {name} (none)", [t.violation for t in found], zero, 1e-6, better="lower"),
        ]
        solve, solver = (
            (knapsack_optimum, "HiGHS") if isinstance(problem, Knapsack) else (planning_by_clarabel, "Clarabel")
        )
        out.append(speed(found[0].model, found[0].xs, solve, solver, size.smoke))
        if not drift:
            drift = [shifted(t.model, size, seed) for seed, t in enumerate(found)]
    online, frozen = zip(*drift)
    out.append(Comparison("gap after a shift, online (frozen)", online, frozen, 0.5, kind="ratio", better="lower"))
    return out
