"""BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and Throughput-oriented Token Batching.
Zheng et al., arXiv 2412.03594, 2024.

When all prompts are known before the first is served, what they share need not be left to a cache that forgets. A
`PrefixTree` of all prompts shows what begins alike; `maximize_reuse` cuts it into groups, each with one prefix, so that
the most tokens are not computed again; `group_requests` puts those groups first that answer much for what they read, so
that later prompts find answers in the making to go along with. `BatchLLM` serves the requests in that order, and lets
new ones in by the memory that is left and not by their number.

    >>> prompts = [[1, 2, 3, 4, 5, 1], [1, 2, 3, 4, 5, 2], [1, 2, 9, 9], [1, 2, 8], [7, 7]]
    >>> tree = PrefixTree(prompts)
    >>> shares = maximize_reuse(tree)
    >>> tree.depth[shares].tolist(), tree.spared(shares), tree.bound()
    ([5, 5, 2, 2, 0], 7, 9)

(Five tokens are computed once for two, two tokens once for two others. All four sharing two would spare 6; that the
first two tokens are computed twice is what it costs that each request has one prefix: `bound` is without that.)

The stream is one of requests, all there from the start; the scheduler keeps no state, for the order is that of arrival
and who has begun is in the view. The prefix of a group is computed by its first member; the last to use it lets it go.

What differs from the authors' code (microsoft/MixLLM): they take groups out of larger ones greedily, from the leaves of
the tree up, wherever that spares more; here the best groups are found exactly. There a prefix is a request of its own,
and a group's members wait for it; here they are let in together. Prefixes are shared by whole blocks. How much memory
is filled (0.9) and how many tokens of prompts go in an iteration (2,048) are inferred. Attention over a shared prefix
(`layers.attention`) is not credited: a decode costs what it would cost alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import ArrayLike, Float64, Int64

from anabranch.plan import Op, Plan, PlanBuilder
from anabranch.schedule.baselines import batch, running
from anabranch.schedule.cluster import Work
from anabranch.schedule.scheduler import WAITING, Cost, Scheduler, View
from anabranch.schedule.workload import Workload


class PrefixTree:
    """The compact tree of prompts: a node wherever at least two of them part, or one ends in another.

    Nodes are rows, children before their parents; the last one is the root. Sorted as words in a dictionary, the
    prompts below a node are neighbours.

    Raises:
        ValueError: if there is no prompt, or one is empty.
    """

    order: Int64[np.ndarray, " n"]
    """The prompts, sorted."""
    length: Int64[np.ndarray, " n"]
    """Their tokens, in that order."""
    parent: Int64[np.ndarray, " nodes"]
    """-1 for the root."""
    depth: Int64[np.ndarray, " nodes"]
    """Tokens from the root on."""
    start: Int64[np.ndarray, " nodes"]
    stop: Int64[np.ndarray, " nodes"]
    """The prompts below a node are `order[start:stop]`."""
    ends: Int64[np.ndarray, " nodes"]
    """How many of them end there; they are the first ones."""

    def __init__(self, prompts: Sequence[Sequence[int] | np.ndarray]):
        if not len(prompts):
            raise ValueError("prompts must hold one")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty")
        words = [np.asarray(prompt, ">u4") for prompt in prompts]  # big-endian bytes sort as the numbers do
        order = sorted(range(len(words)), key=lambda i: words[i].tobytes())
        words = [words[i] for i in order]
        nodes: list[tuple[int, int, int]] = []
        parent: list[int] = []

        def close(depth: int, start: int, stop: int, children: list[int]) -> int:
            for child in children:
                parent[child] = len(nodes)
            nodes.append((depth, start, stop))
            parent.append(-1)
            return len(nodes) - 1

        # What is open is the way from the root to the last prompt; a shorter common prefix closes what is below it.
        open_: list[tuple[int, int, list[int]]] = [(0, 0, [])]
        for i, alike in enumerate([*(_alike(a, b) for a, b in pairwise(words)), 0]):
            while open_[-1][0] > alike:
                depth, start, children = open_.pop()
                node = close(depth, start, i + 1, children)
                if open_[-1][0] < alike:
                    open_.append((alike, start, []))
                open_[-1][2].append(node)
            if open_[-1][0] < alike:
                open_.append((alike, i, []))
        close(0, 0, len(words), open_[0][2])
        self.order, self.length = np.array(order), np.array([len(word) for word in words])
        self.depth, self.start, self.stop = np.array(nodes).T
        self.parent = np.array(parent)
        self.ends = np.array([int((self.length[a:b] == depth).sum()) for depth, a, b in nodes])

    def spared(self, shares: Int64[np.ndarray, " n"], block: int = 1) -> int:
        """Tokens that are not computed again if each prompt shares the depth of this node, in whole blocks, with all
        others that do.

        All but the first of a group find them. Who ends at the node does not find the block with its last token, which
        must be computed to be followed by another; of several that end there the first is the first of the group.
        """
        nodes, sizes = np.unique(shares, return_counts=True)
        return int((self._whole(block)[nodes] * (sizes - 1) - self._last(block)[nodes]).sum())

    def bound(self, block: int = 1) -> int:
        """Tokens that would be spared if prefixes could have any number of levels and nothing were ever forgotten."""
        whole = self._whole(block)
        return int(((whole - whole[self.parent]) * (self.stop - self.start - 1) - self._last(block)).sum())

    def _whole(self, block: int) -> Int64[np.ndarray, " nodes"]:
        """Depths in whole blocks."""
        return self.depth // block * block

    def _last(self, block: int) -> Int64[np.ndarray, " nodes"]:
        """Tokens that those who end at a node do not find there, though others would."""
        return block * (self.depth % block == 0) * (self.depth > 0) * np.maximum(self.ends - 1, 0)


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def maximize_reuse(tree: PrefixTree, block: int = 1) -> Int64[np.ndarray, " n"]:
    """For each prompt the node whose depth it is to share, so that the most tokens are spared; the root if none.

    A prompt shares with others at the deepest node above it that has been chosen. So what is spared below a node
    depends on which node was chosen last on the way to it: a dynamic programme, from the leaves up, over nodes and the
    nodes above them, which takes O(nodes · height).

    Raises:
        ValueError: if a block holds no token.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    whole, last, n = tree._whole(block), tree._last(block), len(tree.depth)
    above: list[list[int]] = [[]] * n  # from the root on
    for node in range(n - 2, -1, -1):
        above[node] = [*above[tree.parent[node]], int(tree.parent[node])]
    direct = tree.stop - tree.start  # prompts below a node and below none of its children
    # By which node above was chosen last: what the children spare together (the last entry: if the node itself is
    # chosen), and what is spared if the node is not chosen.
    below = [np.zeros(len(way) + 1) for way in above]
    skip: list[np.ndarray] = [np.zeros(0)] * n
    take = np.zeros(n)
    for node in range(n - 1):
        up = tree.parent[node]
        direct[up] -= tree.stop[node] - tree.start[node]
        skip[node] = below[node][:-1] + direct[node] * whole[above[node]]
        take[node] = below[node][-1] + (direct[node] - 1) * whole[node] - last[node]
        below[up] += np.maximum(skip[node], take[node])
        below[node] = np.zeros(0)
    chosen, level = np.full(n, n - 1), np.zeros(n, np.int64)
    for node in range(n - 2, -1, -1):
        up = tree.parent[node]
        taken = take[node] > skip[node][level[up]]
        chosen[node], level[node] = (node, len(above[node])) if taken else (chosen[up], level[up])
    shares = np.zeros(len(tree.order), np.int64)
    for node in range(n - 1, -1, -1):  # children after their parents: what is below them is theirs
        shares[tree.order[tree.start[node] : tree.stop[node]]] = chosen[node]
    return shares


class Groups(NamedTuple):
    """Requests in the order in which they are to be served, group after group."""

    load: Workload
    """With the columns `group` and `shared`."""
    order: Int64[np.ndarray, " n"]
    """Which request of the workload as it was given each one is."""
    expected: Float64[np.ndarray, " n"]
    """Tokens of its answer."""
    spared: int
    """Tokens of prompts that need not be computed."""

    def plan(self, cost: Cost, block: int = 16) -> Plan:
        """The groups one after the other, each prefilled and then decoded: what is computed, and how long blocks live.

        For drawing and checking; served, groups overlap. Micro-batches are groups, memory is in blocks.
        """
        b = PlanBuilder(name="BatchLLM")
        lane, pool = b.lane(0), b.pool(0)
        load = self.load
        for group in range(int(load.group.max()) + 1):
            rows = np.flatnonzero(load.group == group)
            prefix = load.shared[rows[0]] // block * block
            chunk = load.prompt[rows] - prefix
            chunk[0] += prefix
            before = load.prompt[rows] - chunk
            steps = max(int(self.expected[rows].max()) - 1, 0)
            held = {
                pool: float(prefix // block + (-(-(load.prompt[rows] + load.output[rows] - prefix) // block)).sum())
            }
            first = b.add(Op.PREFILL, lane, cost.iteration(Work.of(chunk, before)), micro=group, alloc=held)
            took = float(cost.decode_steps(Work.of(decode=load.prompt[rows] + 1), steps).sum())
            b.add(Op.DECODE, lane, took, micro=group, after=[first], free=held)
        return b.build()


def group_requests(load: Workload, expected: ArrayLike, block: int = 16, *, reorder: bool = True) -> Groups:
    """Cut requests into groups that share one prefix each, and order these by tokens to decode for each to prefill.

    Arguments:
        load: with `tokens`; all requests arrive before the first is served.
        expected: tokens of the answers, one number for all or one each: limits, or the mean of the task.
        block: tokens of a block of the cache.
        reorder: without, groups are served in the order in which their first requests come.

    Raises:
        ValueError: if the workload has no tokens, or an expected length is not positive.
    """
    if load.tokens is None:
        raise ValueError("load.tokens is None: prompts can only be grouped by what is in them")
    answers = np.broadcast_to(np.asarray(expected, np.float64), len(load))
    if not (answers > 0).all():
        raise ValueError(f"expected must be positive, got {answers[~(answers > 0)][0]} in row {(answers > 0).argmin()}")
    tree = PrefixTree(list(load.tokens))
    shares = maximize_reuse(tree, block)
    # Who shares nothing is a group of its own; within a group they stay sorted, as `spared` counts on.
    key = np.where(tree.depth[shares] > 0, shares, len(tree.depth) + np.arange(len(load)))[tree.order]
    groups = [tree.order[key == k] for k in np.unique(key)]
    prefix = np.array([tree.depth[shares[rows[0]]] // block * block for rows in groups])
    computed = np.array([load.prompt[rows].sum() - (len(rows) - 1) * p for rows, p in zip(groups, prefix)])
    ratio = np.array([answers[rows].sum() for rows in groups]) / computed
    first = np.array([rows.min() for rows in groups])
    ranks = np.lexsort((first, -ratio)) if reorder else np.argsort(first)
    order, sizes = np.concatenate([groups[g] for g in ranks]), [len(groups[g]) for g in ranks]
    ordered = replace(
        replace(load, arrival=np.zeros(len(load))).take(order),
        group=np.repeat(np.arange(len(groups)), sizes),
        shared=np.repeat(prefix[ranks], sizes),
    )
    return Groups(ordered, order, answers[order], tree.spared(shares, block))


class BatchLLM(Scheduler):
    """Everybody decodes; prompts are let in, in order, while their blocks leave some of the memory to those who decode.

    A group's prefix stays in memory from its first request to its last. For engines with `prefixes`.

    Args:
        group: of each request, by number, as in `Groups.load`; -1 is none.
        shared: tokens with which all requests of its group begin.
        chunk: tokens of prompts in an iteration.
        high: share of the blocks up to which requests are let in; one block for each that decodes counts as taken.

    Raises:
        ValueError: if `chunk` is not positive, `high` is not in (0, 1], or columns differ in length.
    """

    group: Int64[np.ndarray, " n"]
    shared: Int64[np.ndarray, " n"]
    chunk: int = eqx.field(static=True, default=2048)
    high: float = eqx.field(static=True, default=0.9)

    def __check_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk must be positive, got {self.chunk}")
        if not 0 < self.high <= 1:
            raise ValueError(f"high must be in (0, 1], got {self.high}")
        if len(self.group) != len(self.shared):
            raise ValueError(f"group has {len(self.group)} rows, shared {len(self.shared)}")

    def act(self, state, x: View):  # pyright: ignore[reportIncompatibleMethodOverride]
        decode, preempted, free = running(x)
        found: dict[int, int] = {}
        if not preempted:
            found, free = self._admit(x, len(decode), free)
        keep = []
        new = np.flatnonzero((x.status == WAITING) & (x.preempted == 0))
        new = new[~np.isin(new, list(found))]
        if len(new):
            first = new[np.argmin(x.id[new])]
            # The next of the group in progress is to find its prefix, also if somebody sent away comes before it.
            if x.need(x.hit[first]) - x.blocks[first] <= free:
                keep = [int(first)]
        if not len(decode) and not found:  # what is kept is in the way of the only one that could go on
            return state, batch(decode, preempted, {})._replace(timer=x.now if x.prompts else None)
        return state, batch(decode, preempted, found)._replace(keep=keep)

    def _admit(self, x: View, decodes: int, free: int) -> tuple[dict[int, int], int]:
        """Tokens of each prompt, and the blocks that are left."""
        found: dict[int, int] = {}
        budget, seats = self.chunk, x.max_seqs - decodes
        room = free - (1 - self.high) * x.total_blocks - decodes
        made: dict[int, int] = {}  # tokens of a group's prefix that are there, or are made in this iteration
        for slot in x.prompts:
            group, hit, begins = int(self.group[x.id[slot]]), int(x.hit[slot]), x.status[slot] == WAITING
            there = hit
            if begins:  # whole blocks, and not the one with the last token
                there = max(hit, min(made.get(group, 0), int(x.prompt[slot]) - 1) // x.block * x.block)
            take = min(int(x.prompt[slot]) - there, budget)
            need = int(x.need(x.prompt[slot]) - x.blocks[slot]) - (there - hit) // x.block
            alone = not decodes and not found
            if take <= 0 or len(found) >= seats or need > (free if alone or not begins else room):
                break
            found[slot] = take
            free, room, budget = free - need, room - need - 1, budget - take
            if group >= 0:
                made[group] = max(made.get(group, 0), min(int(self.shared[x.id[slot]]), there + take))
        return found, free
