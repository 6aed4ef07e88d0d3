"""2BP: a backward pass in two halves, of which only the first is waited for, makes pipelines quicker.

Closed forms of the four schedules, to the last tick. Then throughput with and without, on four devices, by passes that
were measured on this machine: a block of Llama (width 256, 8 texts of 128 tokens) and a block of a residual network
(32 images of 8 x 8 pixels, 32 channels); the peak memory beside it, which is the price. Gradients of a plan that was
executed on virtual devices, three times with other weights. And the second halves of eight micro-batches one by one
against as one product.

Devices are simulated: virtual ones share two cores, so that times of a whole pipeline would mean nothing here. The
paper's 1.70 is of a 7-billion transformer on 4 GPUs.
"""

import statistics
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from anabranch.claim import Comparison, Size
from anabranch.models.llama import Block, Config
from anabranch.models.resnet import ResNet
from anabranch.plan import check, simulate
from anabranch.schedule import proof
from anabranch.schedule.base import Schedule, gpipe, one_f_one_b
from anabranch.schedule.two_stage_backprop import measure, naive, split_vjp, two_stage

P, FIRST_SEED = 4, 100


def four(p: int) -> dict[str, Schedule]:
    return {"Naive": naive(p), "GPipe": gpipe(p, p), "1F1B-1": one_f_one_b(p, p), "1F1B-2": one_f_one_b(p, 2 * p)}


def closed_forms(ps: tuple[int, ...]) -> Comparison:
    worst, count = 0.0, 0
    for p in ps:
        said = {
            "Naive": (3 * p, 2 * p + 1), "GPipe": (3 * (2 * p - 1), 3 * p + 2 * (p - 1)),
            "1F1B-1": (3 * (2 * p - 1), 4 * p - 1), "1F1B-2": (3 * (3 * p - 1), 7 * p - 1),
        }  # fmt: skip
        for name, schedule in four(p).items():
            found = [simulate(check(one.plan())).makespan for one in (schedule, two_stage(schedule))]
            worst = max(worst, *(abs(a - b) for a, b in zip(found, said[name], strict=True)))
            count += 2
    return Comparison(
        "largest difference from the closed forms, ticks", [worst], [0], 0, better="lower", note=f"{count} makespans"
    )


def stages(smoke: bool) -> dict[str, tuple[Callable, object, jax.Array]]:
    """What is measured: a stage, its weights and its input."""
    width, hidden, rows, length = (32, 64, 1, 16) if smoke else (256, 688, 8, 128)
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    config = Config(width=width, hidden=hidden, heads=4, kv_heads=4, layers=1)
    llama, llama_rest = eqx.partition(Block.random(config, keys[0]), eqx.is_array)
    channels = 8 if smoke else 32
    residual, residual_rest = eqx.partition(ResNet(4, (channels,), channels, key=keys[1]).blocks[0], eqx.is_array)
    texts, images = (rows, length, width), (32, channels, 8, 8)
    return {
        "Llama": (lambda w, x: jax.vmap(eqx.combine(w, llama_rest))(x), llama, jax.random.normal(keys[2], texts)),
        "ResNet": (lambda w, x: eqx.combine(w, residual_rest)(x), residual, jax.random.normal(keys[3], images)),
    }


def gains(times: int, repeats: int, smoke: bool) -> list[Comparison]:
    out = []
    for model, (stage, weights, x) in stages(smoke).items():
        costs = [measure(stage, weights, x, repeats) for _ in range(times)]
        said = ", ".join("/".join(f"{1e3 * float(t):.2f}" for t in (c.forward, c.backward, c.weight)) for c in costs)
        for name, schedule in four(P).items():
            rate = lambda s, c: 1 / simulate(s.plan(c)).makespan
            ours = [rate(two_stage(schedule, c), c) for c in costs]
            peaks = [simulate(s.plan(costs[0])).peak.max() for s in (schedule, two_stage(schedule, costs[0]))]
            note = f"peak memory {peaks[0] / 2**20:.1f} to {peaks[1] / 2**20:.1f} MiB"
            if name == "Naive":
                note += f"; F/B/W, ms: {said}"
            out.append(
                Comparison(
                    f"steps a second with 2BP over without, {name}, {model}", ours, [rate(schedule, c) for c in costs],
                    1.15 if name == "Naive" else 1.05, kind="ratio", note=note,
                    paper="1.70 x for a 7B transformer on 4 GPUs" if model == "Llama" else "",
                )
            )  # fmt: skip
    return out


def merged(repeats: int, smoke: bool) -> str:
    """Time of the second halves of eight micro-batches one by one, over that of all at once."""
    stage, weights, _ = stages(smoke)["Llama"]
    x = jax.random.normal(jax.random.PRNGKey(5), (8, 1, *((16, 32) if smoke else (128, 256))))
    one, all_at_once = split_vjp(stage, weights, x[0]), split_vjp(stage, weights, x[:, 0])
    add = jax.jit(lambda total, kept: jax.tree.map(jnp.add, total, one.weight(kept)))

    def kept(passes, x):
        y, found = jax.jit(passes.forward)(weights, x)
        return jax.jit(passes.backward)(found, y)[1]

    parts, whole, product = [kept(one, part) for part in x], kept(all_at_once, x[:, 0]), jax.jit(all_at_once.weight)
    zero = jax.tree.map(jnp.zeros_like, weights)

    def loop():
        total = zero
        for part in parts:
            total = add(total, part)
        return total

    took: dict[str, list[float]] = {"loop": [], "merged": []}
    runs: dict[str, Callable] = {"loop": loop, "merged": lambda: product(whole)}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            took[name].append(time.perf_counter() - begin)
    gap = max(
        float(jnp.abs(a - b).max() / jnp.abs(b).max())
        for a, b in zip(jax.tree.leaves(loop()), jax.tree.leaves(product(whole)), strict=True)
    )
    gain = statistics.median(took["loop"]) / statistics.median(took["merged"])
    return f"second halves as one product {gain:.2f} x as fast as one by one; gradients {gap:.1e} apart, relatively"


def executed(times: int) -> Comparison:
    name = "two_stage(one_f_one_b(4, 4))"
    errors = [proof.run(name, seed=FIRST_SEED + i)[name]["error"] for i in range(times)]
    return Comparison("relative error of executed gradients", errors, [0] * len(errors), 1e-5, better="lower")


def experiment(size: Size) -> list[Comparison]:
    out = [
        closed_forms((2,) if size.smoke else (2, 4, 8)),
        *gains(1 if size.smoke else 5, 2 if size.smoke else 20, size.smoke),
        *([] if size.smoke else [executed(3)]),
    ]
    out[0].note += "; " + merged(2 if size.smoke else 30, size.smoke)
    return out
