"""D2O loses less of what SmolLM2 predicts of real text than H2O does with as many tokens, and knows as many facts.

Six passages of 1,024 tokens (2,048 with --full), verse and code, in which five facts are told; a memory keeps an eighth
of them in the mean over the layers, or a quarter. All arms hold equally many tokens, take 64 at a time, and keep the
last ones and those with most attention half and half, where they do. The loss is that of tokens which come after the
memory has first been full, and what counts is how much more it is than with all tokens in memory.
"""

import jax
import jax.numpy as jnp
import numpy as np

from anabranch.claim import Comparison, Size
from anabranch.keep.d2o import D2O
from anabranch.keep.memory import H2O, Keep, Sinks, Window
from anabranch.keep.text import Told, library, rank, read, retention, shakespeare, tell
from anabranch.models.llama import Config, Decoder, Llama
from anabranch.models.tokens import Tokens
from anabranch.models.weights import smollm2, smollm2_file

FIRST_SEED = 100
CHUNK = 64


def passages(encode, length: int, offsets: int) -> list[Told]:
    """As many of each text, from places drawn with the seed."""
    out = []
    for i, text in enumerate((shakespeare(), library())):
        for j in range(offsets):
            seed = FIRST_SEED + i * offsets + j
            start = np.random.default_rng(seed).integers(0, len(text) - 8 * length)
            begin = text.index("\n", start) + 1
            places = [round(depth * length) for depth in (0.1, 0.3, 0.5, 0.7, 0.9)]
            out.append(tell(encode(text[begin : begin + 6 * length]), encode, places, length, seed))
    return out


def arms(length: int, config: Config, smoke: bool) -> dict[str, Keep]:
    """The memories by name; those with an eighth of the tokens, and those with a quarter."""
    small, large, room, g = length // 8, length // 4, CHUNK, config.heads // config.kv_heads
    h2o = lambda budget: H2O(budget, budget // 2, room=room)
    if smoke:
        return {"H2O, 1/8": h2o(small), "D2O, 1/8": D2O(small, room=room, queries=g)}
    skip = (0, 1, -1)
    rest = (large * config.layers - len(skip) * length) // (config.layers - len(skip))
    return {
        "window, 1/8": Window(small, room=room),
        "sinks, 1/8": Sinks(small, room=room),
        "H2O, 1/8": h2o(small),
        "D2O, 1/8": D2O(small, room=room, queries=g),
        "D2O without merging, 1/8": D2O(small, room=room, queries=g, merge=False),
        "D2O without levels, 1/8": D2O(small, room=room, levels=False),
        "H2O, 1/4": h2o(large),
        "D2O, 1/4": D2O(large, room=room, queries=g),
        f"D2O, 1/4, three layers whole and {rest} tokens in the others": D2O(
            rest, room=room, queries=g, skip=skip, whole=length
        ),
    }


def experiment(size: Size) -> list[Comparison]:
    if size.smoke:
        config = Config(vocab=256, width=16, layers=2, heads=4, kv_heads=2, hidden=24)
        model, encode = Llama(config, key=jax.random.PRNGKey(0)), lambda text: [min(ord(c), 255) for c in text]
        told = passages(encode, 448, 1)
    else:
        model, encode = smollm2(), Tokens.of(smollm2_file()).plain
        told = passages(encode, 2048 if size.full else 1024, 3)
    length = len(told[0].tokens)
    found, kept, inside, ours, theirs = {}, {}, [], "D2O, 1/8", "H2O, 1/8"
    for name, keep in {"all": None, **arms(length, model.config, size.smoke)}.items():
        cell = Decoder(model, length + CHUNK) if keep is None else Decoder(model, keep=keep)
        rows = []
        for passage in told:
            state, losses = read(cell, jnp.asarray(passage.tokens), CHUNK)
            known = np.asarray(rank(cell, state, passage.facts)) == 0
            rows.append((float(losses[length // 4 :].mean()), known))
            if keep is not None:
                kept.setdefault(name, []).append(retention(state, passage.facts).mean())
            if name == ours:
                inside.append([(held.budget, *held.own[1:4]) for held in state.memory])
        found[name] = np.array([loss for loss, _ in rows]), np.array([known for _, known in rows])
        print(f"{name}: loss {found[name][0].mean():.4f}, facts {found[name][1].mean():.3f}", flush=True)

    full, knows = found["all"]
    gap = {name: losses - full for name, (losses, _) in found.items()}
    facts = {name: known.mean(1) for name, (_, known) in found.items()}
    each = "; ".join(
        f"{name}: {gap[name].mean():+.4f} nats, facts {facts[name].mean():.2f} "
        f"(youngest first {', '.join(f'{share:.2f}' for share in found[name][1].mean(0)[::-1])}; "
        f"{np.mean(kept[name]):.0%} of their lines kept)"
        for name in kept
    )
    said = f"all tokens: loss {full.mean():.4f}, facts {knows.mean():.2f} (at least 0.8 is needed). {each}"
    budget, threshold, merged, dropped = np.moveaxis(np.array(inside, float), -1, 0)
    within = f"budgets of the layers from {budget.mean(0).min():.0f} to {budget.mean(0).max():.0f}; merged "
    within += f"{(merged / (merged + dropped)).mean():.0%} of what left; thresholds in the end from "
    within += f"{threshold.mean(0).min():.2f} to {threshold.mean(0).max():.2f}"
    metric = "loss above that with all tokens, 1/8 kept: D2O against 0.97 of H2O's, nats"
    paper = "quality kept at small budgets"
    return [
        Comparison(metric, gap[ours], 0.97 * gap[theirs], 0.0, better="lower", paper=paper, note=said),
        Comparison("facts known, 1/8 kept: D2O against H2O", facts[ours], facts[theirs], -0.02, note=within),
    ]
