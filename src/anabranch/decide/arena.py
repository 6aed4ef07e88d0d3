"""The arena: every policy of the family in every world that it can play, on the same seeds, against the true optimum.

A problem is a world, whose truth is known, and those who can play it; `PROBLEMS` lists them, and another one is another
entry. A game is one compiled scan, all seeds side by side. Policies that have a number to tune have it at its default:
the arena shows what a method does as it comes, claims and benchmarks compare methods that are tuned alike.

    >>> [score] = play_all(["drifting"], ["D-UCB"], seeds=2, rounds=500)
    >>> score.problem, score.policy, score.score.values.shape, score.score.value < 0.4 * 500
    ('drifting', 'D-UCB', (2,), True)
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from anabranch.catalog import did_you_mean
from anabranch.cell import Cell, Env, Policy
from anabranch.decide import base, baselines, streaming_bandits, virtual_plus
from anabranch.decide import mixing_predictions as mixing
from anabranch.decide.arm_stream import ArmStream, PullRegret
from anabranch.decide.base import CumReward, DynamicRegret, Regret, TraceEnv
from anabranch.decide.budget import Budget, BudgetedDice, BudgetedTrace, Spent
from anabranch.decide.classic import Acrobot, CartPole, Classic, EpisodeReturn, Pendulum
from anabranch.decide.first_price_budgets import FirstPriceBidder, FirstPriceDraws, Reveal, uniform
from anabranch.decide.linear import LinThompson, LinUCB
from anabranch.decide.metrical import Competitive
from anabranch.decide.minimizers import Exp3, Hedge
from anabranch.decide.optimum import first_price, fluid
from anabranch.decide.payment_routing import (
    DiscountedThompson,
    DiscountedUCB,
    PaymentRouter,
    PaymentSimulator,
    Routing,
    SlidingWindowUCB,
)
from anabranch.decide.rates import Estimate, mean, slope
from anabranch.decide.replenishable_knapsacks import BwRK
from anabranch.decide.stream_x import StreamAC, StreamQ
from anabranch.decide.worlds import Items, LinearSlots, Slots, followers
from anabranch.drive import Loop

POINTS = 50
"""At so many times a game is looked at, if they divide its rounds."""
LEAST = 100
"""Rounds that a game must have."""


class Problem(NamedTuple):
    """A world and who can play it. Functions are given the rounds of a game."""

    name: str
    about: str
    measure: str
    """What the score is, and of what."""
    better: Literal["lower", "higher"]
    rounds: int
    """The length of a game, if nobody says."""
    worlds: Callable[[int, range], Env]
    """The worlds of some seeds, stacked on a leading axis: `games` of them for each seed, one after the other."""
    players: Callable[[int], dict[str, Policy]]
    meter: Callable[[Env, int], Cell]
    """What gives the score."""
    budget: Callable[[int], Budget] | None = None
    """What may be spent, where that is bounded."""
    games: int = 1
    """Games a seed, whose mean is its score."""
    regret: bool = False
    """Whether the score is a regret that grows with the rounds of one game, so that it has an exponent."""


class Score(NamedTuple):
    """How a policy did in a problem."""

    problem: str
    policy: str
    score: Estimate
    over: float | None
    """By how much the budget was exceeded, at the worst of all seeds; None where there is no budget."""
    exponent: Estimate | None
    """b where the score has grown like t^b over the last nine tenths of a game."""
    decisions_per_s: float
    """All seeds together, without compilation."""
    at: Int[np.ndarray, " points"]
    """After how many rounds `curve` is."""
    curve: Float[np.ndarray, "seeds points"]


@eqx.filter_jit
def _game(policy: Policy, problem: Problem, worlds: Env, keys, rounds: int, points: int):
    """The score (games, points), and the least that was left of the budget (games,)."""

    def one(world, key):
        meters: dict[str, Cell] = {"score": problem.meter(world, rounds)}
        if problem.budget is not None:
            meters["spent"] = Spent(problem.budget(rounds))
        loop = Loop(policy, world, meters)

        def part(state, _):
            state, _ = jax.lax.scan(lambda state, _: (loop.step(state)[0], None), state, None, rounds // points)
            return state, meters["score"].value(state["meters"]["score"])  # pyright: ignore

        state, curve = jax.lax.scan(part, loop.init(key=key), None, points)
        spent = state["meters"]["spent"][1].min() if "spent" in meters else jnp.inf
        return curve, spent

    return eqx.filter_vmap(one)(worlds, keys)


def play_one(problem: Problem, name: str, policy: Policy, seeds: int, rounds: int | None = None) -> Score:
    """One policy in one problem, on the seeds from 0."""
    total = problem.rounds if rounds is None else rounds
    length = getattr(policy, "rounds", total)  # a policy of batches says in how many rounds it is done
    points = math.gcd(length, POINTS)
    keys = jax.random.split(jax.random.PRNGKey(0), seeds * problem.games)
    args = policy, problem, problem.worlds(total, range(seeds)), keys, length, points
    game: Any = _game.lower(*args).compile()  # pyright: ignore
    start = time.perf_counter()
    curve, lowest = jax.block_until_ready(game(*args))
    seconds = time.perf_counter() - start
    curve = np.asarray(curve, np.float64).reshape(seeds, problem.games, points).mean(1)
    at = length // points * np.arange(1, points + 1)
    exponent = None
    if problem.regret and points == POINTS and seeds > 1:
        late = at >= length // 10
        try:
            exponent = slope(at[late], curve[:, late])
        except ValueError:  # there was no regret at some time
            pass
    over = None if problem.budget is None else max(0.0, -float(lowest.min()))
    return Score(
        problem.name, name, mean(curve[:, -1]), over, exponent, len(keys) * length / seconds, at, curve
    )  # fmt: skip


def chosen(
    problems: Sequence[str] = (), policies: Sequence[str] = (), rounds: int | None = None
) -> list[tuple[Problem, str, Policy]]:
    """The games of these problems and policies, by default all.

    Raises:
        LookupError: if there is no problem or no policy of a name, or none of the policies plays any of the problems.
        ValueError: if `rounds` is too few for a game.
    """
    if rounds is not None and rounds < LEAST:
        raise ValueError(f"a game has at least {LEAST} rounds, got {rounds}")
    named = {problem.name: problem for problem in PROBLEMS}
    for name in problems:
        if name not in named:
            raise LookupError(f"no problem {name!r}{did_you_mean(name, list(named))}; there are {', '.join(named)}")
    every = [(p, name, policy) for p in PROBLEMS for name, policy in p.players(rounds or p.rounds).items()]
    known = sorted({name for _, name, _ in every})
    for name in policies:
        if name not in known:
            raise LookupError(f"no policy {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    wanted = lambda problem, policy: problem in (problems or named) and policy in (policies or known)
    found = [game for game in every if wanted(game[0].name, game[1])]
    if not found:
        raise LookupError(f"none of {', '.join(policies)} plays any of {', '.join(problems)}")
    return found


def play_all(
    problems: Sequence[str] = (),
    policies: Sequence[str] = (),
    seeds: int = 8,
    rounds: int | None = None,
    told: Callable[[int, int, str], None] = lambda done, games, now: None,
) -> list[Score]:
    """The scores of all games that are `chosen`; `told` is given how many are done, of how many, and which is next.

    Raises:
        LookupError: if a name is not known.
        ValueError: if `seeds` is not positive, or `rounds` is too few.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be positive, got {seeds}")
    games, scores = chosen(problems, policies, rounds), []
    for done, (problem, name, policy) in enumerate(games):
        told(done, len(games), f"{problem.name}: {name}")
        scores.append(play_one(problem, name, policy, seeds, rounds))
    return scores


def ranked(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """The scores of each problem, the best first; a budget that was exceeded comes last."""
    out: dict[str, list[Score]] = {}
    for problem in PROBLEMS:
        sign = 1 if problem.better == "lower" else -1
        mine = [score for score in scores if score.problem == problem.name]
        if mine:
            out[problem.name] = sorted(mine, key=lambda s: ((s.over or 0) > 0, sign * s.score.value))
    return out


# The problems


class Share(CumReward):
    """Meter: the sum of rewards as a share of the optimum's."""

    optimum: float = eqx.field(kw_only=True)

    def value(self, state):
        return state[1] / self.optimum


def stacked(worlds: Sequence[Env]) -> Env:
    """Worlds of one shape as one with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *worlds)


def same(make: Callable[[int], Env]) -> Callable[[int, range], Env]:
    """The same world for each seed; only what is drawn in it differs."""
    return lambda rounds, seeds: stacked([make(rounds)] * len(seeds))


def drawn(make: Callable[[int, np.random.Generator], Env], games: int = 1) -> Callable[[int, range], Env]:
    """Another world for each seed and game."""
    return lambda rounds, seeds: stacked(
        [make(rounds, np.random.default_rng([seed, game])) for seed in seeds for game in range(games)]
    )


# Bandits

K = 10


def _bandits(rounds: int) -> dict[str, Policy]:
    return {
        "UCB1": base.UCB1(K),
        "Thompson": base.Thompson(K),
        "epsilon-greedy": base.EpsilonGreedy(K),
        "EXP3-IX": base.Exp3IX(K),
        "D-UCB": DiscountedUCB(K, gamma=0.99),
        "SW-UCB": SlidingWindowUCB(K, window=500),
        "discounted Thompson": DiscountedThompson(K, gamma=0.99),
        "round robin": base.RoundRobin(K),
    }


def _stochastic(rounds: int, draw: np.random.Generator) -> Env:
    return Slots(jnp.asarray(draw.uniform(size=(1, K)), jnp.float32))


def _drifting(rounds: int, draw: np.random.Generator) -> Env:
    """Rates that walk with a step of .03 every hundred rounds, reflected at 0 and 1."""
    steps = draw.normal(0, 0.03, (-(-rounds // 100), K))
    steps[0] = draw.uniform(size=K)
    return Slots(jnp.asarray(1 - np.abs(1 - np.cumsum(steps, 0) % 2), jnp.float32), hold=100)


def _adversarial(rounds: int, draw: np.random.Generator) -> Env:
    """The best arm of the first third earns nothing after it, when another one always does."""
    rewards = np.full((rounds, K), 0.2)
    bait, best = draw.choice(K, 2, replace=False)
    early = np.arange(rounds) < rounds // 3
    rewards[:, bait], rewards[:, best] = np.where(early, 0.7, 0.0), np.where(early, 0.3, 1.0)
    return TraceEnv(jnp.asarray(draw.uniform(size=rewards.shape) < rewards, jnp.float32))


D = 8


def _contextual(rounds: int, draw: np.random.Generator) -> Env:
    theta = draw.normal(size=(K, D))
    return LinearSlots(jnp.asarray(theta / np.linalg.norm(theta, axis=1, keepdims=True), jnp.float32))


def _in_context(rounds: int) -> dict[str, Policy]:
    blind = {name: baselines.Blind(policy) for name, policy in _bandits(rounds).items() if name in ("UCB1", "Thompson")}
    return {"LinUCB": LinUCB(K, D), "linear Thompson": LinThompson(K, D), **blind}


def _payments(rounds: int, seeds: range) -> Env:
    made = rounds // 2
    room = 64 * -(-made // 5000)
    days = [PaymentSimulator.day(seed, 1, made, K // 2, capacity=room) for seed in seeds]
    return stacked([jax.tree.map(lambda leaf: leaf[0], day) for day in days])


def _routers(rounds: int) -> dict[str, Policy]:
    room, k = 64 * -(-(rounds // 2) // 5000), K // 2
    bandits = {
        "UCB1": base.UCB1(k),
        "Thompson": base.Thompson(k),
        "D-UCB": DiscountedUCB(k, gamma=0.99),
        "SW-UCB": SlidingWindowUCB(k, window=500),
        "discounted Thompson": DiscountedThompson(k, gamma=0.99),
        "round robin": base.RoundRobin(k),
    }
    return {name: Routing(PaymentRouter(bandit, room)) for name, bandit in bandits.items()}


ARMS, PULLS = 500, 500_000


def _passing(rounds: int, draw: np.random.Generator) -> Env:
    return ArmStream(jnp.asarray(draw.uniform(size=ARMS), jnp.float32), float(rounds))


def _readers(rounds: int) -> dict[str, Policy]:
    horizon = float(rounds)
    return {
        "promotion tower": streaming_bandits.Promotion(ARMS, horizon, "tower"),
        "promotion star": streaming_bandits.Promotion(ARMS, horizon, "star"),
        "promotion loglog": streaming_bandits.Promotion(ARMS, horizon, "loglog"),
        "king of arms": streaming_bandits.KingOfArms(ARMS, horizon),
        "naive": streaming_bandits.NaiveEps(ARMS, horizon),
        "uniform exploration": streaming_bandits.UniformExploration(ARMS, horizon),
    }


# Budgets

RHO, BETA = 0.1, 0.2
REWARDS = [0.0, 0.9, 0.6, 0.4, 0.3]
COSTS = [[-BETA], [0.9], [0.5], [0.1], [-0.1]]


def _purse(rounds: int) -> Budget:
    return Budget([RHO * rounds], float(rounds))


def _trap(rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (T, 3) and costs (T, 3, 1): what is cheap in the first half is dear in the second."""
    early = (np.arange(rounds) < rounds // 2)[:, None]
    costs = np.where(early, [-BETA, 0.1, 0.1], [-BETA, 1.0, 0.1])
    return np.tile([0.0, 0.5, 0.2], (rounds, 1)), costs[:, :, None]


def _in_hindsight(rounds: int) -> float:
    rewards, costs = _trap(rounds)
    return rounds * fluid(rewards.mean(0), costs.mean(0), [RHO]).value


def _spenders(primal: type[Hedge], name: str, k: int) -> Callable[[int], dict[str, Policy]]:
    return lambda rounds: {
        f"BwRK {name}": BwRK(primal(k), _purse(rounds), BETA),
        f"BwK {name}": baselines.Ending(primal(k), _purse(rounds)),
        f"greedy {name}": baselines.Greedy(primal(k), _purse(rounds)),
        "UCB1": base.UCB1(k),
    }


BIDS = 0.03
"""What may be spent in an auction on average; from .08 on it would not bind."""


def _bids(rounds: int) -> Budget:
    return Budget([BIDS * rounds], float(rounds))


def _bidders(reveal: Reveal) -> Callable[[int], dict[str, Policy]]:
    def players(rounds: int) -> dict[str, Policy]:
        points = math.ceil(math.sqrt(rounds)) + 1
        return {
            "learned G and price": FirstPriceBidder(_bids(rounds), points, reveal),
            "no price": baselines.Unpaced(_bids(rounds), points, reveal),
            "second-price pacing": baselines.SecondPrice(_bids(rounds), points, reveal),
            "half the value": baselines.Shade(_bids(rounds), 2, reveal, share=0.5),
        }

    return players


def _auctioned(rounds: int) -> float:
    grid = np.linspace(0, 1, 1001)
    return rounds * first_price(grid, grid, grid, BIDS).value


def _auction(reveal: Reveal) -> Problem:
    return Problem(
        f"auctions-{reveal.replace('_', '-')}",
        "First-price auctions under a budget; "
        + ("every other bid is shown." if reveal == "full" else "only the winning bid is shown."),
        "reward / fluid optimum", "higher", 20_000,
        worlds=same(lambda rounds: FirstPriceDraws(uniform, uniform, reveal=reveal)),
        players=_bidders(reveal),
        meter=lambda world, rounds: Share(optimum=_auctioned(rounds)),
        budget=_bids,
    )  # fmt: skip


# Picking

PICKS, ITEMS, ORDERS = 5, 100, 250


def _pickers(rounds: int) -> dict[str, Policy]:
    watch = int(0.37 * rounds)
    return {
        "Virtual+": virtual_plus.VirtualPlus(rounds, PICKS, watch),
        "Virtual": virtual_plus.Virtual(rounds, PICKS, watch),
        "Optimistic": virtual_plus.Optimistic(rounds, PICKS, watch),
        "single reference": virtual_plus.SingleRef(rounds, PICKS),
        "random picks": virtual_plus.RandomPicks(rounds, PICKS),
    }


# Mixing predictions

FORECASTS, BLOCKS, APART = 5, 8, 30.0


def _mixtures(rounds: int) -> dict[str, Policy]:
    return {
        "shared weights": mixing.ShareMix(FORECASTS, APART),
        "shared weights by transport": mixing.ShareMix(FORECASTS, APART, by_transport=True),
        "Hedge": mixing.ShareMix(FORECASTS, APART, share=0.0),
        "layered": mixing.LayeredMix(FORECASTS),
        "MIN operator": mixing.Cheapest(FORECASTS),
        "round robin": baselines.Turns(FORECASTS),
    }


def _asking(rounds: int) -> dict[str, Policy]:
    return {
        "shared weights asked": mixing.BanditShareMix(FORECASTS, APART),
        "round robin": baselines.Turns(FORECASTS),
    }


# Control


def _control(world: Classic, about: str, rounds: int) -> Problem:
    def players(rounds: int) -> dict[str, Policy]:
        dim, n, box = world.dim, world.n_actions, world.box
        out: dict[str, Policy] = {"Stream AC": StreamAC(dim, n, hidden=32, limit=world.limit, box=box)}
        if box is None:
            out["Stream Q"] = StreamQ(dim, n, limit=world.limit, explore=max(1, rounds // 20))
        return out | {"random": baselines.RandomActions(n, box)}

    return Problem(
        type(world).__name__,
        f"{about} Until the last third the curve is the return so far of the episode that runs.",
        "mean return in the last third", "higher", rounds,
        worlds=same(lambda rounds: world),
        players=players,
        meter=lambda world, rounds: EpisodeReturn(rounds - rounds // 3),
    )  # fmt: skip


PROBLEMS: tuple[Problem, ...] = (
    Problem(
        "stochastic", f"{K} arms that pay with fixed chances, drawn from [0, 1].", "regret", "lower", 30_000,
        worlds=drawn(_stochastic), players=_bandits, meter=lambda world, rounds: DynamicRegret(world), regret=True,
    ),
    Problem(
        "drifting", f"{K} arms whose chances walk; against the best arm of each round.", "dynamic regret", "lower",
        30_000, worlds=drawn(_drifting), players=_bandits, meter=lambda world, rounds: DynamicRegret(world),
        regret=True,
    ),
    Problem(
        "adversarial", "The best arm of the first third then earns nothing. Against the best fixed arm, which one that "
        "forgets may beat.",
        "regret", "lower", 30_000,
        worlds=drawn(_adversarial), players=_bandits, meter=lambda world, rounds: Regret(world),
    ),
    Problem(
        "contextual", f"{K} arms, linear in a context of {D} numbers; against the best arm of each context.",
        "dynamic regret", "lower", 20_000,
        worlds=drawn(_contextual), players=_in_context, meter=lambda world, rounds: DynamicRegret(world), regret=True,
    ),
    Problem(
        "payments", "A day of payments over five processors that drift and break; outcomes come late. A round is a "
        "payment or an outcome.", "dynamic regret", "lower", 10_000,
        worlds=_payments, players=_routers, meter=lambda world, rounds: DynamicRegret(world), regret=True,
    ),
    Problem(
        "single-pass", f"{ARMS} arms that come by once, of which a few can be stored. A round is a pull; a decision, a "
        "batch of pulls.", "regret", "lower", PULLS,
        worlds=drawn(_passing), players=_readers, meter=lambda world, rounds: PullRegret(world),
    ),
    Problem(
        "knapsack", "Arms that spend and refill a budget, drawn alike in all rounds.", "reward / fluid optimum",
        "higher", 30_000,
        worlds=same(lambda rounds: BudgetedDice(REWARDS, COSTS)), players=_spenders(Exp3, "EXP3", len(REWARDS)),
        meter=lambda world, rounds: Share(optimum=rounds * fluid(REWARDS, COSTS, [RHO]).value), budget=_purse,
    ),
    Problem(
        "knapsack-trap", "What is cheap becomes dear half-way; all outcomes are shown.",
        "reward / best mixture in hindsight", "higher", 20_000,
        worlds=same(lambda rounds: BudgetedTrace(*_trap(rounds), reveal="full")), players=_spenders(Hedge, "Hedge", 3),
        meter=lambda world, rounds: Share(optimum=_in_hindsight(rounds)), budget=_purse,
    ),
    _auction("full"),
    _auction("one_sided"),
    Problem(
        "picking", f"The {PICKS} best of a row of items, each taken or left for good; {ORDERS} orders a seed.",
        "share of the best", "higher", ITEMS,
        worlds=drawn(lambda rounds, draw: Items(jnp.asarray(draw.uniform(size=rounds), jnp.float32), PICKS), ORDERS),
        players=_pickers, meter=lambda world, rounds: CumReward(), games=ORDERS,
    ),
    Problem(
        "predictions", f"{FORECASTS} forecasts, of which another is good in each of {BLOCKS} blocks; moving costs. One "
        "that changes more often than the optimum may can beat it.",
        f"paid / optimum with {BLOCKS - 1} changes", "lower", 8_000,
        worlds=lambda rounds, seeds: stacked([followers(rounds, s, FORECASTS, BLOCKS) for s in seeds]),
        players=_mixtures, meter=lambda world, rounds: Competitive(world, BLOCKS - 1),
    ),
    Problem(
        "predictions-asked", "The same, but one forecast is heard in a step.",
        f"paid / optimum with {BLOCKS - 1} changes", "lower", 8_000,
        worlds=lambda rounds, seeds: stacked([followers(rounds, s, FORECASTS, BLOCKS).asked() for s in seeds]),
        players=_asking, meter=lambda world, rounds: Competitive(world, BLOCKS - 1),
    ),
    _control(CartPole(), "A pole on a cart; 1 a step until it falls, at most 500.", 30_000),
    _control(Acrobot(), "Two links to be swung up; -1 a step.", 30_000),
    _control(Pendulum(), "A pendulum to be held up by a torque; 200 steps.", 30_000),
)  # fmt: skip
"""All problems of the arena."""
