"""Real sessions of SmolLM2 on this machine, under the schedulers that the simulator compares.

    anabranch fetch smollm2 && anabranch bench live

24 requests with the lengths of Azure's conversations, prompts and answers an eighth as long, arriving as Poisson at
70 % of what the machine can serve; the same requests for every scheduler, in turns, for three draws. Reported:
seconds to the first token and between tokens, and what the simulator says of the same requests by times that were
measured beforehand. Each run is also replayed through the simulator, whose scheduler has to decide the same.
"""

import argparse
from pathlib import Path

import numpy as np

from anabranch.models.llama import Decoder
from anabranch.models.tokens import Tokens
from anabranch.models.weights import smollm2, smollm2_file
from anabranch.schedule.andes import Andes, qoes
from anabranch.schedule.baselines import FCFS, Chunked
from anabranch.schedule.cluster import Fitted
from anabranch.schedule.layered_prefill import LayeredPrefill
from anabranch.schedule.live import Live
from anabranch.schedule.replay import measure, play, replay
from anabranch.schedule.scheduler import Engine, Scheduler
from anabranch.schedule.semi_pd import SemiPD, TimeSlices
from anabranch.schedule.serving import Result, simulate_serving
from anabranch.schedule.workload import Workload
from common import ratio, write

SIZE, SESSIONS = 640, 8


def lengths(n: int, seed: int) -> Workload:
    """Of conversations, an eighth of them."""
    load = Workload.azure("conv")
    rows = np.random.default_rng(seed).permutation(len(load))[:n]
    prompt, output = (np.clip(column[rows] // 8, 1, most) for column, most in ((load.prompt, 512), (load.output, 100)))
    return Workload(np.zeros(n), prompt, output)


def texts(load: Workload, seed: int) -> list[list[int]]:
    """Real text of these lengths."""
    source = Tokens.of(smollm2_file()).encode(Path(argparse.__file__).read_text(encoding="utf-8"))
    starts = np.random.default_rng(seed).integers(0, len(source) - 600, len(load)).tolist()
    return [source[start : start + length] for start, length in zip(starts, load.prompt.tolist(), strict=True)]


def figures(result: Result) -> dict[str, float]:
    found = {f"{name} p{q}": result.percentile(name, q, 0.0) for name in ("ttft", "tbt", "tpot") for q in (50, 90, 99)}
    found |= {"quality": float(qoes(result).mean()), "tokens/s": result.throughput}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def schedulers(cost: Fitted) -> dict[str, Scheduler]:
    return {
        "FCFS": FCFS(),
        "chunks of 64": Chunked(chunk=64),
        "layered prefill": LayeredPrefill(layers=30, unit=64),
        "Andes": Andes(cost),
        "semi-PD": TimeSlices(SemiPD(ttft=1.0, tpot=0.1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few requests; nothing is written")
    args = parser.parse_args()
    n, seeds = (4, (0,)) if args.smoke else (24, (0, 1, 2))
    model = Decoder(smollm2(), SIZE)
    Live(model, FCFS(), sessions=SESSIONS).warm()  # what is compiled once serves all
    cost = measure(model, SESSIONS, 1 if args.smoke else 3)
    print(f"prefill {cost.prefill}, decode {cost.decode}, ms")
    found: dict[str, list[dict]] = {}
    simulated: dict[str, list[dict]] = {}
    same = []
    for seed in seeds:
        load = lengths(n, seed)
        alone = simulate_serving(load, [Engine(cost, max_seqs=SESSIONS)], FCFS())
        load = load.poisson(0.7 * n / alone.seconds, seed)
        prompts = texts(load, seed)
        for name, scheduler in schedulers(cost).items():
            live = Live(model, scheduler, sessions=SESSIONS, record=True)
            result = play(live, load, prompts)
            again = replay(live, scheduler)
            same.append([line[2:] for line in again.log] == [line[2:] for line in result.log])
            engine = Engine(cost, kv_tokens=live.engine.tokens, max_seqs=SESSIONS)
            found.setdefault(name, []).append(figures(result))
            simulated.setdefault(name, []).append(figures(simulate_serving(load, [engine], scheduler)))
            print(f"seed {seed}, {name}: {found[name][-1]}\n    simulated: {simulated[name][-1]}", flush=True)
    print(f"{sum(same)} of {len(same)} runs replayed with the same decisions")
    column = lambda rows, metric: [row[metric] for row in rows]
    over = {
        name: {metric: ratio(column(rows, metric), column(found["FCFS"], metric)) for metric in ("ttft p90", "tbt p99")}
        for name, rows in found.items()
        if name != "FCFS"
    }
    print(f"over FCFS: {over}")
    if not args.smoke:
        record = {
            "cost, ms": {"prefill": cost.prefill, "decode": cost.decode},
            "live": found,
            "over FCFS": over,
            "simulated": simulated,
            "replays with the same decisions": f"{sum(same)} of {len(same)}",
        }
        print(write("live", record, "anabranch", "jax"))


if __name__ == "__main__":
    main()
