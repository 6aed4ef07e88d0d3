"""Which bandit routes payments best: our discounted ones, those of River and MABWiser, and fixed rules.

The worlds are those of `bench/payments.py`: a day of `PaymentSimulator` in a minute, 60 transactions a second for each
kind of payment, outcomes known after a log-normal time with median 0.3 s. Every policy routes the same transactions
with the same outcomes and delays. Each has one number to tune, over five values, on seeds of their own; it is scored on
five others. A fixed rule sees what no policy sees, the outcome of every gateway: in the first hour, or in hindsight.

`python bench/routing.py [--smoke]` writes `bench/results/routing.json`.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.progress import track

from anabranch.cell import Feedback, Maybe
from anabranch.combine import Ask, Outcome
from anabranch.decide.payment_routing import DiscountedThompson, DiscountedUCB, PaymentRouter, SlidingWindowUCB
from anabranch.run.keyed import Keyed
from common import write
from payments import GATEWAYS, World, best_gateways

RATE, SECONDS, KINDS = 12_000, 60.0, 200
TICK = 0.02
"""Seconds of transactions and outcomes that one call of `Keyed` takes."""
Make = Callable[[float, int], tuple[Callable[[], Any], Callable[[Any, float], None]]]
"""Of a tuned number and a seed: how to choose a gateway, and how to learn from an outcome."""


def ours(world: World, kinds: np.ndarray, bandit) -> np.ndarray:
    """The gateways that routers of this bandit choose, one router a kind."""
    keyed = Keyed(PaymentRouter(bandit, capacity=512), KINDS)
    mine = np.flatnonzero(np.isin(world.kind, kinds))
    chosen, ticket = np.full(len(world.kind), -1), np.full(len(world.kind), -1)
    known = np.maximum(world.known[mine], world.time[mine] + TICK)
    when = np.r_[known, world.time[mine]]
    tick = (when // TICK).astype(int)
    who, tells = np.r_[mine, mine], np.repeat([True, False], len(mine))
    order = np.lexsort((when, tick))
    for part in np.split(order, np.flatnonzero(np.diff(tick[order])) + 1):
        i, told = who[part], tells[part]
        reward = np.where(told, world.success[i, chosen[i]], 0).astype(np.float32)
        nothing = np.zeros(len(i), bool)
        feedback = Feedback(reward, nothing, nothing)
        event = Ask(
            Maybe(np.ones((len(i), GATEWAYS), bool), ~told),
            Maybe(Outcome(np.where(told, ticket[i], 0).astype(np.int32), feedback), told),
        )
        routes = keyed(world.kind[i].tolist(), event)
        asked = i[~told]
        chosen[asked] = routes.value.decision.action[~told]
        ticket[asked] = routes.value.ticket[~told]
    return chosen


def theirs(world: World, kinds: np.ndarray, make: Make, value: float, seed: int) -> np.ndarray:
    """The gateways that bandits of another library choose, one bandit a kind."""
    chosen = np.full(len(world.kind), -1)
    for kind in kinds.tolist():
        act, learn = make(value, seed + kind)
        mine = np.flatnonzero(world.kind == kind)
        for _, asked, i in sorted([(world.time[i], 1, i) for i in mine] + [(world.known[i], 0, i) for i in mine]):
            if asked:
                chosen[i] = act()
            else:
                learn(chosen[i], float(world.success[i, chosen[i]]))
    return chosen


def peers() -> dict[str, tuple[Make, list[float]]]:
    """Bandits of River and MABWiser: one that forgets where the library has it, and its best known ones."""
    from mabwiser.mab import MAB, LearningPolicy
    from river import bandit, proba, stats

    arms = list(range(GATEWAYS))

    def river(policy) -> tuple:
        return (lambda: policy.pull(arms)), policy.update

    def mabwiser(policy, seed: int) -> tuple:
        mab = MAB(arms, policy, seed=seed)
        mab.fit(arms, [1] * GATEWAYS)
        return mab.predict, lambda arm, reward: mab.partial_fit([arm], [reward])

    few, rates = [0.05, 0.1, 0.2, 0.5, 1.0], [0.01, 0.02, 0.05, 0.1, 0.2]
    return {
        "River UCB": (lambda delta, seed: river(bandit.UCB(delta, seed=seed)), few),
        "River UCB, fading means": (
            lambda fading, seed: river(bandit.UCB(0.1, reward_obj=stats.EWMean(fading), seed=seed)), rates,
        ),
        "River epsilon-greedy, fading means": (
            lambda fading, seed: river(bandit.EpsilonGreedy(0.05, reward_obj=stats.EWMean(fading), seed=seed)), rates,
        ),
        "River Thompson": (lambda _, seed: river(bandit.ThompsonSampling(proba.Beta(), seed=seed)), [0.0]),
        "MABWiser UCB1": (lambda alpha, seed: mabwiser(LearningPolicy.UCB1(alpha), seed), few),
        "MABWiser Thompson": (lambda _, seed: mabwiser(LearningPolicy.ThompsonSampling(), seed), [0.0]),
    }  # fmt: skip


OURS: dict[str, tuple[Callable[[float], Any], list[float]]] = {
    "D-UCB": (lambda gamma: DiscountedUCB(GATEWAYS, gamma=gamma), [0.9, 0.95, 0.97, 0.98, 0.99]),
    "SW-UCB": (lambda window: SlidingWindowUCB(GATEWAYS, window=int(window)), [30, 60, 100, 200, 400]),
    "discounted Thompson": (lambda gamma: DiscountedThompson(GATEWAYS, gamma=gamma), [0.9, 0.95, 0.97, 0.98, 0.99]),
}


def rate_of(world: World, kinds: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The success rate of each kind."""
    took = world.success[np.arange(len(chosen)), chosen]
    return np.array([took[world.kind == kind].mean() for kind in kinds])


def fixed(world: World, kinds: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What rules that see all outcomes would have chosen."""
    rng, first = np.random.default_rng(12_345), world.time < SECONDS / 24
    yield "static: best in the first hour", best_gateways(world, first)[world.kind]
    yield "static: best in hindsight", best_gateways(world, np.ones(len(first), bool))[world.kind]
    yield "random", rng.integers(0, GATEWAYS, len(first))
    yield "always the best at the time", world.chance.argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one seed and kind, nothing written")
    args = parser.parse_args()
    tuning, scored, some = ([100, 101], [0, 1, 2, 3, 4], 10) if not args.smoke else ([100], [0], 1)
    kinds = np.arange(0, KINDS, KINDS // some)[:some]
    few = kinds[: max(1, some // 2)]
    worlds = {seed: World(RATE, SECONDS, seed) for seed in tuning + scored}
    runs: dict[str, tuple[Callable[[World, np.ndarray, float, int], np.ndarray], list[float]]] = {}
    for name, (bandit, values) in OURS.items():
        runs[name] = (lambda world, which, value, seed, b=bandit: ours(world, which, b(value)), values)
    for name, (make, values) in peers().items():
        runs[name] = (lambda world, which, value, seed, m=make: theirs(world, which, m, value, seed), values)
    rates: dict[str, np.ndarray] = {}
    tuned: dict[str, float] = {}
    for name, (run, values) in track(runs.items(), description="routing"):
        values = values[:2] if args.smoke else values
        score = {
            value: np.mean([rate_of(worlds[s], few, run(worlds[s], few, value, s)).mean() for s in tuning])
            for value in values
        }
        tuned[name] = max(score, key=lambda value: score[value])
        rates[name] = np.concatenate([rate_of(worlds[s], kinds, run(worlds[s], kinds, tuned[name], s)) for s in scored])
    for seed in scored:
        for name, chosen in fixed(worlds[seed], kinds):
            rates[name] = np.r_[rates.get(name, np.zeros(0)), rate_of(worlds[seed], kinds, chosen)]
    best = max(OURS, key=lambda name: rates[name].mean())
    rng = np.random.default_rng(0)
    table = {}
    for name, rate in rates.items():
        gap = rates[best] - rate
        drawn = gap[rng.integers(0, len(gap), (2000, len(gap)))].mean(1)
        table[name] = {
            "success": round(float(rate.mean()), 4),
            "behind": round(float(gap.mean()), 4),
            "interval": [round(float(q), 4) for q in np.percentile(drawn, (2.5, 97.5))],
        } | ({"tuned": tuned[name]} if name in tuned else {})
    record = {
        "best_of_ours": best,
        "policies": dict(sorted(table.items(), key=lambda item: -item[1]["success"])),
        "kinds": len(rates[best]),
        "transactions_a_kind": round(RATE * SECONDS / KINDS),
        "seeds": {"tuning": tuning, "scored": scored},
    }
    print(json.dumps(record, indent=2))
    if not args.smoke:
        write("routing", record, "anabranch", "jax", "river", "mabwiser")


if __name__ == "__main__":
    main()
