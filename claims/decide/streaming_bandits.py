"""Finding an ε-best arm in one pass and playing it has less regret than exploring all arms equally.

A. The paper's synthetic streams: Bernoulli arms of 500 or 5000, 1000 pulls an arm or (the official setting) 1000 k².
   Means are *clear-cut* (a truncated normal below 0.8 and one arm of 0.82), *mix-in* (uniform) or *ascending* (uniform,
   the best come last). Regret is exact for each pull. 200 runs (the paper: 50), since single runs vary much where pulls
   are few. What is compared is the ratio of mean regrets, so both sides are divided by the mean of the baseline.
B. How regret grows with the horizon.
C. Real values, reported: 1682 films in random order, the reward is whether a random rater gave 4 or 5 stars of 5.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from anabranch import data
from anabranch.claim import Comparison, Size
from anabranch.decide.arm_stream import ArmStream, PullRegret, Pulls, peak_memory
from anabranch.decide.rates import slope
from anabranch.decide.streaming_bandits import KingOfArms, NaiveEps, Promotion, UniformExploration
from anabranch.drive import play

FIRST_SEED = 100  # those below were used while writing
RULES = {
    "uniform": UniformExploration,
    "tower": Promotion,
    "star": lambda k, horizon: Promotion(k, horizon, "star"),
    "loglog": lambda k, horizon: Promotion(k, horizon, "loglog"),
    "king": KingOfArms,
    "naive": NaiveEps,
}


def arms(setting: str, k: int, seed: int) -> np.ndarray:
    """The means (k,) of one stream, in order."""
    draw = np.random.default_rng(seed)
    if setting == "clear-cut":
        means = stats.truncnorm(-5, 3, 0.5, 0.1).rvs(k, random_state=draw)
        means[draw.integers(k)] = 0.82
        return means
    means = draw.uniform(size=k)
    return np.sort(means) if setting == "ascending" else means


@eqx.filter_jit
def runs(policy, means, keys):
    """Regret (runs,), and the first run's actions."""

    def one(means, key, keep=False):
        world = ArmStream(means, policy.horizon)
        result = play(policy, world, policy.rounds, key=key, meters={"regret": PullRegret(world)}, keep=keep)
        return (result.ticks.decision.action.arm, result.ticks.feedback.cost[:, 0]) if keep else result.scores["regret"]

    return jax.vmap(one)(means, keys), one(means[0], keys[0], keep=True)


def regret(rule: str, means: np.ndarray, horizon: float, seeds: list[int]) -> np.ndarray:
    policy = RULES[rule](means.shape[1], jnp.float32(horizon))
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
    found, first = runs(policy, jnp.asarray(means, jnp.float32), keys)
    peak = peak_memory(Pulls(*first))
    assert peak <= policy.memory, f"{rule} had {peak} arms in store, it states {policy.memory}"
    return np.asarray(found, float)


def synthetic(size: Size, rules: list[str]) -> list[Comparison]:
    seeds = [FIRST_SEED + seed for seed in size.seeds(200)]
    out = []
    for k in (40,) if size.smoke else (500, 5000):
        for horizon in (1000 * k,) if size.smoke else (1000 * k, 1000 * k**3):
            for setting in ("mix-in",) if size.smoke else ("clear-cut", "mix-in", "ascending"):
                means = np.stack([arms(setting, k, seed) for seed in seeds])
                found = {rule: regret(rule, means, horizon, seeds) for rule in rules}
                usual = found["uniform"].mean()
                share = {rule: values / usual for rule, values in found.items()}
                note = ", ".join(f"{rule} {values.mean():.3f}" for rule, values in share.items() if rule != "uniform")
                for rule, limit in (("tower", 0.7), ("star", 1.3 if setting == "ascending" else 0.95)):
                    if rule in rules:
                        out.append(
                            Comparison(
                                f"regret / mean regret of uniform exploration, {rule}, {setting}, "
                                f"k = {k}, T = {horizon:.3g}",
                                share[rule],
                                share["uniform"],
                                limit - 1,
                                better="lower",
                                paper="less in all settings, up to 70 % less",
                                note=f"ratios of means: {note}" if rule == "tower" else "",
                            )
                        )
    return out


def growth(size: Size) -> list[Comparison]:
    k, seeds = 40 if size.smoke else 500, [FIRST_SEED + 1000 + seed for seed in size.seeds(50)]
    horizons = [k * 10.0**e for e in range(3, 8)]
    means = np.stack([arms("mix-in", k, seed) for seed in seeds])
    found = {
        rule: slope(horizons, np.stack([regret(rule, means, horizon, seeds) for horizon in horizons], axis=1))
        for rule in (("tower",) if size.smoke else ("tower", "star", "uniform"))
    }
    note = f"T = k · 10^3 to k · 10^7, k = {k}: " + ", ".join(f"{rule} {fit}" for rule, fit in found.items())
    zeros = np.zeros(len(seeds))
    return [
        Comparison(
            f"exponent of tower's regret in T, {bound}",
            found["tower"].values,
            zeros,
            limit,
            better=better,
            paper="2/3",
            note=note if better == "lower" else "",
        )
        for bound, better, limit in (("at most", "lower", 0.72), ("at least", "higher", 0.60))
    ]


def films(size: Size) -> str:
    table = np.loadtxt(data.root() / "movielens100k" / "u.data", dtype=int)
    liked = np.bincount(table[:, 1] - 1, table[:, 2] >= 4) / np.bincount(table[:, 1] - 1)
    seeds = [FIRST_SEED + 2000 + seed for seed in size.seeds(20)]
    means = np.stack([np.random.default_rng(seed).permutation(liked) for seed in seeds])
    found = {rule: regret(rule, means, 1e6, seeds).mean() for rule in RULES}
    shares = ", ".join(f"{rule} {value / found['uniform']:.3f}" for rule, value in found.items())
    return f"; 1682 films, T = 10^6, {len(seeds)} orders: {shares}"


def experiment(size: Size) -> list[Comparison]:
    found = synthetic(size, ["uniform", "tower"] if size.smoke else list(RULES))
    if not size.smoke:
        found[0].note += films(size)
    return [*found, *growth(size)]
