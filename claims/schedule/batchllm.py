"""BatchLLM spares more tokens than a cache that forgets, and ends sooner, where prefixes do not all fit in memory.

Simulated: OPT-13B on an A100 as DistServe measured it, for all sides. 2,000 requests made of real text: an instruction
(three kinds), one of 150 pieces of Shakespeare of 400 to 3,000 characters, and a question of 10 to 60 tokens, four
characters a token; pieces have 1 to 40 questions, by Zipf's law with 1.1. Answers are as long as those of Azure's
conversations, at most 400 tokens; the schedulers know their mean only. All requests are there from the start, in random
order. Memory has 2,500 blocks of 16 tokens, and all prefixes together about 4,400.

Baselines have the same memory and share all blocks that are alike, at any number of levels, the least recently used
going first: whole prompts before everything else, and chunks of 512 or 2,048 tokens beside decodes.

What does it here is grouping. The order of the groups, and letting requests in by memory, change little: all answers
are expected to be equally long, and memory is full in any case. Where all prefixes fit in memory nothing is gained.

Not shown: any GPU, and attention that reads a shared prefix once, which the paper credits and this simulation does not.
That it gives the same is shown on SmolLM2-135M, with 16 texts that begin with the same 512 tokens; what it saves of a
step on this machine is noted.
"""

import time
from functools import partial
from itertools import product
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from anabranch.claim import Comparison, Size
from anabranch.data import root
from anabranch.layers.kv import KV, Grouped, Rows
from anabranch.models.llama import Config, Decoder, Llama, Session
from anabranch.models.weights import smollm2
from anabranch.schedule.baselines import FCFS, Chunked
from anabranch.schedule.batchllm import BatchLLM, PrefixTree, group_requests, maximize_reuse
from anabranch.schedule.cluster import Fitted
from anabranch.schedule.scheduler import Engine, Scheduler
from anabranch.schedule.serving import Result, simulate_serving
from anabranch.schedule.workload import Workload

FIRST_SEED = 100
BLOCK = 16
INSTRUCTIONS = (
    "You are an assistant of a library. Below is a passage of a play. Answer the question that follows it in a few "
    "words, from the passage alone; if the answer is not in it, say that you do not know. ",
    "Below is a scene. Say for the line at its end who speaks it, to whom, and in what mood, and give the words of the "
    "scene that show it. Do not use anything that is not in the scene itself, and do not repeat it. ",
    "Read the text, then the remark about it. Judge on a scale of one to five whether the remark is right about the "
    "text, and explain your judgement to somebody who has not read any of it. ",
)


def requests(seed: int, n: int, pieces: int) -> Workload:
    """Requests in random order, all at once."""
    rng = np.random.default_rng(seed)
    text = (root() / "text" / "tinyshakespeare.txt").read_text(encoding="ascii")
    cut = lambda low, high: text[(at := int(rng.integers(len(text) - high))) : at + int(rng.integers(low, high + 1))]
    weight, scale = np.arange(1, pieces + 1) ** -1.1, 1.0
    counts = lambda scale: np.clip(np.round(scale * weight), 1, 40).astype(int)
    while counts(scale).sum() < n:
        scale *= 1.01
    prompts = []
    for piece, questions in enumerate(counts(scale)):
        begin = INSTRUCTIONS[piece % 3] + cut(400, 3000)
        prompts += [tokens(begin) + tokens(cut(40, 240)) for _ in range(questions)]
    answers = np.minimum(Workload.azure("conv").output, 400)
    chosen = [prompts[i] for i in rng.permutation(len(prompts))[:n]]
    return Workload(np.zeros(n), [*map(len, chosen)], rng.choice(answers, n), tokens=chosen)  # pyright: ignore


def tokens(text: str) -> list[int]:
    """Four characters are a token."""
    return np.frombuffer(text[: len(text) // 4 * 4].encode(), ">u4").tolist()


def experiment(size: Size) -> list[Comparison]:
    n, pieces, little, much = (160, 20, 350, 2000) if size.smoke else (2000, 150, 2500, 24_000)
    seeds = [FIRST_SEED + i for i in size.seeds(5)]
    mean = float(np.minimum(Workload.azure("conv").output, 400).mean())
    found: dict[str, list[Result]] = {}
    best, prefixes = [], []

    def serve(name: str, load: Workload, blocks: int, scheduler: Scheduler, seats: int = 1024) -> None:
        engine = Engine(Fitted(), kv_tokens=blocks * BLOCK, block=BLOCK, max_seqs=seats, prefixes=True)
        found.setdefault(name, []).append(simulate_serving(load, [engine], scheduler))

    for i, seed in enumerate(seeds):
        load = requests(seed, n, pieces)
        tree = PrefixTree(list(load.tokens))  # pyright: ignore[reportArgumentType]
        best.append(tree.bound(BLOCK) / load.prompt.sum())
        prefixes.append(int((tree.depth[np.unique(maximize_reuse(tree, BLOCK))] // BLOCK).sum()))
        groups = group_requests(load, mean, BLOCK)
        columns = groups.load.group, groups.load.shared
        for blocks, where in ((little, ""), (much, ", all fits"))[: 2 if i < 2 else 1]:
            serve("BatchLLM" + where, groups.load, blocks, BatchLLM(*columns))
            serve("whole prompts" + where, load, blocks, FCFS())
            serve("chunks of 512" + where, load, blocks, Chunked(chunk=512))
            serve("chunks of 2,048" + where, load, blocks, Chunked(chunk=2048))
        if i < 2:  # reported: what each part of the method is good for
            alone = np.full(n, -1), np.zeros(n, int)
            serve("without groups", load, little, BatchLLM(*alone))
            as_come = group_requests(load, mean, BLOCK, reorder=False).load
            serve("groups as they come", as_come, little, BatchLLM(as_come.group, as_come.shared))
            serve("groups, chunks of 512", groups.load, little, Chunked(chunk=512))
            serve("groups, at most 64 at once", groups.load, little, BatchLLM(*columns), 64)
    saved = lambda name: [r.cached / r.workload.prompt.sum() for r in found[name]]
    seconds = lambda name: [r.seconds for r in found[name]]
    out = [
        Comparison(
            "tokens spared, of all of prompts", saved("BatchLLM"), saved("whole prompts"), 0.05,
            note=ablations(found, prefixes, little),
        ),
        Comparison("the same, over chunks of 512", saved("BatchLLM"), saved("chunks of 512"), 0.05),
        Comparison("the same, short of any number of levels", saved("BatchLLM"), best, -0.03, paper="56 % to 55 %"),
        Comparison(
            "makespan over whole prompts", seconds("BatchLLM"), seconds("whole prompts"), 1 / 1.10, kind="ratio",
            better="lower", paper="1.1 x to 2 x the throughput of vLLM",
        ),
    ]  # fmt: skip
    out += [
        Comparison(f"makespan over {name}", seconds("BatchLLM"), seconds(name), 1 / 1.03, kind="ratio", better="lower")
        for name in ("chunks of 512", "chunks of 2,048")
    ]
    return [*out, exact(20 if size.smoke else 200), real(size.smoke)]


def ablations(found: dict[str, list[Result]], prefixes: list[int], blocks: int) -> str:
    """What became of everything that was served."""
    said = []
    for name, results in found.items():
        saved = np.mean([r.cached / r.workload.prompt.sum() for r in results])
        computed = np.mean([1 - r.prefilled / r.workload.prompt.sum() for r in results])
        each = np.mean([(r.prefilled + r.tokens.sum()) / r.iterations for r in results])
        seconds, peak = np.mean([r.seconds for r in results]), np.mean([r.peak for r in results])
        said.append(
            f"{name} {saved:.3f} ({computed:.3f} with what was computed twice), {seconds:.0f} s, {peak:.0f} blocks at "
            f"most, {each:.0f} tokens an iteration, {np.mean([r.preemptions for r in results]):.0f} preemptions"
        )
    return f"prefixes of {np.mean(prefixes):.0f} blocks, memory of {blocks}: " + "; ".join(said)


def exact(trees: int) -> Comparison:
    """`maximize_reuse` against all sets of nodes to share at, each prompt at the deepest one above it."""
    worst, some = 0, 0
    for seed in range(trees):
        rng = np.random.default_rng(FIRST_SEED + seed)
        prompts = [rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(rng.integers(2, 13))]
        tree, block = PrefixTree(prompts), int(rng.integers(1, 4))
        n, most = len(tree.depth) - 1, 0
        for subset in product((False, True), repeat=n):
            shares = np.full(len(prompts), n)
            for node in range(n - 1, -1, -1):
                if subset[node]:
                    shares[tree.order[tree.start[node] : tree.stop[node]]] = node
            most = max(most, tree.spared(shares, block))
        worst = max(worst, abs(most - tree.spared(maximize_reuse(tree, block), block)))
        some += most > 0
    return Comparison(
        f"tokens by which the best groups are missed, {trees} random trees", [worst], [0], 0.0, better="lower",
        note=f"{some} of them have something to share",
    )  # fmt: skip


def real(smoke: bool) -> Comparison:
    """Steps of a group whose prefix is read once, against the same with a prefix each."""
    group, shared, own = (4, 40, 8) if smoke else (16, 512, 32)
    sizes = Config(vocab=256, width=32, layers=2, heads=4, kv_heads=2, hidden=64)
    llama = Llama(sizes, key=jax.random.PRNGKey(0)) if smoke else smollm2()
    model = Decoder(llama, shared + own)
    rng = np.random.default_rng(FIRST_SEED)
    text = jnp.asarray(rng.integers(0, llama.config.vocab, shared), jnp.int32)
    prefix = eqx.filter_jit(Decoder.advance)(model, model.init(), text)[0].memory
    room = lambda tokens: jnp.zeros((group, llama.config.kv_heads, tokens, llama.config.head_width))
    whole = lambda x: jnp.broadcast_to(x, (group, *x.shape)).copy()
    cut = lambda x: x[:, :shared].copy()
    memory: dict[str, Any] = {
        "alone": Session(tuple(KV(whole(m.k), whole(m.v)) for m in prefix), jnp.full(group, shared)),
        "together": tuple(Grouped(KV(cut(m.k), cut(m.v)), Rows(room(own), room(own))) for m in prefix),
    }

    @partial(jax.jit, donate_argnums=1)
    def alone(model, memory, tokens, positions):
        return jax.vmap(model.step)(memory, tokens)

    @partial(jax.jit, donate_argnums=1)
    def together(model, memory, tokens, positions):
        h, memory = model.run_layers(model.embedding[tokens], memory, positions)
        return memory, model.logits(h)

    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    worst = 0.0
    for i in range(own):
        tokens, logits = jnp.asarray(rng.integers(0, llama.config.vocab, group), jnp.int32), {}
        for name, step in (("alone", alone), ("together", together)):
            start = time.perf_counter()
            memory[name], logits[name] = step(model, memory[name], tokens, jnp.full(group, shared + i))
            logits[name].block_until_ready()
            seconds[name].append(time.perf_counter() - start)
        worst = max(worst, float(jnp.abs(logits["alone"] - logits["together"]).max()))
    took = {name: 1e3 * np.median(times[2:]) for name, times in seconds.items()}
    return Comparison(
        f"logits of a group of {group} with one prefix of {shared}, off by", [worst], [0], 1e-3, better="lower",
        note=f"a step takes {took['together']:.0f} ms, with a prefix each {took['alone']:.0f} ms",
    )  # fmt: skip
