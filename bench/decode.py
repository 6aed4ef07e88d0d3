"""Tokens a second of SmolLM2-135M, one new token a stream and step, against transformers on the same weights.

    anabranch fetch smollm2 && anabranch bench decode

All arms go on from the same 96 tokens of text for each stream, greedily, in turns; those in f32 must say the same,
token for token (streams in which they do not, by a near tie, are counted). Beside them: which part of the memory's
bandwidth a step reaches, by the bytes that it has to read, and what rounding to int8 does to the perplexity of text.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from anabranch.models.llama import Decoder, Llama, int8
from anabranch.models.tokens import Tokens
from anabranch.models.weights import smollm2, smollm2_file
from common import in_turn, ratio, spread, timed, write

SIZE = 256


def ours(cell: Decoder, prompts: np.ndarray) -> Callable[[int], np.ndarray]:
    """Says the next n tokens of each stream."""
    prefill = eqx.filter_jit(lambda cell, xs: jax.vmap(lambda x: Decoder.prefill(cell, cell.init(), x, len(x)))(xs))

    arrays, rest = eqx.partition(cell, eqx.is_array)

    @partial(jax.jit, donate_argnums=1)
    def step(arrays, states, tokens):
        states, logits = jax.vmap(eqx.combine(arrays, rest).step)(states, tokens)
        return states, jnp.argmax(logits, -1)

    states, logits = prefill(cell, jnp.asarray(prompts))
    box = [states, jnp.argmax(logits, -1)]

    def go(n: int) -> np.ndarray:
        said = []
        for _ in range(n):
            said.append(box[1])
            box[0], box[1] = step(arrays, box[0], box[1])
        return np.stack(jax.device_get(said), 1)

    return go


def transformers(prompts: np.ndarray) -> Callable[[int], np.ndarray]:
    import torch
    import transformers as hf

    torch.set_num_threads(2)
    file = smollm2_file()
    model = hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = model(torch.tensor(prompts), use_cache=True)
    box = [out.past_key_values, out.logits[:, -1].argmax(-1)]

    def go(n: int) -> np.ndarray:
        said = []
        with torch.inference_mode():
            for _ in range(n):
                said.append(box[1])
                out = model(box[1][:, None], past_key_values=box[0], use_cache=True)
                box[0], box[1] = out.past_key_values, out.logits[:, -1].argmax(-1)
        return torch.stack(said, 1).numpy()

    return go


def perplexity(cell: Decoder, tokens: np.ndarray) -> float:
    advance = eqx.filter_jit(lambda cell, xs: cell.advance(cell.init(), xs)[1])
    losses = []
    for row in tokens.reshape(-1, SIZE):
        logits = advance(cell, jnp.asarray(row))
        losses.append(-jax.nn.log_softmax(logits)[jnp.arange(SIZE - 1), row[1:]])
    return float(jnp.exp(jnp.mean(jnp.concatenate(losses))))


def bandwidth() -> float:
    """Bytes a second at which this machine sums a large array."""
    x = jnp.ones(128 * 2**20)
    total = jax.jit(lambda x: x.sum())
    total(x).block_until_ready()
    return x.nbytes / min(timed(lambda: total(x).block_until_ready())[1] for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one batch, few tokens; nothing is written")
    args = parser.parse_args()
    text = Path(argparse.__file__).read_text(encoding="utf-8")  # real text that every machine has
    model: Llama = smollm2()
    exact = Decoder(model, SIZE)
    cells = {"f32": exact, "int8": int8(exact)}
    tokens = np.array(Tokens.of(smollm2_file()).encode(text), np.int32)
    batches, rounds, n = ((2,), 2, 4) if args.smoke else ((1, 8, 32), 5, 16)
    speed = bandwidth()
    notes, found = [], {}
    for batch in batches:
        prompts = np.stack([tokens[i * 96 : (i + 1) * 96] for i in range(batch)])
        arms = {name: ours(cell, prompts) for name, cell in cells.items()} | {"transformers": transformers(prompts)}
        said = {name: [go(3)] for name, go in arms.items()}  # compiles, and warms up

        def run(name: str) -> float:
            some, seconds = timed(lambda: arms[name](n))
            said[name].append(some)
            return seconds

        seconds = in_turn({name: lambda name=name: run(name) for name in arms}, rounds)
        whole = {name: np.concatenate(parts, 1) for name, parts in said.items()}
        other = int((whole["f32"] != whole["transformers"]).any(1).sum())
        notes.append(f"batch {batch}: {other} of {batch} streams in f32 say something else than transformers")
        for name, taken in seconds.items():
            one = found[f"{name}, batch {batch}"] = {"tokens/s": spread(batch * n / t for t in taken)}
            if name in cells:
                weights = sum(x.nbytes for x in jax.tree.leaves((cells[name].layers, cells[name].head)))
                one["over transformers"] = ratio(seconds["transformers"], taken)
                one["share of bandwidth"] = round(weights * n / min(taken) / speed, 3)
            print(f"{name}, batch {batch}: {one}", flush=True)
    if not args.smoke:
        a, b = (perplexity(cell, tokens[: 16 * SIZE]) for cell in cells.values())
        found["perplexity"] = {"f32": round(a, 3), "int8": round(b, 3), "more": round(b / a - 1, 5)}
        record = {"bandwidth, bytes/s": round(speed), "found": found, "notes": notes}
        print(write("decode", record, "anabranch", "jax", "torch", "transformers"))
    print("\n".join(notes))


if __name__ == "__main__":
    main()
