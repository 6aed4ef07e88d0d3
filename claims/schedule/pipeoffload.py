"""PipeOffload: activations go to the host and come back while passes run, and the peak falls at no cost of time.

Simulated, F, B and W of a chunk taking 1 each, on 4, 8 and 16 devices with four times as many micro-batches. k is the
time of a transfer over that of F, B and W of a chunk. Three schedules, each with what it would hold without transfers:
interleaved 1F1B, and grouped, in groups of p and of p / 2. A rule counts the settings, of all there are, for which it
holds; its threshold is all of them.

Placement follows the authors' code, which gives up if an activation could not be back in time; here that one stays, so
that a step never takes longer and the question is what is left of the peak. Transfers are only simulated: the executed
gradients are those of the schedule without them. The k of real models are in the notes, reckoned for an A100 at half of
312 TFLOP/s with 20 GB/s to its host, not measured.
"""

from typing import NamedTuple

from anabranch.claim import Comparison, Size
from anabranch.plan import bubble, check, simulate
from anabranch.schedule import proof
from anabranch.schedule.base import Schedule, interleaved
from anabranch.schedule.pipeoffload import grouped_interleaved, offload


class Found(NamedTuple):
    """Step and peak with transfers, over those without."""

    p: int
    name: str
    step: float
    peak: float


def sizes(ps: tuple[int, ...]) -> Comparison:
    """Idle time and peaks of the grouped schedules as found, and as the authors' generator has them."""
    gap, count = 0.0, 0
    for p in ps:
        for v in (2, 3, 4):
            for group, idle, peak in ((p, 2 * (p - 1), p * v), (p // 2, p // 2 * v + 3 * p // 2 - 2, p // 2 * (v + 1))):
                trace = simulate(check(grouped_interleaved(p, 4 * p, v, group).plan()))
                gap = max(gap, abs(bubble(trace).makespan - idle), abs(trace.peak.max() - peak))
                count += 1
    return Comparison(
        "largest difference of idle time and peaks from the generator's", [gap], [0], 0, better="lower",
        note=f"{count} settings",
    )  # fmt: skip


def bases(p: int, v: int) -> list[Schedule]:
    m = 4 * p
    return [interleaved(p, m, v), grouped_interleaved(p, m, v, p), grouped_interleaved(p, m, v, p // 2)]


def offloaded(ps: tuple[int, ...], vs: tuple[int, ...], k: float, half: bool) -> list[Found]:
    """All settings with half of the chunks or all of them offloaded."""
    out = []
    for p in ps:
        for v in vs:
            for given in bases(p, v):
                plan = given.plan()
                before, after = simulate(plan), simulate(check(offload(plan, v // 2 if half else v, 3 * k)))
                step, peak = after.makespan / before.makespan, after.peak[:p].max() / before.peak.max()
                name = given.name.removesuffix(f", v={v}")
                out.append(Found(p, f"{name}, v={v}, p={p}", step, peak))
    return out


def counted(metric: str, found: list[Found], most: float, strict: bool = False, paper: str = "") -> Comparison:
    """For how many settings the step grows by at most 3 %, and at most so much of the peak is left."""
    good = [one.step <= 1.03 and (one.peak < most if strict else one.peak <= most) for one in found]
    left = "; ".join(f"{one.name}: {one.peak:.0%}" for one in found)
    return Comparison(metric, [sum(good)], [0], len(found), paper=paper, note=f"left of the peak: {left}")


def ratios() -> str:
    """k of a layer of Llama models: bytes that F keeps over the link, over the time of F, B and W."""
    rows = []
    for name, width, inner, kv in (("7B", 4096, 11008, 4096), ("13B", 5120, 13824, 5120), ("70B", 8192, 28672, 1024)):
        said = []
        for tokens in (4096, 8192, 16384, 32768):
            matmuls = 2 * tokens * (2 * width**2 + 2 * width * kv + 3 * width * inner)
            flops = 3 * matmuls + 7 * tokens**2 * width  # attention, causal: 2 forward, 5 backward with recomputing
            # What norms, attention, its projection and the gate are given; their outputs are computed again.
            kept = 2 * tokens * (4 * width + 2 * kv + 2 * inner)
            said.append(f"{kept / 20e9 / (flops / 156e12):.2f}")
        rows.append(f"{name} {'/'.join(said)}")
    return f"k of a Llama layer with 4k/8k/16k/32k tokens: {', '.join(rows)}"


def experiment(size: Size) -> list[Comparison]:
    ps, vs = ((4,), (4,)) if size.smoke else ((4, 8, 16), (2, 4))
    everything = offloaded(ps, (4,), 0.5, half=False)
    half = offloaded(ps, (4,), 0.5, half=True)
    slow = offloaded(ps, vs, 0.8, half=True)
    said = "grouped_interleaved(2, 2, 1, 2)" if size.smoke else "grouped_interleaved(4, 8, 2, 4)"
    error = proof.run(said)[said]["error"]
    out = [
        sizes((4,) if size.smoke else (4, 8)),
        counted(
            "settings: k=0.5, all chunks, step +3 % at most, peak halved", everything, 0.5,
            paper="at least half, potentially all of the activations at negligible overhead",
        ),
        counted("settings: k=0.8, half of the chunks, step +3 % at most (whatever could not be back stays)", slow, 1.0),
        counted(
            "settings: k=0.5, half of the chunks, peak more than halved", half, 0.5, strict=True,
            paper="peak activation memory decreases in a better-than-linear manner",
        ),
        Comparison(
            "relative error of executed gradients", [error], [0], 1e-5, better="lower", note=f"{said}; {ratios()}"
        ),
    ]  # fmt: skip
    if not size.smoke:
        for k, few in ((0.25, True), (0.25, False), (1.0, True)):
            rows = "; ".join(f"{one.name}: {one.peak:.0%}" for one in offloaded((4, 8), (4,), k, few))
            out[-1].note += f"; left of the peak at k={k}, {'half of' if few else 'all'} chunks: {rows}"
    return out
