"""Prompts from real texts, for what is trained and what is measured, never the same ones; and how a model goes on.

Verse (tinyshakespeare), Python code (the standard library), prose about it (its docstrings), and requests to an
assistant about such passages, in turn. And a small model of characters, quickly trained.
"""

import argparse
import ast
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch.cell import noise
from anabranch.data import root
from anabranch.fit import fit
from anabranch.models.llama import Config, Decoder, Llama
from anabranch.models.tokens import Tokens

HELD_OUT = 60_000
"""Characters at the end of the verse that are only for measuring; so is every fourth module of the library."""
CHARACTERS = 1_000_000
"""Of the verse, that the model of characters is trained on; it is measured on what follows."""
REQUESTS = (
    "Explain what this means.",
    "Rewrite this in simple words.",
    "Continue this.",
    "Summarise this.",
    "Write this again and fix every mistake.",
    "What is this about?",
)


@cache
def passages(held_out: bool) -> tuple[list[str], list[str], list[str]]:
    """Verse, code and prose.

    Raises:
        FileNotFoundError: if tinyshakespeare is not in the folder of data sets.
    """
    file = root() / "text" / "tinyshakespeare.txt"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it is input.txt of karpathy/char-rnn")
    whole = file.read_text(encoding="utf-8")
    verse = [whole[-HELD_OUT:]] if held_out else [whole[:-HELD_OUT]]
    modules = sorted(Path(argparse.__file__).parent.glob("*.py"))
    code = [p.read_text(encoding="utf-8") for i, p in enumerate(modules) if (i % 4 == 0) == held_out]
    trees = [node for source in code for node in ast.walk(ast.parse(source))]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = [ast.get_docstring(node) or "" for node in trees if isinstance(node, kinds)]
    return verse, [c for c in code if len(c) > 2000], [p for p in prose if len(p) > 250]


def prompts(
    text: Tokens, n: int, room: int, seed: int, *, held_out: bool
) -> tuple[Int[np.ndarray, "n room"], Int[np.ndarray, " n"]]:
    """n prompts of at most `room` tokens, padded with 0, and how long they are.

    Raises:
        ValueError: if there is no room for a request.
    """
    if room < 64:
        raise ValueError(f"room must be at least 64, got {room}")
    draw = np.random.default_rng([seed, held_out])
    verse, code, prose = passages(held_out)
    found = np.zeros((n, room), np.int32)
    lengths = np.zeros(n, np.int32)
    for i in range(n):
        kind = i % 4
        source = (verse, code, prose, prose if i % 8 < 4 else verse)[kind]
        passage = source[draw.integers(len(source))]
        start = passage.find("\n", int(draw.integers(max(1, len(passage) - 8 * room)))) + 1
        passage = passage[start : start + 8 * room]
        if kind == 3:
            ask = REQUESTS[draw.integers(len(REQUESTS))]
            frame = len(text.chat([{"role": "user", "content": ask + "\n\n"}]))
            passage = text.decode(text.plain(passage)[: room - frame - 2])
            tokens = text.chat([{"role": "user", "content": f"{ask}\n\n{passage}"}])[-room:]
        else:
            tokens = text.plain(passage)[:room]
        found[i, : len(tokens)], lengths[i] = tokens, len(tokens)
    return found, lengths


def written(
    target: Decoder, prompts: Int[np.ndarray, "B T"], n: Int[np.ndarray, " B"], steps: int
) -> Int[np.ndarray, "B T+steps"]:
    """The prompts, of which the first n tokens count, and after them the likeliest `steps` tokens; the rest is 0."""
    arrays, rest = eqx.partition(target, eqx.is_array)

    @jax.jit
    def begin(arrays, xs, n):
        target = eqx.combine(arrays, rest)
        states, logits = jax.vmap(lambda x, n: target.prefill(target.init(), x, n))(xs, n)
        return states, jnp.argmax(logits, -1)

    @partial(jax.jit, donate_argnums=1)
    def step(arrays, states, tokens):
        states, logits = jax.vmap(eqx.combine(arrays, rest).step)(states, tokens)
        return states, jnp.argmax(logits, -1)

    out, rows = np.pad(prompts, ((0, 0), (0, steps))), np.arange(len(prompts))
    out *= np.arange(out.shape[1]) < n[:, None]
    states, said = begin(arrays, jnp.asarray(prompts), jnp.asarray(n))
    for t in range(steps):
        out[rows, n + t] = said
        if t + 1 < steps:
            states, said = step(arrays, states, said)
    return out


def thoughts(target: Decoder, xs: Int[Array, " T"], after: tuple[int, ...]) -> list[Float[Array, "T d"]]:
    """What these numbers of layers give for a text."""
    h, memory, positions = target.embedding[xs], target.init().memory, jnp.arange(len(xs))
    out = []
    for low, high in pairwise((0, *after)):
        h, memory = target.run_layers(h, memory, positions, low, high)
        out.append(h)
    return out


def characters() -> Int[np.ndarray, " T"]:
    """The verse as numbers below 128."""
    text = (root() / "text" / "tinyshakespeare.txt").read_bytes()
    return np.frombuffer(text, np.uint8).astype(np.int32) % 128


def character_model(seed: int, steps: int, room: int) -> Decoder:
    """A model of characters, four layers of 64 numbers, trained for so many steps, with room for so many characters."""
    text = jnp.asarray(characters()[:CHARACTERS])
    net = Llama(Config(128, 64, 4, 4, 2, 160, rope_base=1000.0), key=jax.random.PRNGKey(seed))

    def batch(key: PRNGKeyArray, i: Array) -> Array:
        start = jax.random.randint(noise(key, i), (16,), 0, len(text) - 65)
        return jax.vmap(lambda s: jax.lax.dynamic_slice(text, (s,), (65,)))(start)

    def loss(net: Llama, batch: Array, key: PRNGKeyArray) -> Float[Array, ""]:
        logp = jax.nn.log_softmax(jax.vmap(net)(batch[:, :-1]))
        return -jnp.take_along_axis(logp, batch[:, 1:, None], -1).mean()

    net, _ = fit(loss, net, batch, optax.adam(3e-3), steps, key=jax.random.PRNGKey(seed))
    return Decoder(net, room)
