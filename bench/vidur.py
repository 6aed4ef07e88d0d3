"""The serving simulator against Vidur (Agrawal et al. 2024): how fast it is, and whether both say the same.

    git clone https://github.com/microsoft/vidur VIDUR
    python -m venv VIDUR/.venv && VIDUR/.venv/bin/pip install -r VIDUR/requirements.txt
    python bench/vidur.py --vidur VIDUR

Requests of Azure's conversations on one replica: Vidur's schedulers vLLM and Sarathi, our FCFS and Chunked. Both have
the same blocks, caps and times of an iteration: a `Fitted` of Llama-3-8B on an A100 stands in for Vidur's predictor.

Speed is taken in turns, at the requests' own times and at one request a second, where less interrupts the runs of
decodes that we simulate at once. Vidur's clock runs while it handles events, once as it is shipped and once bare,
without its metrics; never while it reads requests, trains its predictor or draws. Ours runs for all of
`simulate_serving`.

Vidur's vLLM counts a batch of prompts as if each were as long as the longest; `Padded` is FCFS with that rule. Two more
rules differ, and matter where memory is short: Vidur lets nobody decode unless a block is free, whether it is needed or
not, and gives a request its next block one token later than we do.

Writes `bench/results/vidur.json`; takes less than five minutes.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from anabranch.schedule.baselines import FCFS, Chunked
from anabranch.schedule.cluster import DEVICES, MODELS, Fitted, Roofline, Work
from anabranch.schedule.scheduler import Engine, View
from anabranch.schedule.serving import Result, simulate_serving
from anabranch.schedule.workload import Workload
from common import in_turn, ratio, spread, timed, write

PEER = Path(__file__).parent / "serving_peers" / "vidur_replica.py"
MOST, CHUNK, BUSY, LITTLE = 16_384, 512, 9.0, 25_000


class Padded(FCFS):
    """Prompts that go together count as if each were as long as the longest."""

    def order(self, x: View) -> list[int]:
        slots = x.prompts
        padded = np.maximum.accumulate(x.prompt[slots]) * np.arange(1, len(slots) + 1)
        return slots[: int((padded <= x.max_tokens).sum())]


OURS = {"vllm": Padded(), "sarathi": Chunked(chunk=CHUNK)}


def fitted() -> Fitted:
    """The times of a roofline, by the formula that both sides use."""
    cost = Roofline(MODELS["llama-3-8b"], DEVICES["a100-80g"])
    prefills = [(n, cost.iteration(Work.of([n], [0]))) for n in (128, 512, 1024, 2048, 4096)]
    sizes = [(n, context) for n in (1, 8, 32, 64) for context in (256, 1024, 4096)]
    decodes = [(n, n * context, cost.iteration(Work.of(decode=[context] * n))) for n, context in sizes]
    return Fitted.to(prefills, decodes, kv_bytes=cost.kv_bytes, kv_tokens=cost.kv_tokens, spec=cost.spec)


class Vidur:
    """What became of each request in Vidur, by the names of `Result`."""

    def __init__(self, vidur: Path, python: Path, load: Workload, engine: Engine, scheduler: str, bare: bool = True):
        sizes = {"batch_size_cap": engine.max_seqs, "block_size": engine.block, "num_blocks": engine.blocks}
        sizes |= {"max_tokens_in_batch": engine.max_tokens} if scheduler == "vllm" else {"chunk_size": CHUNK}
        cost = engine.cost
        assert isinstance(cost, Fitted) and cost.decode == cost.large
        asked = {
            "path": str(vidur.resolve()), "scheduler": scheduler, "sizes": sizes, "bare": bare,
            "longest": int((load.prompt + load.output).max()), "prefill": cost.prefill, "decode": cost.decode,
        }  # fmt: skip
        columns = (column.tolist() for column in (load.arrival, load.prompt, load.output))
        rows = [",".join(map(repr, row)) for row in zip(*columns, strict=True)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "trace.csv").write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
            (folder / "asked.json").write_text(json.dumps(asked))
            done = subprocess.run(
                [python, PEER], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{PEER.name} failed:\n{done.stdout[-3000:]}")
            answer = json.loads((folder / "answer.json").read_text())
        first, last = np.array(answer["first"]), np.array(answer["last"])
        self.took, self.preemptions, self.seconds = answer["seconds"], answer["restarts"], float(last.max())
        self.ttft, self.e2e = first - load.arrival, last - load.arrival
        self.tpot = (last - first) / np.maximum(load.output - 1, 1)


def agreement(ours: Result, theirs: Vidur) -> dict:
    """Figures of both, and by how large a part ours differ from theirs."""
    pairs = {"makespan": (ours.seconds, theirs.seconds)}
    for metric in ("ttft", "tpot", "e2e"):
        for q in (50, 90, 99):
            a, b = (float(np.percentile(getattr(one, metric), q)) for one in (ours, theirs))
            pairs[f"{metric} p{q}"] = (a, b)
    digits = lambda value: float(f"{value:.4g}")
    found = {who: {name: digits(pair[i]) for name, pair in pairs.items()} for i, who in enumerate(("ours", "vidur"))}
    off = {name: abs(a - b) / b for name, (a, b) in pairs.items()}
    most = max(off, key=off.__getitem__)
    preemptions = {"ours": ours.preemptions, "vidur": theirs.preemptions}
    return {"off_at_most": digits(off[most]), "where": most, "preemptions": preemptions, "seconds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vidur", type=Path, required=True, help="its folder")
    parser.add_argument("--python", type=Path, help="of an environment with its requirements; by default its .venv")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="200 requests, once, nothing written")
    args = parser.parse_args()
    python = (args.python or args.vidur / ".venv" / "bin" / "python").absolute()
    for path, said in ((args.vidur / "vidur" / "simulator.py", "--vidur"), (python, "--python")):
        if not path.exists():
            parser.error(f"{said}: there is no {path}")
    n, repeats = (200, 1) if args.smoke else (args.requests, args.repeats)

    cost = fitted()
    engine, little = (Engine(cost, kv_tokens=tokens, max_tokens=MOST) for tokens in (None, LITTLE))
    own = Workload.azure("conv").head(n)
    simulate_serving(own.head(50), [engine], FCFS())
    speed, agree = [], []
    for case, load in (("own times", own), ("one a second", own.head(n // 4).scale(1.0))):
        for scheduler, mine in OURS.items():
            theirs = lambda bare: len(load) / Vidur(args.vidur, python, load, engine, scheduler, bare).took
            ours = lambda: len(load) / timed(lambda: simulate_serving(load, [engine], mine))[1]
            rates = in_turn({"ours": ours, "vidur": lambda: theirs(False), "bare vidur": lambda: theirs(True)}, repeats)
            rows = {who: spread(rate) for who, rate in rates.items()}
            ratios = {who: ratio(rates["ours"], rates[who]) for who in ("vidur", "bare vidur")}
            about = {"case": case, "scheduler": scheduler, "requests": len(load)}
            speed.append(about | {"requests_per_second": rows, "ours_over": ratios})
            print(case, scheduler, {who: row["median"] for who, row in rows.items()}, ratios, flush=True)
    busy = own.scale(BUSY)
    for case, load, on in (("own times", own, engine), ("busy", busy, engine), ("little memory", busy, little)):
        for scheduler, mine in OURS.items():
            peer = Vidur(args.vidur, python, load, on, scheduler)
            for each in [mine] if scheduler == "sarathi" else [mine, FCFS()]:
                row = agreement(simulate_serving(load, [on], each), peer)
                agree.append({"case": case, "vidur": scheduler, "ours": type(each).__name__} | row)
                print(*agree[-1].values(), sep="  ", flush=True)
    if not args.smoke:
        sizes = {"requests": n, "repeats": repeats, "busy_rate": BUSY, "little_tokens": LITTLE, "chunk": CHUNK}
        write("vidur", sizes | {"speed": speed, "agreement": agree}, "anabranch", "numpy")


if __name__ == "__main__":
    main()
