"""Bandits of ours, River, MABWiser and Vowpal Wabbit on the same tables of rewards; and how fast a plain one decides.

Three problems of ten Bernoulli arms, as in the arena (`anabranch arena`): fixed chances, chances that walk, and
chances that are linear in a context of eight numbers. A seed is a table: the chance of every arm in every round and
whether it then pays. All policies play the same tables, told after each round what the arm that they pulled has paid.
Each has one number to tune, over four values, on seeds of their own, and is scored on others. Regret is in expectation,
against the best arm of each round.

Rates are decisions a second, learning included: ours one compiled scan, of one game and of many side by side, the
others' loops in Python, as their users write them. `speed` is a plain UCB1 in a scan, in a recorded world and in one
that draws; `growth` is the exponent of regret in horizons of 10^3 to 10^7.

`python bench/bandits.py [--smoke] [--only table|speed|growth]` writes `bench/results/bandits.json`; what is not run
again stays as it was.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from anabranch.cell import Policy
from anabranch.decide.arena import BETA, COSTS, PROBLEMS, REWARDS, RHO, D, K, stacked
from anabranch.decide.arm_stream import ArmStream, PullRegret
from anabranch.decide.base import UCB1, CumReward, DynamicRegret, EpsilonGreedy, Exp3IX, Thompson, TraceEnv
from anabranch.decide.budget import Budget, BudgetedDice, BudgetRegret
from anabranch.decide.linear import Context, LinThompson, LinUCB
from anabranch.decide.minimizers import Exp3
from anabranch.decide.optimum import fluid
from anabranch.decide.payment_routing import DiscountedThompson, DiscountedUCB, SlidingWindowUCB
from anabranch.decide.rates import mean, slope
from anabranch.decide.replenishable_knapsacks import BwRK
from anabranch.decide.streaming_bandits import Promotion
from anabranch.decide.worlds import Slots
from anabranch.drive import play
from common import RESULTS, spread, write

ARMS = list(range(K))


class Table(NamedTuple):
    """The chances and the rewards of all arms in every round (T, k), and the contexts (T, d) or none (T, 0)."""

    chance: np.ndarray
    reward: np.ndarray
    context: np.ndarray

    def regret(self, arms: np.ndarray) -> float:
        return float((self.chance.max(1) - self.chance[np.arange(len(arms)), arms]).sum())


def tables(name: str, rounds: int, seeds: range) -> list[Table]:
    """The world of the arena, written down."""
    problem = next(p for p in PROBLEMS if p.name == name)
    worlds = problem.worlds(rounds, seeds)

    def one(world, key):
        def step(state, _):
            seen = world.observe(state)
            chance = world.oracle(state)
            return world.step(state, jnp.array(0))[0], (chance, getattr(seen, "features", jnp.zeros(0)))

        return jax.lax.scan(step, world.init(key=key), None, rounds)[1]

    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
    chance, context = (np.asarray(a) for a in eqx.filter_jit(eqx.filter_vmap(one))(worlds, keys))
    drawn = [np.random.default_rng(seed).uniform(size=(rounds, K)) for seed in seeds]
    return [Table(c, (u < c).astype(np.float32), x) for c, u, x in zip(chance, drawn, context)]


# Ours


@eqx.filter_jit
def scans(policy: Policy, worlds: TraceEnv, keys, rounds: int):
    """The arms pulled (games, rounds)."""
    one = lambda world, key: play(policy, world, rounds, key=key).ticks.decision.action  # pyright: ignore
    return eqx.filter_vmap(one)(worlds, keys)


class Ours(NamedTuple):
    """A policy made from one number."""

    make: Callable[[float], Policy]
    values: list[float]

    def run(self, games: list[Table], value: float, seeds: range) -> tuple[np.ndarray, float]:
        """The arms pulled (games, rounds), and decisions a second of all games side by side."""
        rounds = len(games[0].reward)
        masks = np.ones((rounds, K), bool)
        seen = [Context(t.context, masks) if t.context.shape[1] else masks for t in games]
        worlds = stacked([TraceEnv(t.reward, x) for t, x in zip(games, seen)])  # pyright: ignore
        policy = jax.tree.map(jnp.asarray, self.make(value))  # numbers that are tuned compile nothing anew
        args = policy, worlds, jnp.stack([jax.random.PRNGKey(seed) for seed in seeds]), rounds
        jax.block_until_ready(scans(*args))  # compiled before the clock starts
        start = time.perf_counter()
        arms = jax.block_until_ready(scans(*args))
        return np.asarray(arms), len(games) * rounds / (time.perf_counter() - start)


OURS = {
    "UCB1": Ours(lambda bonus: UCB1(K, bonus), [0.1, 0.3, 0.7, 2**0.5]),
    "epsilon-greedy": Ours(lambda epsilon: EpsilonGreedy(K, epsilon), [0.01, 0.03, 0.1, 0.2]),
    "Thompson": Ours(lambda _: Thompson(K), [0.0]),
    "EXP3-IX": Ours(lambda _: Exp3IX(K), [0.0]),
    "D-UCB": Ours(lambda gamma: DiscountedUCB(K, gamma=gamma), [0.99, 0.995, 0.998, 0.9995]),
    "SW-UCB": Ours(lambda window: SlidingWindowUCB(K, window=int(window)), [200, 500, 1000, 2000]),
    "discounted Thompson": Ours(lambda gamma: DiscountedThompson(K, gamma=gamma), [0.99, 0.995, 0.998, 0.9995]),
}
OURS_IN_CONTEXT = {
    "LinUCB": Ours(lambda bonus: LinUCB(K, D, bonus), [0.1, 0.3, 0.6, 1.0]),
    "linear Thompson": Ours(lambda scale: LinThompson(K, D, scale), [0.1, 0.3, 0.6, 1.0]),
}


# Theirs: how to make one of a number and a seed; it has `pull(context) -> arm` and `learn(context, arm, reward)`.

Bandit = tuple[Callable[[Any], int], Callable[[Any, int, float], Any]]


class Theirs(NamedTuple):
    """A bandit of another library."""

    make: Callable[[float, int], Bandit]
    values: list[float]
    see: Callable[[np.ndarray], Any] = lambda context: None
    """A context as the library takes it; not timed."""

    def run(self, games: list[Table], value: float, seeds: range) -> tuple[np.ndarray, float]:
        """The arms pulled (games, rounds), and decisions a second."""
        chosen, seconds = np.empty((len(games), len(games[0].reward)), int), 0.0
        for game, (table, seed) in enumerate(zip(games, seeds)):
            pull, learn = self.make(value, seed)
            contexts, rewards = [self.see(x) for x in table.context], table.reward.tolist()
            start = time.perf_counter()
            for t, (x, row) in enumerate(zip(contexts, rewards)):
                arm = pull(x)
                chosen[game, t] = arm
                learn(x, arm, row[arm])
            seconds += time.perf_counter() - start
        return chosen, chosen.size / seconds


def river_peers() -> tuple[dict[str, Theirs], dict[str, Theirs]]:
    from river import bandit, proba, stats

    def plain(policy) -> Bandit:
        return lambda _: policy.pull(ARMS), lambda _, arm, reward: policy.update(arm, reward)

    def contextual(policy) -> Bandit:
        return (
            lambda x: policy.pull(ARMS, context=x),
            lambda x, arm, reward: policy.update(arm, x, reward),
        )

    fading = [0.002, 0.01, 0.03, 0.1]
    return {
        "River UCB": Theirs(lambda delta, seed: plain(bandit.UCB(delta, seed=seed)), [0.05, 0.2, 0.5, 1.0]),
        "River UCB, fading means": Theirs(
            lambda f, seed: plain(bandit.UCB(0.1, reward_obj=stats.EWMean(f), seed=seed)), fading
        ),
        "River epsilon-greedy": Theirs(
            lambda epsilon, seed: plain(bandit.EpsilonGreedy(epsilon, seed=seed)), [0.01, 0.03, 0.1, 0.2]
        ),
        "River epsilon-greedy, fading means": Theirs(
            lambda f, seed: plain(bandit.EpsilonGreedy(0.05, reward_obj=stats.EWMean(f), seed=seed)), fading
        ),
        "River Thompson": Theirs(lambda _, seed: plain(bandit.ThompsonSampling(proba.Beta(), seed=seed)), [0.0]),
        "River EXP3": Theirs(lambda gamma, seed: plain(bandit.Exp3(gamma, seed=seed)), [0.01, 0.03, 0.1, 0.2]),
    }, {
        "River LinUCB": Theirs(
            lambda alpha, seed: contextual(bandit.LinUCBDisjoint(alpha, seed=seed)), [0.1, 0.3, 0.6, 1.0],
            lambda context: dict(enumerate(context.tolist())),
        ),
    }  # fmt: skip


def mabwiser_peers() -> tuple[dict[str, Theirs], dict[str, Theirs]]:
    from mabwiser.mab import MAB, LearningPolicy

    def plain(policy, seed: int) -> Bandit:
        mab = MAB(ARMS, policy, seed=seed)
        mab.fit(ARMS, [1] * K)
        return lambda _: mab.predict(), lambda _, arm, reward: mab.partial_fit([arm], [reward])

    def contextual(policy, seed: int) -> Bandit:
        mab = MAB(ARMS, policy, seed=seed)
        mab.fit([0], [0], [[0.0] * D])
        return lambda x: mab.predict(x), lambda x, arm, reward: mab.partial_fit([arm], [reward], x)

    rows = lambda context: context[None]
    return {
        "MABWiser UCB1": Theirs(lambda alpha, seed: plain(LearningPolicy.UCB1(alpha), seed), [0.05, 0.2, 0.5, 1.0]),
        "MABWiser epsilon-greedy": Theirs(
            lambda epsilon, seed: plain(LearningPolicy.EpsilonGreedy(epsilon), seed), [0.01, 0.03, 0.1, 0.2]
        ),
        "MABWiser Thompson": Theirs(lambda _, seed: plain(LearningPolicy.ThompsonSampling(), seed), [0.0]),
    }, {
        "MABWiser LinUCB": Theirs(
            lambda alpha, seed: contextual(LearningPolicy.LinUCB(alpha), seed), [0.1, 0.3, 0.6, 1.0], rows
        ),
        "MABWiser LinTS": Theirs(
            lambda alpha, seed: contextual(LearningPolicy.LinTS(alpha), seed), [0.1, 0.3, 0.6, 1.0], rows
        ),
    }


def vowpal_peers() -> tuple[dict[str, Theirs], dict[str, Theirs]]:
    """Regressions of cost on the arm, or on the arm and the context; what is tuned is how much is explored."""
    from vowpalwabbit import Workspace

    def bandit(options: str, seed: int) -> Bandit:
        vw, draw, last = (
            Workspace(f"--cb_explore_adf {options} --quiet --random_seed {seed}"),
            np.random.default_rng(seed),
            [0.0],
        )

        def pull(x: str) -> int:
            found = vw.predict([x, *lines])
            p = np.asarray(found) / np.sum(found)
            arm = int(np.searchsorted(np.cumsum(p), draw.uniform() * p.sum()))
            last[0] = p[arm]
            return arm

        def learn(x: str, arm: int, reward: float) -> None:
            vw.learn([x, *(f"0:{-reward}:{last[0]} {line}" if i == arm else line for i, line in enumerate(lines))])

        return pull, learn

    lines = [f"|a arm{i}" for i in ARMS]
    said = lambda context: "shared |c " + " ".join(f"x{i}:{v:.5f}" for i, v in enumerate(context.tolist()))
    epsilon, scale = [0.01, 0.03, 0.1, 0.2], [1.0, 10.0, 100.0, 1000.0]
    both = "-q ca --ignore_linear c"
    return {
        "Vowpal Wabbit epsilon-greedy": Theirs(lambda e, seed: bandit(f"--epsilon {e}", seed), epsilon, said),
        "Vowpal Wabbit SquareCB": Theirs(lambda g, seed: bandit(f"--squarecb --gamma_scale {g}", seed), scale, said),
    }, {
        "Vowpal Wabbit epsilon-greedy": Theirs(lambda e, seed: bandit(f"{both} --epsilon {e}", seed), epsilon, said),
        "Vowpal Wabbit SquareCB": Theirs(
            lambda g, seed: bandit(f"{both} --squarecb --gamma_scale {g}", seed), scale, said
        ),
    }


def compare(smoke: bool) -> dict[str, Any]:
    """The table: every policy on every problem that it can play."""
    plain: dict[str, Ours | Theirs] = {f"anabranch {name}": run for name, run in OURS.items()}
    contextual: dict[str, Ours | Theirs] = {f"anabranch {name}": run for name, run in OURS_IN_CONTEXT.items()}
    for peers in (river_peers, mabwiser_peers, vowpal_peers):
        one, other = peers()
        plain, contextual = plain | one, contextual | other
    rounds, tuning, scored = (200, range(100, 101), range(1)) if smoke else (2000, range(100, 102), range(5))
    out: dict[str, Any] = {"rounds": rounds, "seeds": {"tuning": len(tuning), "scored": len(scored)}}
    for problem in ("stochastic", "drifting", "contextual"):
        games = {seeds: tables(problem, rounds, seeds) for seeds in (tuning, scored)}
        board = []
        for name, player in track((contextual if problem == "contextual" else plain).items(), description=problem):
            values = player.values[:1] if smoke else player.values
            score = {
                value: sum(
                    t.regret(arms) for t, arms in zip(games[tuning], player.run(games[tuning], value, tuning)[0])
                )
                for value in (values if len(values) > 1 else [])
            }
            best = min(score, key=lambda value: score[value]) if score else values[0]
            arms, rate = player.run(games[scored], best, scored)
            regret = mean([t.regret(a) for t, a in zip(games[scored], arms)])
            row = {"policy": name, "regret": round(regret.value, 1)}
            row |= {"interval": [round(regret.low, 1), round(regret.high, 1)]}
            row |= {"tuned": best} if score else {}
            if isinstance(player, Ours):
                alone = player.run(games[scored][:1], best, scored[:1])[1]
                row |= {"decisions_per_s": round(alone), "side_by_side": round(rate)}
            else:
                row |= {"decisions_per_s": round(rate)}
            board.append(row)
        out[problem] = sorted(board, key=lambda row: row["regret"])
    return out


# Speed


@eqx.filter_jit
def rewards(worlds, keys, rounds: int):
    """What UCB1 earns in each world, ticks not kept."""
    policy, meters = UCB1(K), {"earned": CumReward()}
    one = lambda world, key: play(policy, world, rounds, key=key, meters=meters, keep=False).scores["earned"]
    return eqx.filter_vmap(one)(worlds, keys) if keys.ndim == 2 else one(worlds, keys)


def speed(smoke: bool) -> dict[str, Any]:
    """Decisions a second of UCB1 with ten arms: choosing, the world's answer, and learning from it."""
    rounds, some, repeats = (2000, 4, 2) if smoke else (2_000_000, 64, 7)
    chance = np.linspace(0.1, 0.9, K, dtype=np.float32)
    table = (np.random.default_rng(0).uniform(size=(rounds, K)) < chance).astype(np.float32)
    record, drawing = lambda rows: TraceEnv(jnp.asarray(rows)), Slots(jnp.asarray(chance[None]))
    worlds = {
        "recorded": [record(table)],
        "recorded, side by side": [record(part) for part in np.split(table, some)],
        "drawing": [drawing],
        "drawing, side by side": [drawing] * some,
    }
    out: dict[str, Any] = {}
    for name, games in worlds.items():
        keys, length = jax.random.split(jax.random.PRNGKey(0), len(games)), rounds // len(games)
        args = (stacked(games), keys, length) if len(games) > 1 else (games[0], keys[0], length)
        compiled: Any = rewards.lower(*args).compile()  # pyright: ignore
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            found.append(rounds / (time.perf_counter() - start))
        out[name] = {"games": len(games), "decisions_per_s": spread(found)}
    return out


# Growth


def growth(smoke: bool) -> dict[str, Any]:
    """Exponents of regret in the horizon, over all decades and over the last two, with their intervals."""
    powers = (2, 3) if smoke else (3, 4, 5, 6, 7)
    keys = jax.random.split(jax.random.PRNGKey(0), 2 if smoke else 8)
    slots = Slots(jnp.linspace(0.1, 0.9, K)[None])
    draw = np.random.default_rng(0)
    arms = jnp.asarray(draw.uniform(size=(len(keys), K)), jnp.float32)

    def bandit(policy: Policy):
        def regret(rounds: int):
            run = lambda key: play(
                policy, slots, rounds, key=key, meters={"r": DynamicRegret(slots)}, keep=False
            ).scores["r"]
            return jax.jit(jax.vmap(run))(keys)

        return regret

    def tower(pulls: int):
        policy = Promotion(K, float(pulls))

        def run(means, key):
            world = ArmStream(means, float(pulls))
            return play(policy, world, policy.rounds, key=key, meters={"r": PullRegret(world)}, keep=False).scores["r"]

        return jax.jit(jax.vmap(run))(arms, keys)

    def knapsack(rounds: int):
        world, budget = BudgetedDice(REWARDS, COSTS), Budget([RHO * rounds], float(rounds))
        policy = BwRK(Exp3(len(REWARDS)), budget, BETA)
        meters = {"r": BudgetRegret(fluid(REWARDS, COSTS, [RHO]).value, world)}
        run = lambda key: play(policy, world, rounds, key=key, meters=meters, keep=False).scores["r"]
        return jax.jit(jax.vmap(run))(keys)

    out: dict[str, Any] = {"horizons": [10**p for p in powers], "seeds": len(keys)}
    runs = {"UCB1": bandit(UCB1(K)), "EXP3-IX": bandit(Exp3IX(K)), "single pass, tower": tower}
    runs |= {} if smoke else {"knapsack, BwRK": knapsack}
    for name, run in track(runs.items(), description="growth"):
        found = np.stack([np.asarray(run(10**p), float) for p in powers], axis=1)
        fits = {
            "exponent": slope(out["horizons"], found),
            "last_two_decades": slope(out["horizons"][-3:], found[:, -3:]),
        }
        out[name] = {"regret": found.mean(0).round(1).tolist()} | {
            what: [round(v, 4) for v in (fit.value, fit.low, fit.high)] for what, fit in fits.items()
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; nothing is written")
    parts = {"table": compare, "speed": speed, "growth": growth}
    parser.add_argument("--only", choices=parts, help="only this part")
    args = parser.parse_args()
    path = RESULTS / "bandits.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record = {name: kept[name] for name in parts if name in kept}
    for name, part in parts.items():
        if args.only in (None, name):
            record[name] = part(args.smoke)
            print(json.dumps({name: record[name]}, indent=2), flush=True)
            if not args.smoke:
                write("bandits", record, "anabranch", "jax", "river", "mabwiser", "vowpalwabbit")


if __name__ == "__main__":
    main()
