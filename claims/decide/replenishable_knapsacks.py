"""One primal-dual template for resources that refill: √T regret on stationary streams, a fixed share of the optimum on
adversarial ones.

A. Stationary: five arms, three pairs of refill and budget; regret to the fluid optimum, and how it grows.
B. Adversarial: traps in two phases, where what is cheap becomes dear, or what pays little comes to pay much.
C. Real demand: seconds of an LLM service, tokens as credit that refills; the action is the share that is served.
"""

import csv
from datetime import datetime
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from anabranch import data
from anabranch.claim import Comparison, Size
from anabranch.decide.base import CumReward, Static
from anabranch.decide.baselines import Ending, Greedy
from anabranch.decide.budget import Budget, BudgetedDice, BudgetedTrace, BudgetRegret, Spent
from anabranch.decide.minimizers import Exp3, Hedge
from anabranch.decide.optimum import fluid
from anabranch.decide.rates import Estimate, competitive_ratio, slope
from anabranch.decide.replenishable_knapsacks import BwRK, token_bucket
from anabranch.drive import play

FIRST_SEED = 100  # those below were used while writing
REWARDS = [0.0, 0.9, 0.6, 0.4, 0.3]
PAIRS = [(0.2, 0.05), (0.2, 0.2), (0.0, 0.2)]
"""β, what doing nothing refills, and ρ, the budget a round."""


def costs(beta: float) -> list[list[float]]:
    return [[-beta], [0.9], [0.5], [0.1], [-0.1]]


def keys(seeds) -> jax.Array:
    return jnp.stack([jax.random.PRNGKey(FIRST_SEED + seed) for seed in seeds])


# A. Stationary


@eqx.filter_jit
def stationary(reveal: str, horizon: int, table, beta, rho, best, keys):
    """Regret (pairs, seeds), and the least that ever was left."""

    def one(table, beta, rho, best, key):
        world = BudgetedDice(REWARDS, table, reveal)  # pyright: ignore
        primal = {"full": Hedge, "bandit": Exp3}[reveal](len(REWARDS))
        policy = BwRK(primal, Budget(rho * horizon, horizon), beta)
        meters = {"regret": BudgetRegret(best, world), "spent": Spent(policy.budget)}
        scores = play(policy, world, horizon, key=key, meters=meters, keep=False).scores
        return scores["regret"], scores["spent"].lowest

    seeds = jax.vmap(one, (None, None, None, None, 0))
    return jax.vmap(seeds, (0, 0, 0, 0, None))(table, beta, rho, best, keys)


def rates(size: Size) -> list[Comparison]:
    pairs = PAIRS[:1] if size.smoke else PAIRS
    horizons = [1000, 2000] if size.smoke else [2000, 8000, 32_000, 128_000]
    longer = [] if size.smoke else [512_000, 2_048_000]
    best = [fluid(REWARDS, costs(beta), [rho]).value for beta, rho in pairs]
    table = jnp.array([costs(beta) for beta, _ in pairs])
    beta, rho = jnp.array(pairs).T
    out, lowest = [], np.inf
    for reveal, limit in (("bandit", 0.75), ("full", 0.6))[: 1 if size.smoke else 2]:
        run = partial(stationary, reveal, table=table, beta=beta, rho=rho, best=jnp.array(best))
        found = [run(horizon, keys=keys(size.seeds(32))) for horizon in horizons]
        found += [run(horizon, keys=keys(size.seeds(8))) for horizon in longer]
        lowest = min([lowest] + [float(low.min()) for _, low in found])
        means = [np.asarray(regret, float) for regret, _ in found]
        for i, (b, r) in enumerate(pairs):
            fit = slope(horizons, np.stack([regret[i] for regret in means[: len(horizons)]], axis=1))
            note = f"optimum {best[i]:.3f} a round; mean regret " + ", ".join(
                f"{regret[i].mean():.0f} at T = {horizon}" for horizon, regret in zip(horizons + longer, means)
            )
            if longer:
                last = np.stack([regret[i, :8] for regret in means[-3:]], axis=1)
                note += f"; exponent of the last three {slope([*horizons[-1:], *longer], last)}"
            out.append(
                Comparison(
                    f"exponent of regret in T, {reveal} feedback, β = {b}, ρ = {r}",
                    fit.values,
                    np.zeros(len(fit.values)),
                    limit,
                    better="lower",
                    paper="order √T (theory, no experiments)",
                    note=note,
                )
            )
    out[0].note += f"; the least that was ever left of a budget in all runs: {lowest:.2g}"
    assert lowest >= 0, f"a budget was exceeded by {-lowest}"
    return out


# B. Adversarial


def traps(rounds: int) -> dict[str, tuple[float, float, np.ndarray, np.ndarray]]:
    """β, ρ, rewards (T, 3) and costs (T, 3, 1) of each; the arms are void, a tempting one, and a modest one."""
    early = (np.arange(rounds) < rounds // 2)[:, None]
    out = {}
    for beta, rho in ((0.0, 0.2), (0.2, 0.05)):
        kinds = {  # (rewards, costs) early, and late
            "cheap, then dear": (([0, 0.5, 0.2], [-beta, 0.1, 0.1]), ([0, 0.5, 0.2], [-beta, 1, 0.1])),
            "save, then spend": (([0, 0.05, 0.04], [-beta, 1, 0.3]), ([0, 1, 0.04], [-beta, 1, 0.3])),
        }
        for name, (first, second) in kinds.items():
            for order, (a, b) in (("", (first, second)), (", mirrored", (second, first))):
                rewards, cost = (np.where(early, a[i], b[i]) for i in (0, 1))
                out[f"{name}{order}, β = {beta}, ρ = {rho}"] = beta, rho, rewards, cost[:, :, None]
    return out


@eqx.filter_jit
def earned(policy, worlds, keys):
    """Reward (worlds, seeds), one policy for each world."""

    def one(policy, world, key):
        return play(policy, world, len(world.rewards), key=key, meters={"earned": CumReward()}, keep=False).scores[
            "earned"
        ]

    seeds = eqx.filter_vmap(one, in_axes=(None, None, 0))
    return eqx.filter_vmap(seeds, in_axes=(eqx.if_array(0), eqx.if_array(0), None))(policy, worlds, keys)


def stacked(items: list):
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *items)


def adversarial(size: Size) -> list[Comparison]:
    rounds = 1000 if size.smoke else 32_000
    instances = traps(rounds)
    if size.smoke:
        instances = dict(list(instances.items())[2:3])
    best = [rounds * fluid(f.mean(0), c.mean(0), [rho]).value for _, rho, f, c in instances.values()]
    worlds = stacked([BudgetedTrace(f, c, reveal="full") for _, _, f, c in instances.values()])
    chance = keys(size.seeds(16))

    def ratios(kind) -> list[tuple[Estimate, float]]:
        policies = [
            kind(Hedge(3), Budget([rho * rounds], float(rounds)), jnp.float32(beta))
            for beta, rho, _, _ in instances.values()
        ]
        return [competitive_ratio(*pair) for pair in zip(earned(stacked(policies), worlds, chance), best)]

    ours, greedy = ratios(BwRK), None if size.smoke else ratios(Greedy)
    alpha = [(rho + beta) / (1 + beta) for beta, rho, _, _ in instances.values()]
    out = [
        Comparison(
            f"share of the best mixture in hindsight − α, {name}",
            ratio.values,
            np.full(len(chance), a),
            -0.02,
            paper="α = ν / (1 + β), less order √T",
            note=f"α {a:.3f}; the least of {len(chance)} runs {least:.3f}",
        )
        for name, (ratio, least), a in zip(instances, ours, alpha)
    ]
    if greedy is None:
        return out
    for comparison, (ratio, _) in zip(out, greedy):
        comparison.note += f"; greedy {ratio}"
    worst = int(np.argmin([ratio.value - a for (ratio, _), a in zip(greedy, alpha)]))
    out.append(
        Comparison(
            "share of the best mixture − α, greedy Hedge on its worst of these",
            greedy[worst][0].values,
            np.full(len(chance), alpha[worst]),
            0.0,
            better="lower",
            note=f"{list(instances)[worst]}; ours there {ours[worst][0]}",
        )
    )
    return out


# C. Real demand


def demand() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and requests of each second."""
    with open(data.root() / "azure_llm" / "conv.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    times = np.array([datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows])
    second = (times - times.min()).astype(int)
    tokens = [int(row["ContextTokens"]) + int(row["GeneratedTokens"]) for row in rows]
    return np.bincount(second, tokens), np.bincount(second)


def real(size: Size) -> list[Comparison]:
    tokens, requests = demand()
    refill = 0.6 * tokens.mean()
    turns = [int(np.random.default_rng(FIRST_SEED + seed).integers(len(tokens))) for seed in size.seeds(20)]
    made = [token_bucket(np.roll(tokens, turn), np.roll(requests, turn), refill) for turn in turns]
    worlds, beta = stacked([world for world, _ in made]), made[0][1]
    budget = Budget([60 * beta], float(len(tokens)))  # a minute's refill at first

    def value(policy) -> np.ndarray:
        policies = stacked([policy] * len(turns))
        return np.asarray(earned(policies, worlds, keys([0])), float)[:, 0]

    found = {
        "template": value(BwRK(Hedge(5), budget, jnp.float32(beta))),
        "blind to refills": value(BwRK(Hedge(5), budget, jnp.float32(0.0))),
    }
    if not size.smoke:
        found["blind, and ends"] = value(Ending(Hedge(5), budget, jnp.float32(0.0)))
    shares = [value(BwRK(Static(jnp.eye(5)[i]), budget, jnp.float32(beta))) for i in range(1, 5)]
    best = int(np.mean(shares, axis=1).argmax())
    found |= {f"fixed share {(i + 1) / 4:g}": share for i, share in enumerate(shares)}
    total = requests.sum() / requests.max()
    note = "value served, % of all: " + ", ".join(f"{name} {100 * v.mean() / total:.1f}" for name, v in found.items())
    note += f"; credit of {60 * beta:.2f} units at first, β = {beta:.3f}, {len(tokens)} s, each seed another start"
    return [
        Comparison(
            "value served, LLM demand, against the template that knows of no refill (β = 0)",
            found["template"],
            found["blind to refills"],
            1.05,
            kind="ratio",
            note=note,
        ),
        Comparison(
            f"value served, LLM demand, against the best fixed share in hindsight ({(best + 1) / 4:g})",
            found["template"],
            shares[best],
            0.9,
            kind="ratio",
        ),
    ]


def experiment(size: Size) -> list[Comparison]:
    return [*rates(size), *adversarial(size), *real(size)]
