"""Run a plan for real: one device a lane, one operation a tick, the gradients of the model that was not cut.

The plan becomes a table, which says for every tick and device what to run, on which slots of its buffers, and what
comes in. One program on all devices scans over it; results go round two rings, by one device up and down. Slots are
given out by the plan, so that the buffers are as large as its peak. What it offloads waits in a second buffer, `host`,
which is memory like any other on virtual devices. What a backward pass needs it computes again from the input of its
stage; the gradient of the weights is a second half of it, cut by `two_stage_backprop.halve`.

In a plan with AG and RS each device stands for a group, each of which has a part of every weight and of every
micro-batch: weights are gathered when the plan says so and gradients scattered, and both have slots in between.

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
SHARES = (Op.AG, Op.RS)


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
    """Slots that each device used: `activation`, `host`, `gradient`, `weights`, what is kept between B and W, and of a
    plan with groups `gathered`, weights, and `sums`, gradients that are to be scattered."""


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
    held: Any
    """Of a group: the slots of the weights that are used, and of the sum that gradients are added to."""
    shares: Any
    """Of a group: what is gathered now, and what scattered: chunk and slot."""


def execute(
    plan: Plan,
    model: Model,
    weights: PyTree,
    outer: PyTree,
    inputs: Shaped[Array, "m ..."],
    targets: Shaped[Array, "m ..."],
    devices: Sequence[Any] | None = None,
    group: int = 1,
) -> Executed:
    """The loss, and the gradients, of one step.

    Arguments:
        plan: of F, B, W and BW, on any devices, of D2H and H2D of what F keeps, and of AG and RS of each stage's
            weights, of all stages or of none; stages that follow one another are on neighbours or on one device.
        weights: stacked by stage.
        inputs, targets: stacked by micro-batch.
        devices: at least as many as the plan has, times `group`.
        group: devices for which one of the plan stands, which share weights and micro-batches.

    Raises:
        PlanError: if the plan has other operations, or sends to a device that is no neighbour.
        ValueError: if there are too few devices, or the plan has other sizes than weights or inputs.
    """
    p, stages, micros = _devices(plan), int(plan.stage.max()) + 1, int(plan.micro.max()) + 1
    devices = jax.devices() if devices is None else devices
    if len(devices) < p * group:
        raise ValueError(f"the plan has {p * group} devices, there are {len(devices)}")
    if group > 1 and not (plan.kind == Op.AG).any():
        raise ValueError(f"group is {group}, but the plan gathers no weights")
    uneven = {leaf.shape[1] for leaf in jax.tree.leaves((inputs, targets)) if group > 1 and leaf.shape[1] % group}
    if uneven:
        raise ValueError(f"a micro-batch of {min(uneven)} cannot be shared by a group of {group}")
    for name, tree, size in (("weights", weights, stages), ("inputs", inputs, micros), ("targets", targets, micros)):
        found = {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
        if found != {size}:
            raise ValueError(f"{name}: the plan has {size}, found {sorted(found)}")
    table, chunks, slots = _table(plan)
    v = max(map(len, chunks))
    held = np.array([chunk + [chunk[0]] * (v - len(chunk)) for chunk in chunks])
    local = jax.tree.map(lambda leaf: leaf[held], weights)
    shared, mine = bool(slots["gathered"]), Spec("stage")
    if shared:  # flat, so that a group can share any of them
        local = jax.tree.map(lambda leaf: _flat(leaf, group), local)
        mine = Spec("stage", None, "group")
    mesh = Mesh(np.array(devices[: p * group]).reshape(p, group), ("stage", "group"))
    sizes = {name: max(count, default=0) for name, count in slots.items()}
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), weights)
    part = Spec(None, "group") if shared else Spec()
    run = jax.shard_map(
        partial(_device, model, stages, micros, (p, group), sizes, like),
        mesh=mesh,
        in_specs=(Spec("stage"), mine, Spec(), part, part),
        out_specs=(mine, Spec(), Spec()),
        check_vma=False,
    )
    by_chunk, by_outer, loss = jax.jit(run)(jax.tree.map(jnp.asarray, table), local, outer, inputs, targets)
    if shared:
        whole = lambda flat, like: flat[..., : like.size].reshape(*flat.shape[:2], *like.shape)
        by_chunk = jax.tree.map(whole, by_chunk, like)

    def gather(parts: Shaped[Array, "p v ..."], like: Array) -> Array:
        # A device with fewer chunks has its first one again, whose gradients there are zero.
        return jnp.zeros_like(like).at[held].add(parts)

    return Executed(loss, (jax.tree.map(gather, by_chunk, weights), by_outer), len(table.op[0]), slots)


def _flat(leaf: Shaped[Array, "p v ..."], group: int) -> Shaped[Array, "p v n"]:
    """Weights in a row, with as many zeros behind them as a group needs to have equal parts."""
    flat = leaf.reshape(*leaf.shape[:2], -1)
    return jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % group)))


def _device(
    model: Model, stages: int, micros: int, mesh: tuple[int, int], sizes: dict[str, int], like: PyTree,
    table, local, outer, inputs, targets,
):  # fmt: skip
    """The program of one device: a scan over its rows."""
    p, group = mesh
    table, local = jax.tree.map(lambda leaf: leaf[0], (table, local))
    pick = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    shared = sizes["gathered"] > 0
    buffer = lambda count: jax.tree.map(lambda leaf: jnp.zeros((count + 1, *leaf.shape), leaf.dtype), like)
    x = jax.eval_shape(model.first, outer, pick(inputs, 0))
    blank = jnp.zeros(x.shape, x.dtype)

    def enter(outer: PyTree, stage: Array, inputs: Any, x: Array) -> Array:
        return jax.lax.cond(stage == 0, lambda: model.first(outer, inputs), lambda: x)

    def backward(w, outer, stage, inputs, targets, x, g):
        def objective(w, outer, x):
            y = model.stage(w, enter(outer, stage, inputs, x))
            last = lambda: model.last(outer, y, targets) / (micros * group)
            return jax.lax.cond(stage == stages - 1, last, lambda: jnp.vdot(y, g))

        value, (gw, go, gx) = jax.value_and_grad(objective, (0, 1, 2))(w, outer, x)
        return (value, gx), (gw, go)

    args = (like, outer, jnp.int32(0), pick(inputs, 0), pick(targets, 0), x, x)
    halves = halve(backward, *args)
    kept = jax.eval_shape(halves.first, *args)[1]
    state = {
        "activation": jnp.zeros((sizes["activation"] + 1, *x.shape), x.dtype),  # the last slot is for nothing
        "host": jnp.zeros((sizes["host"] + 1, *x.shape), x.dtype),
        "gradient": jnp.zeros((sizes["gradient"] + 1, *x.shape), x.dtype),
        "kept": [jnp.zeros((sizes["weights"] + 1, *leaf.shape), leaf.dtype) for leaf in kept],
        "grads": jax.tree.map(jnp.zeros_like, (local, outer)),
        "loss": jnp.float32(0),
    }
    if shared:
        state |= {"gathered": buffer(sizes["gathered"]), "sums": buffer(sizes["sums"])}

    def weights(state, row):
        return pick(state["gathered"], row.held[0]) if shared else pick(local, row.chunk)

    def forward_pass(state, row):
        x = enter(outer, row.stage, pick(inputs, row.micro), state["activation"][row.activation])
        return state, model.stage(weights(state, row), x)

    def first_half(state, row):
        args = pick(inputs, row.micro), pick(targets, row.micro)
        x, g = state["activation"][row.activation], state["gradient"][row.gradient]
        (value, gx), kept = halves.first(weights(state, row), outer, row.stage, *args, x, g)
        loss = state["loss"] + jnp.where(row.stage == stages - 1, value, 0.0)
        return state | {"loss": loss}, gx, kept

    def second_half(state, row, kept):
        (gw, go), (sums, outers) = halves.second(kept), state["grads"]
        at = row.held[1] if shared else row.chunk
        added = jax.tree.map(lambda total, g: total.at[at].add(g), state["sums"] if shared else sums, gw)
        outers = jax.tree.map(jnp.add, outers, go)
        return state | ({"sums": added, "grads": (sums, outers)} if shared else {"grads": (added, outers)})

    def b(state, row):
        state, gx, found = first_half(state, row)
        buffers = [buffer.at[row.kept].set(one) for buffer, one in zip(state["kept"], found)]
        return state | {"kept": buffers}, gx

    def w(state, row):
        return second_half(state, row, [buffer[row.kept] for buffer in state["kept"]]), blank

    def bw(state, row):
        state, gx, found = first_half(state, row)
        return second_half(state, row, found), gx

    def share(state, shares):
        """Gather the weights of a chunk, and scatter the gradients of another; on every tick, as all devices must."""
        (chunk, slot), (other, done) = shares

        def gathered(buffer, shard):
            whole = jax.lax.all_gather(shard[chunk], "group", tiled=True)
            return buffer.at[slot].set(whole[: buffer[0].size].reshape(buffer.shape[1:]))

        def scattered(total, full):
            flat = jnp.pad(full[done].ravel(), (0, total.shape[1] * group - full[0].size))
            part = jax.lax.psum_scatter(flat, "group", tiled=True)
            return total.at[other].add(jnp.where(done >= 0, part, 0.0))

        sums, outers = state["grads"]
        sums = jax.tree.map(scattered, sums, state["sums"])
        emptied = jax.tree.map(lambda full: full.at[done].set(0.0), state["sums"])
        weights = jax.tree.map(gathered, state["gathered"], local)
        return state | {"gathered": weights, "sums": emptied, "grads": (sums, outers)}

    branches = [lambda state, row: (state, blank), forward_pass, b, w, bw]

    def tick(state, row):
        for (origin, to), (given, taken) in zip((("activation", "host"), ("host", "activation")), row.moves):
            state = state | {to: state[to].at[taken].set(state[origin][given])}
        state, message = jax.lax.switch(row.op, branches, state, row)
        if shared:
            state = share(state, row.shares)
        up = jax.lax.ppermute(message, "stage", [(i, (i + 1) % p) for i in range(p)])
        down = jax.lax.ppermute(message, "stage", [(i, (i - 1) % p) for i in range(p)])
        for (what, slot), came in zip(row.came, (up, down, message)):
            for kind, name in ((1, "activation"), (2, "gradient")):
                at = jnp.where(what == kind, slot, -1)
                state = state | {name: state[name].at[at].set(came)}
        return state, None

    state, _ = jax.lax.scan(tick, state, table)
    sums, outers = state["grads"]
    total = lambda leaf: jax.lax.psum(leaf, ("stage", "group"))
    return jax.tree.map(lambda leaf: leaf[None], sums), jax.tree.map(total, outers), total(state["loss"])


def _table(plan: Plan) -> tuple[_Row, list[list[int]], dict[str, list[int]]]:
    """The rows i32[p, ticks], the stages of each device, and the slots each device needs."""
    if others := sorted(
        {Op(kind).name for kind in plan.kind.tolist()} - {kind.name for kind in KINDS + MOVES + SHARES}
    ):
        raise PlanError(f"only F, B, W, BW, D2H, H2D, AG and RS can be executed, the plan has {', '.join(others)}")
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
    shares = _shares(ops, p, slots)

    row = _Row(*(np.zeros((p, ticks, *shape), np.int32) for shape in (*[()] * 7, (2, 2), (3, 2), (2,), (2, 2))))
    for field in (row.activation, row.gradient, row.kept, row.moves, row.held, row.shares[..., 1]):
        field[:] = -1
    for kind, s, i, d, t in ops:
        if kind in SHARES:
            row.shares[d, t, SHARES.index(Op(kind))] = chunks[d].index(s), shares[kind, s, t]
            continue
        row.held[d, t] = [shares.get((share, kind, s, i), -1) for share in SHARES]
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


def _shares(ops: list[tuple], p: int, slots: dict[str, list[int]]) -> dict[tuple, int]:
    """The slots of weights that are gathered and of gradients that are to be scattered: of each AG and RS by its tick,
    and of what uses them. A pass uses the weights of its stage that came last, and adds to the next RS of its stage.

    Raises:
        PlanError: if a stage has no weights when it needs them, or gradients that are not scattered.
    """
    slots |= {"gathered": [], "sums": []}
    moves = {share: [(s, t) for kind, s, _, _, t in ops if kind == share] for share in SHARES}
    if not any(moves.values()):
        return {}
    found: dict[tuple, int] = {}
    for share, name in zip(SHARES, ("gathered", "sums")):
        users: dict[tuple[int, int], list[tuple]] = {move: [] for move in moves[share]}
        for kind, s, i, _, t in ops:
            if kind in ((Op.F, Op.B, Op.BW) if share == Op.AG else (Op.W, Op.BW)):
                near = [at for stage, at in moves[share] if stage == s and (at < t if share == Op.AG else at >= t)]
                if not near:
                    raise PlanError(f"{Op(kind).name} of stage {s}, micro-batch {i}, has no {share.name}")
                users[s, max(near) if share == Op.AG else min(near)].append((share, kind, s, i, t))
        for d in range(p):
            here = {s for _, s, _, device, _ in ops if device == d}
            spans: dict[Any, tuple[int, int]] = {
                (share, s, t): (min([t, *(u[-1] for u in some)]), max([t, *(u[-1] for u in some)]) + 1)
                for (s, t), some in users.items()
                if s in here
            }
            count, colours = _colour(spans)
            slots[name].append(count)
            found |= colours
        found |= {user[:-1]: found[share, s, t] for (s, t), some in users.items() for user in some}
    return found


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
