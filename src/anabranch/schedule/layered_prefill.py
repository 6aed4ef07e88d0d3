"""Layered prefill: From Tokens to Layers: Redefining Stall-Free Scheduling for LLM Serving with Layered Prefill, 2025.

Chunked prefill cuts a prompt by tokens, and every chunk loads every expert of a mixture again. Here the model is cut by
layers: in each iteration everything decodes through all layers, and the prompts that were let in go, whole, through one
group of layers more. Decodes never stall, as with chunks, and a prompt meets each layer's weights once.

    >>> [groups_for(tokens) for tokens in (1, 512, 513, 2048, 5000)]
    [1, 1, 2, 4, 16]

A set of prompts is let in when the one before it is through, so that under load sets grow: fewer loads, not shorter
waits. Numbers of groups and rules of admission are those of the authors' code.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Int64

from anabranch.schedule.baselines import admit, batch, running
from anabranch.schedule.cluster import Roofline, Work
from anabranch.schedule.scheduler import PREFILLING, Scheduler, View

MOST = 16
"""Groups of layers."""


def groups_for(tokens: int, most: int = MOST, unit: int = 512) -> int:
    """In how many groups the layers are cut for so many tokens: a power of two, so that an iteration has about the work
    of `unit` tokens."""
    return min(most, next((groups for groups in (1, 2, 4, 8) if tokens <= groups * unit), MOST))


class Layered(NamedTuple):
    """The set of prompts on its way through the layers."""

    stage: int
    """Groups it has passed."""
    groups: int
    members: Int64[np.ndarray, " k"]
    """Requests in it."""
    tokens: Int64[np.ndarray, " k"]
    """Of each, that go through now."""


class LayeredPrefill(Scheduler):
    """Decodes through all layers, and a set of prompts through one group of them, in each iteration.

    State: `Layered`.

    Args:
        layers: of the model; there are no more groups than that.
        most: tokens of a set; a longer prompt goes in parts, one set after the other.
        unit: tokens for whose work there is a group.

    Raises:
        ValueError: if a size is not positive.
    """

    layered: ClassVar[bool] = True

    layers: int = eqx.field(static=True, default=MOST)
    most: int = eqx.field(static=True, default=8192)
    unit: int = eqx.field(static=True, default=512)

    def __check_init__(self):
        for name in ("layers", "most", "unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def init(self, *, key=None) -> Layered:
        none = np.zeros(0, np.int64)
        return Layered(0, 1, none, none)

    def act(self, state: Layered, x: View):  # pyright: ignore[reportIncompatibleMethodOverride]
        decode, preempted, free = running(x)
        if not len(state.members):
            state = self._admit(x, free, x.max_seqs - len(decode), bool(preempted))
        if not len(state.members):
            return state, batch(decode, preempted, {})
        seats = {int(i): slot for slot, i in enumerate(x.id.tolist()) if i >= 0}
        chunks = {seats[i]: count for i, count in zip(state.members.tolist(), state.tokens.tolist(), strict=True)}
        low, high = state.stage / state.groups, (state.stage + 1) / state.groups
        made = batch(decode, preempted, chunks)._replace(layers=(low, high))
        through = state.stage + 1 == state.groups
        return (self.init() if through else state._replace(stage=state.stage + 1)), made

    def _admit(self, x: View, free: int, seats: int, full: bool) -> Layered:
        """The next set, in the order of arrival, what has been begun first."""
        order = x.prompts
        if full:
            order = [slot for slot in order if x.status[slot] == PREFILLING]
        found = admit(x, order, free, min(self.most, x.max_tokens), seats, whole=False)
        tokens = np.array(list(found.values()), np.int64)
        groups = groups_for(int(tokens.sum()), min(MOST, self.layers), self.unit)
        return Layered(0, groups, x.id[list(found)], tokens)


def expert_traffic(cost: Roofline, decode: int, tokens: int, groups: int, chunk: int) -> tuple[float, float]:
    """Expected bytes of weights that a prompt of so many tokens makes an engine read, beside so many decodes.

    Returns what layers in groups and what chunks of `chunk` tokens read, the weights read by decodes alone included.
    """
    one = lambda count, layers: cost.weight_bytes(Work(tokens=count, decodes=decode, layers=layers))
    whole, rest = divmod(tokens, chunk)
    return groups * one(tokens, 1 / groups), whole * one(chunk, 1.0) + (one(rest, 1.0) if rest else 0.0)
