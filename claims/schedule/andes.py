"""Andes: readers have it better under load than with first come, first served, at little cost in tokens.

Simulated: conversations of Azure's trace (600 requests) on OPT-13B under vLLM's published times, a cache of 24,000
tokens, caches sent away at 25 GB/s; expectations of 1 s and 3.3 to 6 tokens a second, drawn for each reader. The load
is a multiple of what FCFS serves with a mean quality of 0.9. Baselines: FCFS, chunks of 512, and the shortest request
first by lengths that nobody knows. Horizons and caps on preemptions are varied, and the greedy choice is compared with
the best by integer programming.
"""

import dataclasses

import numpy as np
from scipy.optimize import LinearConstraint, milp

from anabranch.claim import Comparison, Size
from anabranch.schedule.andes import Andes, _filled, qoes
from anabranch.schedule.baselines import FCFS, SRPT, Chunked
from anabranch.schedule.cluster import VLLM
from anabranch.schedule.scheduler import Engine, Scheduler
from anabranch.schedule.serving import Result, simulate_serving
from anabranch.schedule.workload import Workload

FIRST_SEED = 100
ENGINE = Engine(VLLM, kv_tokens=24_000)


def requests(size: Size, seed: int) -> Workload:
    load = Workload.azure("conv")
    start = 600 * seed % 18_000
    load = load.take(slice(start, start + (40 if size.smoke else 600)))
    return dataclasses.replace(load, tds=np.random.default_rng(seed).uniform(3.3, 6.0, len(load)))


def mean(result: Result) -> float:
    values = qoes(result)
    return float(values[len(values) // 10 :].mean())


def capacity(load: Workload, scheduler: Scheduler, seed: int) -> float:
    """The rate at which the mean quality falls to 0.9."""
    low, high = 0.3, 6.0
    while high - low > 0.03 * high:
        rate = (low + high) / 2
        good = mean(simulate_serving(load.poisson(rate, seed), [ENGINE], scheduler)) >= 0.9
        low, high = (rate, high) if good else (low, rate)
    return low


def greedy(cases: int) -> Comparison:
    """The greedy choice over the best one, where memory decides."""
    rng, shares = np.random.default_rng(FIRST_SEED), []
    for _ in range(cases):
        gain, need = rng.uniform(0, 1, 20), rng.integers(5, 60, 20)
        room = int(rng.uniform(0.2, 0.8) * need.sum())
        taken = _filled(np.argsort(-gain / need), need, np.full(20, room), 20)
        best = milp(-gain, constraints=[LinearConstraint(need[None], ub=room)], integrality=1, bounds=(0, 1))
        shares.append(gain[taken].sum() / -best.fun)
    return Comparison(
        "gain of the greedy choice over the best", shares, [1.0] * cases, 0.95, kind="ratio",
        note=f"{cases} choices among 20; worst {min(shares):.3f}",
    )  # fmt: skip


def experiment(size: Size) -> list[Comparison]:
    seeds = [FIRST_SEED + i for i in size.seeds(5)]
    andes, fcfs = Andes(VLLM), FCFS()
    loads = {seed: requests(size, seed) for seed in seeds}
    served = {seed: capacity(load, fcfs, seed) for seed, load in loads.items()}

    def at(share: float, scheduler: Scheduler, some: list[int] = seeds) -> list[Result]:
        return [simulate_serving(loads[s].poisson(share * served[s], s), [ENGINE], scheduler) for s in some]

    quality = lambda results: [mean(one) for one in results]
    runs = {share: (at(share, andes), at(share, fcfs)) for share in (0.6, 1.2, 1.5)}
    out = [
        Comparison(
            f"mean quality over FCFS, at {share} of its load", quality(runs[share][0]), quality(runs[share][1]), least,
            kind="ratio", paper="average QoE up to 3.2 x at high rates" if share == 1.5 else "",
        )
        for share, least in ((1.2, 1.2), (1.5, 1.5))
    ]  # fmt: skip
    ours, theirs = runs[1.5]
    out += [
        Comparison(
            "rate with a mean quality of 0.9, over FCFS", [capacity(loads[s], andes, s) for s in seeds[:3]],
            [served[s] for s in seeds[:3]], 1.03, kind="ratio", paper="up to 1.6 x the rate at the same QoE",
        ),
        Comparison(
            "tokens a second over FCFS, at 1.5", [r.throughput for r in ours], [r.throughput for r in theirs], 0.85,
            kind="ratio", paper="throughput may drop by up to 10 %",
        ),
        Comparison(
            "preemptions for each request, at 1.5", [r.preemptions / len(r.workload) for r in ours], [0.0] * len(seeds),
            1.1, better="lower", note="the cap is 1",
        ),
        Comparison(
            "mean quality less that of FCFS, at 0.6", quality(runs[0.6][0]), quality(runs[0.6][1]), -0.01,
            note="never worse where there is room for all",
        ),
        greedy(10 if size.smoke else 200),
    ]  # fmt: skip
    others: dict[str, Scheduler] = {"chunks": Chunked(), "shortest first": SRPT()}
    if not size.smoke:
        others |= {f"P={p:g}": Andes(VLLM, preemptions=p) for p in (0, np.inf)}
        others |= {f"horizon {h} s": Andes(VLLM, horizon=h) for h in (5.0, 60.0)}
    said = [f"{name} {mean(at(1.2, one, seeds[:1])[0]):.3f}" for name, one in others.items()]
    out[0].note = (
        f"other settings at 1.2, one seed: Andes {mean(runs[1.2][0][0]):.3f}, FCFS {mean(runs[1.2][1][0]):.3f}, "
        + ", ".join(said)
    )
    return out
