"""Run a plan for real: one device a lane, one operation a tick, the gradients of the model that was not cut.

The plan becomes a table, which says for every tick and device what to run, on which slots of its buffers, and what
comes in. One program on all devices scans over it; results go round two rings, by one device up and down. Slots are
given out by the plan, so that the buffers are as large as its peak. What it offloads waits in a second buffer, `host`,
which is memory like any other on virtual devices. What a backward pass needs it computes again from the input of its
stage; the gradient of the weights is a second half of it, cut by `two_stage_backprop.halve`.

Ticks are not times: devices that share a processor say nothing about those.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Float, PyTree, Shaped

from anabranch.plan import Op, Plan, PlanError, simulate
from anabranch.schedule.two_stage_backprop import halve

KINDS = (Op.F, Op.B, Op.W, Op.BW)
MOVES = (Op.D2H, Op.H2D)


class Model(NamedTuple):
    """A model that can be cut: alike stages between a first and a last part, whose weights `outer` all devices hold."""

    first: Callable[[PyTree, Any], Array]
    """`first(outer, inputs of a micro-batch) -> x`."""
    stage: Callable[[PyTree, Array], Array]
    """`stage(weights of a stage, x) -> x` of the same shape."""
    last: Callable[[PyTree, Array, Any], Float[Array, ""]]
    """`last(outer, x, targets of a micro-batch) -> loss`."""

    def loss(self, weights: PyTree, outer: PyTree, inputs: Any, targets: Any) -> Float[Array, ""]:
        """The mean loss over micro-batches, of the model that is not cut."""

        def one(inputs: Any, targets: Any) -> Float[Array, ""]:
            x = jax.lax.scan(lambda x, w: (self.stage(w, x), None), self.first(outer, inputs), weights)[0]
            return self.last(outer, x, targets)

        return jax.lax.map(lambda batch: one(*batch), (inputs, targets)).mean()


class Executed(NamedTuple):
    """What a run gives."""

    loss: Float[Array, ""]
    grads: tuple[PyTree, PyTree]
    """Of the weights, stacked by stage, and of `outer`."""
    ticks: int
    slots: dict[str, list[int]]
    """Slots that each device used: `activation`, `host`, `gradient`, and `weights`, what is kept between B and W."""


class _Row(NamedTuple):
    """What a device does in a tick. Slot -1 is none."""

    op: Any
    chunk: Any
    stage: Any
    micro: Any
    activation: Any
    gradient: Any
    kept: Any
    moves: Any
    """Slots from activation to host, and back from host to activation."""
    came: Any
    """From the device below, from the one above, and from itself: what came (1 activation, 2 gradient) and its slot."""


def execute(
    plan: Plan,
    model: Model,
    weights: PyTree,
    outer: PyTree,
    inputs: Shaped[Array, "m ..."],
    targets: Shaped[Array, "m ..."],
    devices: Sequence[Any] | None = None,
) -> Executed:
    """The loss, and the gradients, of one step.

    Arguments:
        plan: of F, B, W and BW, on any devices, and of D2H and H2D of what F keeps; stages that follow one another are
            on neighbours or on one device.
        weights: stacked by stage.
        inputs, targets: stacked by micro-batch.
        devices: at least as many as the plan has.

    Raises:
        PlanError: if the plan has other operations, or sends to a device that is no neighbour.
        ValueError: if there are too few devices, or the plan has other sizes than weights or inputs.
    """
    p, stages, micros = _devices(plan), int(plan.stage.max()) + 1, int(plan.micro.max()) + 1
    devices = jax.devices() if devices is None else devices
    if len(devices) < p:
        raise ValueError(f"the plan has {p} devices, there are {len(devices)}")
    for name, tree, size in (("weights", weights, stages), ("inputs", inputs, micros), ("targets", targets, micros)):
        found = {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
        if found != {size}:
            raise ValueError(f"{name}: the plan has {size}, found {sorted(found)}")
    table, chunks, slots = _table(plan)
    v = max(map(len, chunks))
    held = np.array([chunk + [chunk[0]] * (v - len(chunk)) for chunk in chunks])
    local = jax.tree.map(lambda leaf: leaf[held], weights)
    mesh = Mesh(np.array(devices[:p]), ("stage",))
    sizes = {name: max(count) for name, count in slots.items()}
    run = jax.shard_map(
        partial(_device, model, stages, micros, p, sizes),
        mesh=mesh,
        in_specs=(Spec("stage"), Spec("stage"), Spec(), Spec(), Spec()),
        out_specs=(Spec("stage"), Spec(), Spec()),
        check_vma=False,
    )
    by_chunk, by_outer, loss = jax.jit(run)(jax.tree.map(jnp.asarray, table), local, outer, inputs, targets)

    def gather(parts: Shaped[Array, "p v ..."], like: Array) -> Array:
        # A device with fewer chunks has its first one again, whose gradients there are zero.
        return jnp.zeros_like(like).at[held].add(parts)

    return Executed(loss, (jax.tree.map(gather, by_chunk, weights), by_outer), len(table.op[0]), slots)


def _device(
    model: Model, stages: int, micros: int, p: int, sizes: dict[str, int], table, local, outer, inputs, targets
):
    """The program of one device: a scan over its rows."""
    table, local = jax.tree.map(lambda leaf: leaf[0], (table, local))
    pick = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    x = jax.eval_shape(model.first, outer, pick(inputs, 0))
    blank = jnp.zeros(x.shape, x.dtype)

    def enter(outer: PyTree, stage: Array, inputs: Any, x: Array) -> Array:
        return jax.lax.cond(stage == 0, lambda: model.first(outer, inputs), lambda: x)

    def backward(w, outer, stage, inputs, targets, x, g):
        def objective(w, outer, x):
            y = model.stage(w, enter(outer, stage, inputs, x))
            last = lambda: model.last(outer, y, targets) / micros
            return jax.lax.cond(stage == stages - 1, last, lambda: jnp.vdot(y, g))

        value, (gw, go, gx) = jax.value_and_grad(objective, (0, 1, 2))(w, outer, x)
        return (value, gx), (gw, go)

    like = (pick(local, 0), outer, jnp.int32(0), pick(inputs, 0), pick(targets, 0), x, x)
    halves = halve(backward, *like)
    kept = jax.eval_shape(halves.first, *like)[1]
    state = {
        "activation": jnp.zeros((sizes["activation"] + 1, *x.shape), x.dtype),  # the last slot is for nothing
        "host": jnp.zeros((sizes["host"] + 1, *x.shape), x.dtype),
        "gradient": jnp.zeros((sizes["gradient"] + 1, *x.shape), x.dtype),
        "kept": [jnp.zeros((sizes["weights"] + 1, *leaf.shape), leaf.dtype) for leaf in kept],
        "grads": jax.tree.map(jnp.zeros_like, (local, outer)),
        "loss": jnp.float32(0),
    }

    def forward_pass(state, row):
        x = enter(outer, row.stage, pick(inputs, row.micro), state["activation"][row.activation])
        return state, model.stage(pick(local, row.chunk), x)

    def first_half(state, row):
        args = pick(inputs, row.micro), pick(targets, row.micro)
        x, g = state["activation"][row.activation], state["gradient"][row.gradient]
        (value, gx), kept = halves.first(pick(local, row.chunk), outer, row.stage, *args, x, g)
        loss = state["loss"] + jnp.where(row.stage == stages - 1, value, 0.0)
        return state | {"loss": loss}, gx, kept

    def second_half(state, row, kept):
        (gw, go), (sums, outers) = halves.second(kept), state["grads"]
        sums = jax.tree.map(lambda total, g: total.at[row.chunk].add(g), sums, gw)
        return state | {"grads": (sums, jax.tree.map(jnp.add, outers, go))}

    def b(state, row):
        state, gx, found = first_half(state, row)
        buffers = [buffer.at[row.kept].set(one) for buffer, one in zip(state["kept"], found)]
        return state | {"kept": buffers}, gx

    def w(state, row):
        return second_half(state, row, [buffer[row.kept] for buffer in state["kept"]]), blank

    def bw(state, row):
        state, gx, found = first_half(state, row)
        return second_half(state, row, found), gx

    branches = [lambda state, row: (state, blank), forward_pass, b, w, bw]

    def tick(state, row):
        for (origin, to), (given, taken) in zip((("activation", "host"), ("host", "activation")), row.moves):
            state = state | {to: state[to].at[taken].set(state[origin][given])}
        state, message = jax.lax.switch(row.op, branches, state, row)
        up = jax.lax.ppermute(message, "stage", [(i, (i + 1) % p) for i in range(p)])
        down = jax.lax.ppermute(message, "stage", [(i, (i - 1) % p) for i in range(p)])
        for (what, slot), came in zip(row.came, (up, down, message)):
            for kind, name in ((1, "activation"), (2, "gradient")):
                at = jnp.where(what == kind, slot, -1)
                state = state | {name: state[name].at[at].set(came)}
        return state, None

    state, _ = jax.lax.scan(tick, state, table)
    sums, outers = state["grads"]
    total = lambda leaf: jax.lax.psum(leaf, "stage")
    return jax.tree.map(lambda leaf: leaf[None], sums), jax.tree.map(total, outers), total(state["loss"])


def _table(plan: Plan) -> tuple[_Row, list[list[int]], dict[str, list[int]]]:
    """The rows i32[p, ticks], the stages of each device, and the slots each device needs."""
    if others := sorted({Op(kind).name for kind in plan.kind.tolist()} - {kind.name for kind in KINDS + MOVES}):
        raise PlanError(f"only F, B, W, BW, D2H and H2D can be executed, the plan has {', '.join(others)}")
    one_each = simulate(replace(plan, dur=np.ones(len(plan)), dep_lag=np.zeros(len(plan.dep_lag))))
    start = one_each.start.astype(int)
    p, ticks, last = _devices(plan), int(one_each.makespan), int(plan.stage.max())
    on = [plan.lanes[lane].device for lane in plan.lane.tolist()]
    ops = list(zip(plan.kind.tolist(), plan.stage.tolist(), plan.micro.tolist(), on, start.tolist()))
    at = {(Op.B if kind == Op.BW else kind, s, i): (d, t) for kind, s, i, d, t in ops}
    chunks = [sorted({s for _, s, _, device, _ in ops if device == d}) for d in range(p)]

    slots: dict[str, list[int]] = {}
    given: dict[tuple[str, int, int], int] = {}
    tick = lambda kind, s, i: at[kind, s, i][1]
    goes = lambda s, i: s > 0 and (Op.D2H, s, i) in at  # stage 0 keeps nothing: it has the inputs
    lives: dict[str, dict[str, Callable[[int, int], tuple[int, int] | None]]] = {
        "activation": {
            "activation": lambda s, i: (
                (tick(Op.F, s - 1, i) + 1, tick(Op.D2H if goes(s, i) else Op.B, s, i) + 1) if s else None
            ),
            "returned": lambda s, i: (tick(Op.H2D, s, i), tick(Op.B, s, i) + 1) if goes(s, i) else None,
        },
        "host": {"host": lambda s, i: (tick(Op.D2H, s, i), tick(Op.H2D, s, i) + 1) if goes(s, i) else None},
        "gradient": {"gradient": lambda s, i: (tick(Op.B, s + 1, i) + 1, tick(Op.B, s, i) + 1) if s < last else None},
        "weights": {"weights": lambda s, i: (tick(Op.B, s, i), tick(Op.W, s, i) + 1) if (Op.W, s, i) in at else None},
    }
    for name, parts in lives.items():
        slots[name] = []
        for d in range(p):
            mine = [(s, i) for kind, s, i, device, _ in ops if device == d and kind == Op.F]
            found = {(part, s, i): life(s, i) for part, life in parts.items() for s, i in mine}
            count, colours = _colour({key: span for key, span in found.items() if span is not None})
            slots[name].append(count)
            given |= colours

    row = _Row(
        *(np.zeros((p, ticks), np.int32) for _ in range(7)), *(np.zeros((p, ticks, n, 2), np.int32) for n in (2, 3))
    )
    for field in (row.activation, row.gradient, row.kept, row.moves):
        field[:] = -1
    for kind, s, i, d, t in ops:
        back = given.get(("returned", s, i))
        if kind in MOVES:
            if back is not None:
                host, leaves = given["host", s, i], kind == Op.D2H
                row.moves[d, t, 1 - leaves] = (given["activation", s, i], host) if leaves else (host, back)
            continue
        row.op[d, t], row.chunk[d, t] = 1 + KINDS.index(Op(kind)), chunks[d].index(s)
        row.stage[d, t], row.micro[d, t] = s, i
        for name, field in (("activation", row.activation), ("gradient", row.gradient), ("weights", row.kept)):
            field[d, t] = given.get((name, s, i), -1)
        if back is not None and kind != Op.F:
            row.activation[d, t] = back
        after = s + 1 if kind == Op.F else s - 1
        if kind == Op.W or not 0 <= after <= last:
            continue
        what, name = (1, "activation") if kind == Op.F else (2, "gradient")
        to = at[Op.F if kind == Op.F else Op.B, after, i][0]
        if to not in (d, (d + 1) % p, (d - 1) % p):
            raise PlanError(f"stage {s} on device {d} sends to device {to}, which is no neighbour")
        way = 2 if to == d else 0 if to == (d + 1) % p else 1
        row.came[to, t, way] = what, given[name, after, i]
    return row, chunks, slots


def _devices(plan: Plan) -> int:
    return 1 + max(lane.device for lane in plan.lanes)


def _colour(spans: dict[tuple[str, int, int], tuple[int, int]]) -> tuple[int, dict[tuple[str, int, int], int]]:
    """As few slots as these spans of time need, and which one each has."""
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    count, colours = 0, {}
    for key, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            colours[key] = heapq.heappop(free)
        else:
            colours[key], count = count, count + 1
        heapq.heappush(busy, (end, colours[key]))
    return count, colours
