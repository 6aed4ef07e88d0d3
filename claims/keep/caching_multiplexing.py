"""Caching by least expected cost and choosing the model, jointly, is many times cheaper than LFU and the large model.

A. The paper's synthetic test: 20 queries, a cache of 8, 10,000 requests by a power law, costs 1 or 1 + ratio.
B. Two real models on real digits: logistic regression and a convolutional network, at the CPU time that each takes.
C. A real block trace where a miss costs its bytes: GDSF and LEC against LRU and LFU.
"""

import csv
import gzip
import statistics
import time
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from anabranch import data
from anabranch.claim import Comparison, Size
from anabranch.keep.base import GDSF, LFU, LRU, requests
from anabranch.keep.caching_multiplexing import LEC, Always, CachedMultiplexer, Multiplexer, Query, optimum

FIRST_SEED = 100  # those below were used to set the thresholds


def arms(capacity: int, penalty: float, smoke: bool) -> dict[str, CachedMultiplexer]:
    """What is compared: which queries are cached, and which model serves a miss."""
    large, learned = Always(penalty=penalty), Multiplexer(penalty=penalty)
    compared = {
        "LFU + large": CachedMultiplexer(LEC(capacity), large, cost_aware=False),
        "LFU + learned": CachedMultiplexer(LEC(capacity), learned, cost_aware=False),
        "LEC + learned": CachedMultiplexer(LEC(capacity), learned),
    }
    return compared if smoke else compared | {"LEC + large": CachedMultiplexer(LEC(capacity), large)}  # reported only


@eqx.filter_jit
def replay(cell, queries: Query):
    """The last state of each row of queries, and what was served."""
    return jax.vmap(lambda xs: cell.advance(cell.init(), xs))(queries)


def serve(cells: dict[str, CachedMultiplexer], queries: Query, p: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Cost per request, and the probability `p` (seeds, n) of what is cached in the end; queries (seeds, T)."""
    ids = [{key: i for i, key in enumerate(dict.fromkeys(row))} for row in np.asarray(queries.key).tolist()]
    out = {}
    for name, cell in cells.items():
        state, served = replay(cell, queries)
        kept = np.asarray(state.key)[:, : cell.cache.capacity].tolist()
        mass = [sum(row_p[known[key]] for key in row if key in known) for row, known, row_p in zip(kept, ids, p)]
        out[name] = {"cost": np.asarray(served.cost, float).mean(1), "mass": np.array(mass)}
    return out


def popularity(keys: np.ndarray) -> np.ndarray:
    """The share of each key among the requests of its row (seeds, T), in order of first request, padded with 0."""
    rows = [[row.count(key) / len(row) for key in dict.fromkeys(row)] for row in keys.tolist()]
    return np.array([row + [0.0] * (max(map(len, rows)) - len(row)) for row in rows])


def synthetic(seeds: range, rounds: int, ratio: float, alpha: float) -> Query:
    """Requests of all seeds. Both costs are seen when the small model ran: it "fails" always, at no penalty."""
    keys, costs = [], []
    for seed in seeds:
        draw = np.random.default_rng(FIRST_SEED + seed)
        mean = 1 + ratio * draw.integers(0, 2, (20, 2))
        key = (20 * draw.power(alpha, rounds)).astype(int)
        keys.append(key)
        costs.append(np.maximum(0.1, mean[key] + draw.normal(size=(rounds, 2))))
    key = np.array(keys)
    return Query(requests(key).key, jnp.asarray(np.array(costs), jnp.float32), jnp.zeros(key.shape, bool))


def known(queries: Query, capacity: int) -> np.ndarray:
    """Cost per request (seeds,) of the offline optimum, which knows how often each query comes and what it costs."""
    out = []
    for key, cost in zip(np.asarray(queries.key), np.asarray(queries.cost, float)):
        n = np.maximum(np.bincount(key, minlength=20), 1)
        mean = np.stack([np.bincount(key, cost[:, model], 20) / n for model in (0, 1)], 1)
        out.append(optimum(n / len(key), mean, capacity)[2])
    return np.array(out)


def paper_test(size: Size) -> list[Comparison]:
    out, seeds = [], size.seeds(10)
    cells = arms(8, penalty=0.0, smoke=size.smoke)
    for ratio, factor, paper in ((100.0, 10.0, "up to 50 × at ratio 100"), (1.5, 1.3, "")):
        every = []
        for alpha in (0.5,) if size.smoke else (0.5, 0.8):
            queries = synthetic(seeds, 500 if size.smoke else 10_000, ratio, alpha)
            arm, best = serve(cells, queries, popularity(np.asarray(queries.key))), known(queries, 8)
            ours, baseline = arm["LEC + learned"]["cost"], arm["LFU + large"]["cost"]
            every += zip(ours / baseline, ours, baseline, best)
            note = ", ".join(f"{n} {a['cost'].mean():.3g} (caches {a['mass'].mean():.0%})" for n, a in arm.items())
            note += f", offline optimum {best.mean():.3g}"
            metric = f"cost per request, ratio {ratio:g}, α {alpha}: LEC + learned against LFU + large"
            out.append(Comparison(metric, ours, baseline, 1 / factor, "ratio", "lower", paper, note))
        _, ours, baseline, best = max(every)
        short = sum(row[0] > 1 / factor for row in every)
        note = f"{len(every) - short} of {len(every)} below the threshold; in the worst the offline optimum is at "
        note += f"{best / baseline:.3g} of LFU + large, and above the threshold in "
        note += f"{sum(row[3] / row[2] > 1 / factor for row in every)} of {len(every)}"
        metric = f"the worst of all seeds and α at ratio {ratio:g}"
        out.append(Comparison(metric, [ours], [baseline], 1 / factor, "ratio", "lower", "", note))
    return out


def digits() -> tuple[np.ndarray, np.ndarray]:
    """10,000 MNIST digits (28, 28, 1) in [0, 1], and their labels."""
    folder = data.root() / "mnist"
    images = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return images.reshape(-1, 28, 28, 1).astype(np.float32) / 255, labels.astype(np.int32)


def logistic(w, x):
    return x.reshape(len(x), -1) @ w["w"] + w["b"]


def network(w, x):
    """Two 5 x 5 convolutions, each with a pooling by 2, and a dense layer."""
    for name in ("first", "second"):
        x = jax.lax.conv_general_dilated(x, w[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(len(x), -1) @ w["w"] + w["b"]


def trained(model, weights, x, y, epochs: int, rate: float):
    """The weights after `epochs` of Adam on batches of 100."""
    optimiser = optax.adam(rate)

    def loss(w, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(w, x), y).mean()

    @jax.jit
    def step(w, state, x, y):
        updates, state = optimiser.update(jax.grad(loss)(w, x, y), state)
        return optax.apply_updates(w, updates), state

    state = optimiser.init(weights)
    for epoch in range(epochs):
        for rows in np.random.default_rng(epoch).permutation(len(x)).reshape(-1, 100):
            weights, state = step(weights, state, x[rows], y[rows])
    return weights


def cpu_seconds(model, weights, x, runs: int) -> float:
    """CPU time of one answer to one image, in a compiled call of its own: the median of runs of 100."""
    call = jax.jit(model)
    call(weights, x).block_until_ready()
    times = []
    for _ in range(runs):
        start = time.process_time()
        for _ in range(100):
            call(weights, x).block_until_ready()
        times.append((time.process_time() - start) / 100)
    return statistics.median(times)


def real_models(size: Size) -> list[Comparison]:
    x, y = digits()
    x, held_x, y, held_y = x[:8000], x[8000:], y[:8000], y[8000:]
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    small = {"w": jnp.zeros((784, 10)), "b": jnp.zeros(10)}
    large = {
        "first": jax.random.normal(keys[0], (5, 5, 1, 16)) * (2 / 25) ** 0.5,
        "second": jax.random.normal(keys[1], (5, 5, 16, 32)) * (2 / 400) ** 0.5,
        "w": jax.random.normal(keys[2], (7 * 7 * 32, 10)) * (1 / 1568) ** 0.5,
        "b": jnp.zeros(10),
    }
    small = trained(logistic, small, x, y, 1 if size.smoke else 5, 1e-3)
    large = trained(network, large, x[: 1000 if size.smoke else None], y, 1 if size.smoke else 3, 1e-3)
    right = {name: np.asarray(jax.jit(model)(w, held_x)).argmax(1) == held_y
             for name, model, w in (("small", logistic, small), ("large", network, large))}  # fmt: skip
    runs = 5 if size.smoke else 31
    cost = np.array([cpu_seconds(logistic, small, held_x[:1], runs), cpu_seconds(network, large, held_x[:1], runs)])

    rounds, seeds = 500 if size.smoke else 10_000, size.seeds(10)
    hashes = np.array([zlib.crc32(image.tobytes()) for image in held_x], np.int64)
    picks = []
    for seed in seeds:
        draw = np.random.default_rng(FIRST_SEED + seed)
        picks.append(draw.permutation(len(held_x))[:100][(100 * draw.power(0.8, rounds)).astype(int)])
    pick = np.array(picks)
    microseconds = jnp.broadcast_to(jnp.asarray(1e6 * cost, jnp.float32), (*pick.shape, 2))
    queries = Query(requests(hashes[pick]).key, microseconds, jnp.asarray(right["small"][pick]))
    arm = serve(arms(40, penalty=2.0, smoke=size.smoke), queries, popularity(hashes[pick]))
    note = (
        f"small {1e6 * cost[0]:.0f} µs, {right['small'].mean():.1%} right; large {1e6 * cost[1]:.0f} µs, "
        f"{right['large'].mean():.1%} right; µs per request: "
        + ", ".join(f"{n} {a['cost'].mean():.3g} (caches {a['mass'].mean():.0%})" for n, a in arm.items())
    )
    out = []
    for baseline, factor, paper in (("LFU + large", 1.5, "1.8 × latency at ratio 1.85"), ("LFU + learned", 1.1, "")):
        metric = f"CPU time on digits, µs per request: LEC + learned against {baseline}"
        ours = arm["LEC + learned"]["cost"], arm[baseline]["cost"]
        out.append(Comparison(metric, *ours, 1 / factor, "ratio", "lower", paper, note))
        note = ""
    return out


def real_trace(size: Size) -> list[Comparison]:
    with (data.root() / "cache" / "cloudPhysicsIO.csv").open() as file:
        rows = [(int(row["lbn"]), int(row["size"])) for row in csv.DictReader(file)]
    keys, cost = np.array(rows[: 5000 if size.smoke else None]).T
    xs, out = requests(keys, cost), []
    for capacity in (500,) if size.smoke else (500, 2000):
        missed = {}
        for cls in (LRU, LFU, GDSF, LEC):
            cell = cls(capacity)
            hit = jax.jit(lambda xs, cell=cell: cell.advance(cell.init(), xs)[1].hit)(xs)
            missed[cls.__name__] = float(cost[~np.asarray(hit)].sum() / cost.sum())
        note = ", ".join(f"{name} {share:.4f}" for name, share in missed.items())
        for name in ("LRU", "LFU"):
            metric = f"share of bytes missed, cloudPhysicsIO, {capacity} slots: GDSF against {name}"
            out.append(Comparison(metric, [missed["GDSF"]], [missed[name]], 1.0, "ratio", "lower", note=note))
            note = ""
    return out


def experiment(size: Size) -> list[Comparison]:
    return paper_test(size) + real_models(size) + real_trace(size)
