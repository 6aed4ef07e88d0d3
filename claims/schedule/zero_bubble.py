"""Zero Bubble: the gradient of the weights, split off, fills what 1F1B leaves idle.

Five parts. Closed forms of H1, H2 and ZB-V, to the last tick. Fifty random costs: the search against H1 in the memory
of 1F1B, and against H2 in twice that. Time of a step, by passes of a Llama block measured on this machine, on 8 devices
with 24 micro-batches: 1F1B, which waits for a norm over all gradients at the end, against schedules whose iterations
join, as updates with post-validation allow. Gradients of plans that were executed on virtual devices. A character model
of four stages trained for 200 steps with post-validation, a NaN among its gradients at step 50, against the same
optimiser with a barrier.

That iterations join is half of the gain. With a barrier after each, H1, H2 and ZB-V save less; that is reported too.
The paper's 23 % and 31 % are of GPT models on 32 A100.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from anabranch import data
from anabranch.claim import Comparison, Size
from anabranch.models.llama import Block, Config
from anabranch.plan import bubble, check, simulate
from anabranch.schedule import proof
from anabranch.schedule.base import Costs, Schedule, one_f_one_b
from anabranch.schedule.search import chunked, judge
from anabranch.schedule.two_stage_backprop import measure
from anabranch.schedule.zero_bubble import PostValidation, auto_schedule, undo_adamw, zb_h1, zb_h2, zb_v

FIRST_SEED = 100


def closed_forms(ps: tuple[int, ...]) -> Comparison:
    """Spans found, and those of the formulas."""
    found, said = [], []
    for p in ps:
        for f, b, w in ((1, 1, 1), (2, 3, 1), (3, 4, 2)):
            for make, span in ((zb_h1, max(f + b - w, b)), (zb_h2, max(0, f + b - 2 * w))):
                found.append(bubble(simulate(check(make(p, 2 * p + 1).plan(Costs(f, b, w))))).span)
                said.append((p - 1) * span)
        found.append(simulate(check(zb_v(p, 2 * p).plan())).makespan)
        said.append(13 * p - 1)
    gap = max(abs(a - b) for a, b in zip(found, said, strict=True))
    return Comparison(
        "largest difference from the closed forms, ticks", [gap], [0], 0, better="lower",
        note=f"{len(found)} spans and makespans",
    )  # fmt: skip


def random_costs(seeds: range) -> list[Comparison]:
    """How often the search is no worse than by hand, and the memory it took."""
    wins, over = {1: 0, 2: 0}, 0.0
    for seed in seeds:
        rng = np.random.default_rng(FIRST_SEED + seed)
        p = int(rng.integers(3, 9))
        m = int(rng.integers(2 * p, 4 * p))
        costs = Costs(*rng.uniform(0.5, 2, (3, p)), message=float(rng.uniform(0, 0.3)))
        span = lambda schedule, costs=costs: bubble(simulate(check(schedule.plan(costs)))).span
        found = {k: auto_schedule(p, m, costs, k * p) for k in (1, 2)}
        spans = {k: span(one) for k, one in found.items()}
        wins[1] += spans[1] <= span(zb_h1(p, m)) + 1e-9
        wins[2] += spans[2] <= max(span(zb_h2(p, m)), spans[1]) + 1e-9
        over = max(over, *(simulate(one.plan(costs)).peak.max() - k * p for k, one in found.items()))
    n = len(seeds)
    return [
        Comparison("costs for which the search is no worse than H1, in p activations", [wins[1]], [0], 0.96 * n),
        Comparison("no worse than H2, or than itself in p, in 2p activations", [wins[2]], [0], 0.96 * n),
        Comparison("memory above the limit, activations", [max(0.0, over)], [0], 0, better="lower"),
    ]


def block(width: int, hidden: int, rows: int, length: int, repeats: int) -> Costs:
    """The passes of a block of Llama on this machine, in milliseconds."""
    one = Block.random(Config(width=width, hidden=hidden, heads=4, kv_heads=4, layers=1), jax.random.PRNGKey(0))
    weights, static = eqx.partition(one, eqx.is_array)
    x = jax.random.normal(jax.random.PRNGKey(1), (rows, length, width))
    found = measure(lambda w, x: jax.vmap(eqx.combine(w, static))(x), weights, x, repeats)
    return Costs(*(1e3 * float(time) for time in (found.forward, found.backward, found.weight)))


def steps(p: int, m: int, measured: list[Costs]) -> list[Comparison]:
    """Time of a step over that of 1F1B with a barrier, for each measurement of the passes of a block."""
    base, h1, best, flushed = [], [], [], []
    for costs in measured:
        base.append(judge(one_f_one_b(p, m), costs).step)
        h1.append(judge(zb_h1(p, m), costs).joined)
        half = chunked(costs, p, 2 * p)
        more: list[Schedule] = [zb_h2(p, m), auto_schedule(p, m, costs, 2 * p)]
        others = [judge(one, costs) for one in more]
        others.append(judge(zb_v(p, m, half), half))
        best.append(min(one.joined for one in others))
        flushed.append(min(one.step for one in others))
    left = ", ".join(f"{a / b:.3f}" for a, b in zip(base, flushed, strict=True))
    said = ", ".join(f"{one.forward:.1f}/{one.backward:.1f}/{one.weight:.1f}" for one in measured)
    return [
        Comparison(
            "steps a second, H1 over 1F1B", [1 / t for t in h1], [1 / t for t in base], 1.08, kind="ratio",
            paper="up to 23 % more throughput at similar memory", note=f"F/B/W of a block, ms: {said}",
        ),
        Comparison(
            "steps a second, best of H2, ZB-V and the search over 1F1B", [1 / t for t in best], [1 / t for t in base],
            1.18, kind="ratio", paper="31 % with the memory limit relaxed", note=f"with a barrier after each: {left}",
        ),
    ]  # fmt: skip


def executed(names: list[str]) -> Comparison:
    """Gradients of plans that ran."""
    errors = proof.run(*names)
    return Comparison(
        "largest relative error of executed gradients", [max(one["error"] for one in errors.values())], [0], 1e-5,
        better="lower", note=", ".join(names),
    )  # fmt: skip


def train(steps: int) -> list[Comparison]:
    """Weights after training with post-validation, against an optimiser that waits for all gradients."""
    text = (data.root() / "text" / "tinyshakespeare.txt").read_text()[:20_000]
    letters = sorted(set(text))
    ids = np.array([letters.index(c) for c in text], np.int32)
    width, stages = 32, 4
    keys = jax.random.split(jax.random.PRNGKey(FIRST_SEED), 2 + stages)
    shapes = [(len(letters), width), *[(width, width)] * (stages - 2), (width, len(letters))]
    first = [jax.random.normal(key, shape) / shape[0] ** 0.5 for key, shape in zip(keys, shapes, strict=False)]
    first[0] = first[0] * len(letters) ** 0.5

    def loss(weights, x, y):
        h = weights[0][x]
        for w in weights[1:-1]:
            h = h + jnp.tanh(h @ w)
        return optax.softmax_cross_entropy_with_integer_labels(h @ weights[-1], y).mean()

    grad = jax.jit(jax.value_and_grad(loss))
    optimizer = optax.adamw(1e-2)
    rule = PostValidation(optimizer, clip=1.0)
    update, validate, plain = jax.jit(rule.update), jax.jit(rule.validate), jax.jit(rule._step)
    held = [rule.init(w) for w in first]
    barrier = [(one.params, one.optimizer) for one in held]
    rng, undone, worst, losses = np.random.default_rng(FIRST_SEED), 0, 0.0, []
    for t in range(steps):
        at = rng.integers(0, len(ids) - 1, 64)
        value, grads = grad([one.params for one in held], ids[at], ids[at + 1])
        losses.append(float(value))
        if t == steps // 4:
            grads[2] = grads[2].at[0, 0].set(jnp.nan)
        total = jnp.float32(0)
        for i, g in enumerate(grads):
            held[i], total = update(held[i], g, total)
        for i, one in enumerate(held):
            before, (adam, *_) = one.before, one.optimizer
            if float(one.scale) > 0:
                back, _ = undo_adamw(one.params, adam, one.grads * one.scale, 1e-2)
                worst = max(worst, float(jnp.abs(back - before[0]).max() / jnp.abs(before[0]).max()))
            held[i], wrong = validate(one, total)
            undone += bool(wrong)
        barrier = [plain(*one, g, rule.scale(total)) for one, g in zip(barrier, grads, strict=True)]
    gaps = [float(jnp.abs(a.params - b[0]).max()) for a, b in zip(held, barrier, strict=True)]
    note = f"{undone} updates of {steps * stages} taken back; loss {losses[0]:.2f} to {np.mean(losses[-10:]):.2f}"
    same = "largest difference of weights from those with a barrier"
    return [
        Comparison(same, [max(gaps)], [0], 0, better="lower", note=note),
        Comparison("relative error of a step of AdamW undone by arithmetic", [worst], [0], 1e-4, better="lower"),
    ]


def experiment(size: Size) -> list[Comparison]:
    sizes, times = ((32, 64, 1, 16, 2), 1) if size.smoke else ((256, 688, 8, 128, 20), 5)
    return [
        closed_forms((2, 3) if size.smoke else (2, 3, 4, 6, 8)),
        *random_costs(range(2 if size.smoke else 50)),
        *steps(8, 24, [block(*sizes) for _ in range(times)]),
        *([] if size.smoke else [executed(["zb_h1(4, 8)", "zb_h2(4, 8)", "zb_v(4, 8)"])]),
        *train(12 if size.smoke else 200),
    ]
