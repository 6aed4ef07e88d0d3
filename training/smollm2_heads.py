"""Trains `decode/heads.py` on SmolLM2-135M: what it goes on to say from real prompts, and what it thinks meanwhile.

About six minutes on two cores, a third of it writing. Needs `anabranch fetch smollm2`, `pip install 'anabranch[llm]'`
and `ANABRANCH_DATA`. Half of the texts take the likeliest token and half are drawn. A sequence is read three times:
with the model's features, with the draft's own in their place (all that it has from its second token on), and in
pairs. The loss is the distance of features, as in EAGLE, and the cross-entropy on the model's own probabilities, at a
third of the positions.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch import noise
from anabranch.data import root
from anabranch.decode.heads import Heads, unit
from anabranch.decode.texts import prompts
from anabranch.fit import Epochs, fit
from anabranch.layers.attention import attend
from anabranch.models.llama import Decoder, int8, rms_norm
from anabranch.models.tokens import Tokens
from anabranch.models.weights import smollm2, smollm2_file

ROUNDS, STREAMS, PROMPT, SAID = 10, 64, 64, 96
EXITS = (15, 20, 25)
FREQUENT, HIDDEN = 8192, 1024
BATCH, STEPS = 8, 400


def think(target: Decoder, memory: Any, xs: Int[Array, " T"], start: Array) -> tuple[Any, Float[Array, "exits+1 T d"]]:
    """What the layers before the exits, and the last one, give for T more tokens."""
    h, out = target.embedding[xs], []
    for low, high in pairwise((0, *EXITS, None)):
        h, memory = target.run_layers(h, memory, start + jnp.arange(len(xs)), low or 0, high)
        out.append(h)
    return memory, jnp.stack(out)


def harvest(target: Decoder, text: Tokens, key: PRNGKeyArray) -> Iterator[dict[str, np.ndarray]]:
    """Texts, how long they are, and the features of their tokens, `STREAMS` at a time."""
    arrays, rest = eqx.partition(target, eqx.is_array)
    kept = lambda taps: jax.vmap(jax.vmap(unit))(taps).astype(jnp.float16)

    @jax.jit
    def begin(arrays, xs, n):
        target = eqx.combine(arrays, rest)
        memory, taps = jax.vmap(lambda x: think(target, target.init().memory, x, jnp.int32(0)))(xs)
        last = jax.vmap(lambda taps, n: taps[-1, n - 1])(taps, n)
        return memory, kept(taps), target.logits(last)

    @partial(jax.jit, donate_argnums=1)
    def step(arrays, memory, logits, at, key):
        target = eqx.combine(arrays, rest)
        drawn = jax.random.categorical(noise(key, at[0]), logits)
        said = jnp.where(jnp.arange(STREAMS) < STREAMS // 2, jnp.argmax(logits, -1), drawn)
        memory, taps = jax.vmap(lambda m, x, at: think(target, m, x[None], at))(memory, said, at)
        return memory, said, kept(taps)[:, :, 0], target.logits(taps[:, -1, 0])

    for i in range(ROUNDS):
        xs, n = prompts(text, STREAMS, PROMPT, i, held_out=False)
        order = np.random.default_rng(i).permutation(STREAMS)  # or kinds of prompts would go with ways of drawing
        xs, n = xs[order], n[order]
        memory, taps, logits = begin(arrays, xs, n)
        tokens = np.pad(xs, ((0, 0), (0, SAID)))
        features = np.zeros((STREAMS, len(EXITS) + 1, PROMPT + SAID, target.config.width), np.float16)
        features[:, :, :PROMPT] = taps
        rows = np.arange(STREAMS)
        for t in range(SAID):
            memory, said, taps, logits = step(arrays, memory, logits, jnp.asarray(n + t), noise(key, i))
            tokens[rows, n + t], features[rows, :, n + t] = said, taps
        yield {"tokens": tokens, "length": n + SAID, "features": features}


def loss_of(target: Decoder, ids: Int[Array, " v"]) -> Any:
    """The loss of a batch of texts."""
    rows = target.embedding[ids]
    logits = lambda u: jax.nn.log_softmax(rms_norm(u, target.norm, target.config.eps) @ rows.T)

    def extend(q, k, v, positions, rotate):
        seen = positions <= positions[:, None]
        return attend(rotate(q, positions), rotate(k, positions).swapaxes(0, 1), v.swapaxes(0, 1), seen), None

    def one(heads: Heads, text: dict[str, Array], key: PRNGKeyArray) -> Float[Array, ""]:
        tokens, taps = text["tokens"], text["features"].astype(jnp.float32)
        embedded, true = target.embedding[tokens], taps[-1]
        positions = jnp.arange(len(tokens))
        shifted = lambda u: jnp.concatenate([jnp.zeros_like(u[:1]), u[:-1]])
        ahead = lambda before: heads.read(embedded, before, positions, extend)[0]
        grain = jax.random.uniform(noise(key, 0, "noise"), true.shape, minval=-0.1, maxval=0.1)
        first = ahead(shifted(true + grain))
        second = ahead(shifted(first))
        pair = heads.pair(embedded[1:], first[:-1])
        there = (positions < text["length"]).astype(jnp.float32)
        near = lambda a, b, there: jnp.sum(optax.huber_loss(a, b).mean(-1) * there) / there.sum()
        distance = near(first, true, there) + near(second, true, there) + near(pair, true[1:], there[1:])
        # Probabilities cost most of the time: at some positions they are enough.
        at = 1 + jax.random.permutation(noise(key, 0, "at"), len(tokens) - 1)[: len(tokens) // 3]
        wanted, weight = jnp.exp(logits(true[at])), there[at] / there[at].sum()
        cross = lambda u: -jnp.sum((wanted[: len(u)] * logits(u)).sum(-1) * weight[: len(u)])
        total = cross(first[at]) + cross(second[at]) + cross(pair[at - 1])
        few = at[: len(at) // 2]
        total += sum(cross(unit(exit(h[few]))) for exit, h in zip(heads.exits, taps[:-1]))
        return total + distance

    return lambda heads, batch, key: jax.vmap(one, (None, 0, 0))(
        heads, batch, jax.random.split(key, len(batch["tokens"]))
    ).mean()


def train(key: PRNGKeyArray) -> tuple[Heads, dict[str, Any]]:
    """The heads, in int8, and how the loss ended."""
    target, text = Decoder(smollm2(), PROMPT + SAID), Tokens.of(smollm2_file())
    parts = list(harvest(target, text, noise(key, 0, "harvest")))
    texts = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    there = np.arange(PROMPT + SAID) < texts["length"][:, None]
    counts = np.bincount(texts["tokens"][there], minlength=target.config.vocab)
    ids = jnp.asarray(np.sort(np.argsort(-counts, kind="stable")[:FREQUENT]))
    covered = float(counts[ids].sum() / counts.sum())
    print(f"{there.sum()} tokens, of which the {FREQUENT} most frequent are {covered:.3f}", flush=True)

    heads = Heads.random(target.config, HIDDEN, ids, EXITS, key=noise(key, 0, "weights"))
    rate = optax.warmup_cosine_decay_schedule(0, 1.5e-3, STEPS // 10, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.01))
    batch = Epochs(texts, BATCH, noise(key, 0, "batches"))
    heads, history = fit(loss_of(target, ids), heads, batch, optimizer, STEPS, key=noise(key, 0, "train"), check=20)
    info = {"tokens": int(there.sum()), "covered": covered, "steps": STEPS, "batch": BATCH}
    return int8(heads), info | {
        "loss": float(history["loss"][-40:].mean()),
        "data": [str(smollm2_file()), str(root() / "text" / "tinyshakespeare.txt")],
    }
