"""BitPipe: two opposite pipelines of two chunks a device wait for less than one of 1F1B, interleaved or not.

Simulated with equal work for all on 8 devices: a forward pass of a sixteenth of the model takes 1, a backward one 2.
BitPipe's step ends when the gradients of its replicas are summed, 4 a chunk, which the others need not do. Messages
take nothing, or 0.1. Figures are exact, so there is one value each. The paper's are of GPT and BERT models on up to 32
GPUs.

The thresholds are for as many micro-batches as devices. With more of them each joint of two units costs time, and
BitPipe falls behind: all steps are in the notes. Weights are there twice: memory in the notes counts the weights and
gradients of a chunk as `WEIGHTS` activations.
"""

from anabranch.claim import Comparison, Size
from anabranch.plan import Trace, bubble, check, simulate
from anabranch.schedule import proof
from anabranch.schedule.base import Costs, interleaved, one_f_one_b
from anabranch.schedule.bitpipe import bitpipe, chimera, sync
from anabranch.schedule.zero_bubble import zb_h1

D, SUM = 8, 4.0
# A sixteenth of a 7B model in 16 bits is 1.7 GB with its gradients; 4096 tokens leave 34 bytes a number there, 1.1 GB.
WEIGHTS = 1.5


def closed_form(devices: tuple[int, ...]) -> Comparison:
    """Idle time and peaks as found, and as the formulas say."""
    gap, count = 0.0, 0
    for d in devices:
        for units in (1, 2, 3, 4):
            for f, b in ((1, 2), (1, 1), (2, 3)):
                trace = simulate(check(bitpipe(d, units * d).plan(Costs(f, b / 2, b / 2))))
                peaks = [1.5 * d + 1 + min(r, d - 1 - r) for r in range(d)]
                gap = max(gap, abs(bubble(trace).makespan - (d - 2) * (b + (units - 1) * (b - f))))
                gap = max(gap, *(abs(a - b) for a, b in zip(trace.peak.tolist(), peaks, strict=True)))
                count += 1
    return Comparison(
        "largest difference of idle time and of peaks from the closed forms", [gap], [0], 1e-9, better="lower",
        note=f"{count} settings, for 4, 6 and 8 devices, up to four units",
    )  # fmt: skip


def simulated(N: int, message: float) -> dict[str, Trace]:
    """Every schedule; those of one stage a device have stages of two chunks."""
    chunk, both = Costs(1, 1, 1, message, bytes=1), Costs(2, 2, 2, message, activation=2, bytes=1)
    v, loop = bitpipe(D, N), bitpipe(D, N, v_shape=False)
    plans = {
        "BitPipe": sync(v, chunk, SUM),
        "lazy sums": sync(v, chunk, SUM, eager=False),
        "loop": sync(loop, chunk, SUM),
        "no sums": v.plan(chunk),
        "interleaved": interleaved(D, N, 2).plan(chunk),
        "1F1B": one_f_one_b(D, N).plan(both),
        "Chimera": sync(chimera(D, N), both, 2 * SUM),
        "ZB-H1": zb_h1(D, N).plan(both),
    }
    return {name: simulate(check(plan)) for name, plan in plans.items()}


def memory(name: str, trace: Trace) -> str:
    """Of the fullest device: weights and activations."""
    weights = WEIGHTS * (4 if name in ("BitPipe", "Chimera") else 2)
    return f"{name} {weights:g} + {trace.peak.max():g}"


def experiment(size: Size) -> list[Comparison]:
    out = [closed_form((4,) if size.smoke else (4, 6, 8))]
    found = {(N, message): simulated(N, message) for N in ((8,) if size.smoke else (8, 16, 32)) for message in (0, 0.1)}
    rows = [
        f"N={N}, message {message}: " + ", ".join(f"{name} {trace.makespan:.4g}" for name, trace in traces.items())
        for (N, message), traces in found.items()
    ]
    note = "steps: " + " | ".join(rows)
    for message in (0, 0.1):
        traces = found[D, message]
        for other, threshold in (("interleaved", 1 / 1.03), ("1F1B", 1 / 1.10)):
            out.append(
                Comparison(
                    f"step of BitPipe over {other}, N={D}, message {message}",
                    [traces["BitPipe"].makespan],
                    [traces[other].makespan],
                    threshold,
                    kind="ratio",
                    better="lower",
                    paper="1.05 to 1.28 times the throughput of the best synchronous schedules",
                    note=note,
                )
            )
            note = ""
    names = ("BitPipe", "interleaved", "1F1B", "Chimera", "ZB-H1")
    held = "weights + activations in activations of a chunk: " + ", ".join(memory(n, found[D, 0][n]) for n in names)
    saved = [t["loop"].volume.sum() - t["BitPipe"].volume.sum() for t in found.values()]
    out += [
        Comparison(
            "messages that the V saves, per pass and micro-batch", [s / (2 * N) for s, (N, _) in zip(saved, found)],
            [0] * len(saved), 1, note=f"of {2 * D - 1}; {held}",
        ),
        Comparison(
            "step with eager over lazy sums", [t["BitPipe"].makespan for t in found.values()],
            [t["lazy sums"].makespan for t in found.values()], 1, kind="ratio", better="lower",
        ),
    ]  # fmt: skip
    ran = "bitpipe(2, 2)" if size.smoke else "bitpipe(4, 8)"
    error = proof.run(ran)[ran]["error"]
    out.append(Comparison("relative error of executed gradients", [error], [0], 1e-5, better="lower", note=ran))
    return out
