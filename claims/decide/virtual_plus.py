"""Virtual+ finds more of the best k than other rules with one threshold, and makes an online attack stronger.

A. Random orders of distinct values: the share of the true k best that each rule picks.
B. The same with values that are noisy.
C. A stream of 1000 real digits, each attacked on a small convolutional network; k of them are submitted to another
   network. Networks and digits change with the seed, each with 200 random orders.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from anabranch import data
from anabranch.cell import noise
from anabranch.claim import Comparison, Size
from anabranch.decide.virtual_plus import (
    AttackStream,
    Optimistic,
    RandomPicks,
    SingleRef,
    Virtual,
    VirtualPlus,
    competitive_ratio,
    fgsm,
    fooled,
    pgd,
    picks,
)
from anabranch.fit import fit

PAPER = "best of the rules with one threshold for k < 5 (theory)"
FIRST_SEED = 100  # those below were used to try the code
EPSILON = 0.1
"""Of the attacks. With the usual 0.3, any attacked digit fools the target (98 %): there is nothing to choose."""
ATTACKS = {"FGSM": fgsm(EPSILON), "PGD": pgd(EPSILON)}  # made once, so that they are compiled once
FIRST, RELU, FLAT = (eqx.nn.Lambda(f) for f in (lambda x: x[None], jax.nn.relu, jnp.ravel))


# A, B. Random orders


@eqx.filter_jit
def found(picker, values, truth):
    """The mean share of the true k best that is picked, over orders (N, n)."""
    return jax.vmap(lambda v, y: competitive_ratio(picks(picker, v), y, picker.k))(values, truth).mean()


@eqx.filter_jit
def random_orders(key, orders: int, n: int):
    return jax.random.uniform(key, (orders, n))


def shares(pickers, size: Size, n: int, orders: int, seeds: int) -> dict:
    """For each picker its shares by seed; all see the same orders."""
    out = {name: [] for name in pickers}
    for seed in size.seeds(seeds):
        values = random_orders(jax.random.PRNGKey(FIRST_SEED + seed), orders, n)
        for name, picker in pickers.items():
            out[name].append(float(found(picker, values, values)))
    return out


def noisy(pickers, size: Size, n: int, orders: int, scale: float) -> dict:
    """The same for values that are a permutation of 0 … n - 1 with normal noise of this scale."""
    out = {name: [] for name in pickers}
    for seed in size.seeds(10):
        draw = np.random.default_rng(FIRST_SEED + seed)
        truth = draw.permuted(np.tile(np.arange(n, dtype=np.float32), (orders, 1)), axis=1)
        values = truth + np.float32(scale) * draw.standard_normal(truth.shape, np.float32)
        for name, picker in pickers.items():
            out[name].append(float(found(picker, jnp.asarray(values), jnp.asarray(truth))))
    return out


# C. Digits


class Convolution(eqx.Module):
    """5 x 5 with stride 2, as a matrix product: within a compiled loop a convolution is ten times slower on a CPU."""

    linear: eqx.nn.Linear

    def __init__(self, before: int, after: int, *, key):
        self.linear = eqx.nn.Linear(25 * before, after, key=key)

    def __call__(self, x, key=None):
        n = (x.shape[-1] - 5) // 2 + 1
        patches = [x[:, i : i + 2 * n : 2, j : j + 2 * n : 2][:, :n, :n] for i in range(5) for j in range(5)]
        flat = jnp.stack(patches).reshape(-1, n * n)
        return (self.linear.weight @ flat + self.linear.bias[:, None]).reshape(-1, n, n)


def surrogate(key) -> eqx.nn.Sequential:
    """A classifier of digits (28, 28) in [0, 1]."""
    a, b, c = jax.random.split(key, 3)
    first, second = Convolution(1, 8, key=a), Convolution(8, 16, key=b)
    return eqx.nn.Sequential([FIRST, first, RELU, second, RELU, FLAT, eqx.nn.Linear(256, 10, key=c)])


def target(key) -> eqx.nn.Sequential:
    """Another one."""
    a, b = jax.random.split(key)
    return eqx.nn.Sequential([FLAT, eqx.nn.Linear(784, 100, key=a), RELU, eqx.nn.Linear(100, 10, key=b)])


def cross_entropy(net, batch, key):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(net)(x), y).mean()


@eqx.filter_jit
def fool_rates(picker, values, wrong, keys):
    """Over random orders: how many of the picked fool the target, and how many were picked."""

    def one(key):
        order = jax.random.permutation(noise(key, 0, "order"), values.shape[0])
        picked = picks(picker, values[order], noise(key, 0, "picks"))
        return (picked & wrong[order]).sum(), picked.sum()

    return jax.vmap(one)(keys)


@eqx.filter_jit
def stream(cell, key, x, y):
    return cell.advance(cell.init(key=key), (x, y))[1]


def digits(size: Size, seed: int) -> dict:
    x, y = data.mnist()
    train, n, orders, steps = (600, 200, 20, 30) if size.smoke else (6000, 1000, 200, 900)
    draw = np.random.default_rng(FIRST_SEED + seed).permutation(len(x))
    x, y = jnp.asarray(x[draw]), jnp.asarray(y[draw])
    key = jax.random.PRNGKey(FIRST_SEED + seed)
    nets = []
    for make in (surrogate, target):
        net = make(noise(key, 0, make.__name__))
        net, _ = fit(cross_entropy, net, (x[:train], y[:train]), optax.adam(1e-3), steps, batch_size=64, key=key)
        nets.append(net)
    x, y, keys = x[train : train + n], y[train : train + n], jax.random.split(key, orders)
    out = {"errors": float(fooled(nets[1], x, y).mean())}
    for name, attack in list(ATTACKS.items())[: 1 if size.smoke else 2]:
        moved = stream(AttackStream(nets[0], VirtualPlus(n, 10), attack), key, x, y)
        wrong = fooled(nets[1], moved.x, y)
        for k in (10,) if size.smoke else (10, 100):
            best = float(wrong[jax.lax.top_k(moved.value, k)[1]].sum())
            for rule in (VirtualPlus, RandomPicks):
                picker = VirtualPlus(n, k, exhaust=True) if rule is VirtualPlus else RandomPicks(n, k)
                hit, picked = fool_rates(picker, moved.value, wrong, keys)
                out[name, k, rule.__name__] = float(hit.sum() / picked.sum())
                out[name, k, rule.__name__, "ratio"] = float(hit.mean()) / best
            order = jnp.argsort(y)
            picked = picks(VirtualPlus(n, k, exhaust=True), moved.value[order])
            out[name, k, "VirtualPlus", "sorted"] = float((picked & wrong[order]).sum() / picked.sum())
    return out


def exact(size: Size) -> list[Comparison]:
    orders, out = 200 if size.smoke else 20_000, []
    for k in (2,) if size.smoke else (2, 3, 4, 5, 10):
        got = shares({rule: rule(100, k, 37) for rule in (VirtualPlus, Virtual, Optimistic)}, size, 100, orders, 10)
        note = f"Optimistic {np.mean(got[Optimistic]):.4f}" if k == 10 else ""
        limits = {Virtual: (0.04, (2, 3, 4, 5, 10)), Optimistic: (0.01, (2, 3, 4, 5))}
        for rule, (limit, ks) in limits.items():
            if k in ks:
                metric = f"share of the best {k} of 100 ({rule.__name__})"
                out.append(Comparison(metric, got[VirtualPlus], got[rule], limit, paper=PAPER, note=note))
    n, orders, reported = (100, 200, ()) if size.smoke else (2000, 10_000, (4, 5))
    for k in (2,) if size.smoke else (2, 3):
        got = shares({rule: rule(n, k, t) for rule, t in long(n)}, size, n, orders, 10)
        metric = f"share of the best {k} of {n} (SingleRef)"
        out.append(Comparison(metric, got[VirtualPlus], got[SingleRef], 0.005, paper=PAPER))
    for k in reported:  # the paper says less than 5; at 4 the two are too close
        got = shares({rule: rule(n, k, t) for rule, t in long(n)}, size, n, orders, 3)
        out[-1].note += f"k = {k}: Virtual+ {np.mean(got[VirtualPlus]):.4f}, SingleRef {np.mean(got[SingleRef]):.4f}. "
    return out


def long(n: int) -> list:
    """Virtual+ watches 0.38 of a long stream, as the official code; SingleRef what is best for it."""
    return [(VirtualPlus, int(0.38 * n)), (SingleRef, None)]


def under_noise(size: Size) -> list[Comparison]:
    orders, scales, out = (200, (1, 5), []) if size.smoke else (20_000, (1, 5, 10), [])
    got = {s: noisy({rule: rule(100, 10, 37) for rule in (VirtualPlus, Virtual)}, size, 100, orders, s) for s in scales}
    for scale in scales:
        metric = f"share of the best 10 of 100, noise {scale} (Virtual)"
        out.append(Comparison(metric, got[scale][VirtualPlus], got[scale][Virtual], 0.0))
    for low, high in itertools.pairwise(scales):
        metric = f"Virtual+ with noise {low} (with noise {high})"
        out.append(Comparison(metric, got[low][VirtualPlus], got[high][VirtualPlus], 0.0))
    return out


def attacks(size: Size) -> list[Comparison]:
    runs = [digits(size, seed) for seed in size.seeds(5)]
    mean = {key: np.mean([run[key] for run in runs]) for key in runs[0]}
    note = f"errors of the target on clean digits {mean['errors']:.3f}; digits sorted by class: "
    note += ", ".join(f"{key[1]} of 1000 by {key[0]} {v:.3f}" for key, v in mean.items() if key[-1] == "sorted")
    if not size.smoke:
        weak, strong = mean["FGSM", 10, "VirtualPlus"], mean["PGD", 10, "RandomPicks"]
        note += f". Virtual+ with the weak FGSM fools {weak:.3f}, random picks with the strong PGD {strong:.3f}"
    out = []
    for attack, k in dict.fromkeys(key[:2] for key in runs[0] if key != "errors"):
        ours, theirs, ratio = (
            [run[key] for run in runs]
            for key in ((attack, k, "VirtualPlus"), (attack, k, "RandomPicks"), (attack, k, "VirtualPlus", "ratio"))
        )
        name = f"{attack}, {k} of 1000"
        out.append(Comparison(f"fooled, {name} (random picks)", ours, theirs, 1.1, kind="ratio", note=note))
        best = [1.0] * len(ratio)
        out.append(Comparison(f"fooled, {name} (the best on the surrogate)", ratio, best, 0.7, kind="ratio"))
        note = ""
    return out


def experiment(size: Size) -> list[Comparison]:
    return [*exact(size), *under_noise(size), *attacks(size)]
