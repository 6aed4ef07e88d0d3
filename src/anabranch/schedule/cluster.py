"""What an iteration of a language model costs: from the sizes of a model and a device, or fitted to measurements.

    >>> cost = Roofline(MODELS["llama-3-8b"], DEVICES["a100-80g"])
    >>> seconds = cost.iteration(Work.of(chunk=[512], context=[0], decode=[1000, 2000]))
    >>> 0.02 < seconds < 0.06
    True

Units: seconds, bytes, floating-point operations, tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.optimize import nnls


class Work(NamedTuple):
    """What one iteration computes."""

    tokens: int = 0
    """Of prompts, that are prefilled now."""
    before: int = 0
    """Of these prompts, that were before."""
    pairs: float = 0.0
    """Tokens that see each other: half of Σ chunk (2 context + chunk)."""
    decodes: int = 0
    """Requests that get their next token."""
    held: int = 0
    """Tokens that these have in the cache."""
    layers: float = 1.0
    """The share of all layers through which prompts go now; decodes go through all."""
    share: float = 1.0
    """The share of the device's units that is theirs."""

    @classmethod
    def of(
        cls, chunk: Iterable[int] = (), context: Iterable[int] = (), decode: Iterable[int] = (), *,
        layers: float = 1.0, share: float = 1.0,
    ) -> "Work":  # fmt: skip
        """Of prompts, chunks of these sizes after contexts of these; and decodes after contexts of these.

        >>> Work.of([100, 20], [0, 50], [10, 30])
        Work(tokens=120, before=50, pairs=6200.0, decodes=2, held=40, layers=1.0, share=1.0)
        """
        tokens = before = twice = 0
        for now, then in zip(chunk, context, strict=True):
            tokens, before, twice = tokens + int(now), before + int(then), twice + int(now) * (2 * int(then) + int(now))
        contexts = [int(context) for context in decode]
        return cls(tokens, before, twice / 2, len(contexts), sum(contexts), layers, share)


@dataclass(frozen=True)
class Device:
    """A device: peaks, and the shares of them that real kernels reach."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    host: float = 25e9
    """To the host's memory, bytes a second."""
    launch: float = 5e-6
    """Fixed time of an iteration and layer."""
    reached: tuple[float, float] = (0.6, 0.8)
    """Of `flops`, and of `bandwidth`."""
    drawing: float = 0.4
    """The share of its units that can draw all of the bandwidth; fewer draw in proportion."""
    link: float = 300e9
    """To the devices that share a layer with it, bytes a second each way."""
    hop: float = 10e-6
    """Fixed time of adding up over them."""


DEVICES = {
    one.name: one
    for one in (
        Device("a100-40g", 312e12, 1.555e12, 40e9),
        Device("a100-80g", 312e12, 2.039e12, 80e9),
        Device("a40", 149.7e12, 0.696e12, 48e9, link=32e9),
        Device("h100", 989e12, 3.35e12, 80e9, link=450e9),
    )
}


@dataclass(frozen=True)
class LMSpec:
    """The sizes of a transformer; with `experts`, of one whose MLPs are mixtures of which each token takes `topk`."""

    layers: int
    d: int
    heads: int
    kv_heads: int
    ff: int
    vocab: int
    head_width: int = 0
    """By default d / heads."""
    experts: int = 1
    topk: int = 1
    bytes: int = 2
    """Of a weight, and of a number in the cache."""

    @cached_property
    def _width(self) -> int:
        return self.head_width or self.d // self.heads

    @cached_property
    def attention(self) -> int:
        """Weights of a layer's attention."""
        return self.d * self._width * 2 * (self.heads + self.kv_heads)

    @cached_property
    def expert(self) -> int:
        """Weights of one expert, or of the MLP."""
        return 3 * self.d * self.ff

    @cached_property
    def params(self) -> int:
        return self.layers * (self.attention + self.experts * self.expert) + 2 * self.vocab * self.d

    @cached_property
    def active(self) -> int:
        """Weights that a token meets in the layers."""
        return self.layers * (self.attention + self.topk * self.expert)

    @cached_property
    def kv_bytes(self) -> int:
        """Of a token in the cache."""
        return 2 * self.layers * self.kv_heads * self._width * self.bytes


MODELS = {
    "llama-3-8b": LMSpec(32, 4096, 32, 8, 14_336, 128_256),
    "llama-3-70b": LMSpec(80, 8192, 64, 8, 28_672, 128_256),
    "opt-13b": LMSpec(40, 5120, 40, 40, 13_653, 50_272),
    "qwen3-30b-a3b": LMSpec(48, 2048, 32, 4, 768, 151_936, head_width=128, experts=128, topk=8),
}


def side_by_side(cost: Any, works: list[Work]) -> list[float]:
    """Seconds of iterations on one device, each as long as the others run beside it.

    Units: each iteration has its share; if the shares are more than 1 together, they are cut in proportion. Bandwidth:
    each draws what it needs and its units can; if two together would draw more than there is, the one that draws less
    has its way up to a half, and the other what is left.

        >>> cost = Roofline(MODELS["llama-3-8b"], DEVICES["a100-80g"])
        >>> alone = Work.of(decode=[1000] * 8)  # bound by bandwidth, also on half of the units
        >>> one, two = side_by_side(cost, [alone]), side_by_side(cost, [alone._replace(share=0.5)] * 2)
        >>> bool(1.9 < two[0] / one[0] < 2)  # but not by it alone
        True
    """
    scale = max(1.0, sum(work.share for work in works))
    works = [work._replace(share=work.share / scale) for work in works]
    seconds = [cost.iteration(work) for work in works]
    if len(works) < 2:
        return seconds
    traffic = [cost.traffic(work) for work in works]
    both = list(zip(traffic, seconds, strict=True))
    part = max(0.5, 1 - min(bus / time if bus else 0.0 for bus, time in both))
    return [max(time, bus / part) for bus, time in both]


@dataclass(frozen=True)
class Roofline:
    """Time by the larger of arithmetic and memory traffic, of a model spread over `devices` by tensor parallelism.

    Devices that share every layer add up what they have computed twice in each, in rings: a device sends and receives
    2 (n - 1) / n of the activations, and nothing is computed meanwhile.
    """

    spec: LMSpec
    device: Device
    devices: int = 1

    @property
    def kv_bytes(self) -> int:
        return self.spec.kv_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit beside the weights, a tenth of memory being kept for all else."""
        room = 0.9 * self.device.memory * self.devices - self.spec.params * self.spec.bytes
        return max(0, int(room // self.spec.kv_bytes))

    def loaded(self, tokens: float) -> float:
        """Expected distinct experts of a layer that so many tokens take, if routing is uniform."""
        spec = self.spec
        return spec.experts * (1 - (1 - spec.topk / spec.experts) ** tokens) if spec.experts > 1 else 1.0

    def weight_bytes(self, work: Work) -> float:
        """Weights that an iteration reads."""
        spec, decodes = self.spec, work.decodes
        both = self.loaded(work.tokens + decodes) if spec.experts > 1 else 1.0
        alone = self.loaded(decodes) if decodes else 0.0
        experts = work.layers * both + (1 - work.layers) * alone
        shared = 1.0 if decodes else work.layers
        return spec.bytes * (spec.layers * (shared * spec.attention + experts * spec.expert) + spec.vocab * spec.d)

    def iteration(self, work: Work) -> float:
        """Seconds of one iteration."""
        return self._seconds(work, *self._parts(work, work.held), max)

    def traffic(self, work: Work) -> float:
        """Seconds for which an iteration needs all of the memory's bandwidth."""
        return self._parts(work, work.held)[1]

    def decode_steps(self, work: Work, k: int) -> Float64[np.ndarray, " k"]:
        """Seconds of k iterations that only decode: the first one, and those that follow it."""
        return self._seconds(work, *self._parts(work, work.held + float(work.decodes) * np.arange(k)), np.maximum)

    def _seconds(self, work: Work, compute, memory, larger):
        drawn = min(1.0, work.share / self.device.drawing)
        fixed = self.device.launch * self.spec.layers + self.summing(work)
        return larger(compute / work.share, memory / drawn) + fixed

    def summing(self, work: Work) -> float:
        """Seconds in which devices add up what each has computed."""
        if self.devices == 1:
            return 0.0
        prompts, decodes, spec = work.layers * work.tokens, work.decodes, self.spec
        sent = 2 * (self.devices - 1) / self.devices * (prompts + decodes) * spec.d * spec.bytes / self.device.link
        return 2 * spec.layers * (self.device.hop * (1.0 if decodes else work.layers) + sent)

    def _parts(self, work: Work, decoded):
        """Seconds of arithmetic on all units and of traffic at all bandwidth, with so many tokens in the
        caches of those that decode."""
        spec, n = self.spec, work.decodes
        width = spec.heads * spec._width
        flops = 2 * spec.active * (work.layers * work.tokens + n) + 2 * spec.vocab * spec.d * n
        flops = flops + 4 * width * spec.layers * (work.layers * work.pairs + decoded)
        kv = spec.kv_bytes * (work.layers * (work.before + work.tokens) + decoded + n)
        reached, devices = self.device.reached, self.devices
        compute = flops / (reached[0] * self.device.flops * devices)
        memory = (self.weight_bytes(work) + kv) / (reached[1] * self.device.bandwidth * devices)
        return compute, memory


@dataclass(frozen=True)
class Fitted:
    """Time fitted to measurements, in milliseconds: a prefill of lengths l takes a + b Σl + c Σl², a decode of contexts
    takes a + b Σcontext + c n, with other constants from `threshold` requests on. An iteration that does both takes the
    larger of the two constants once. By default OPT-13B on one A100-80G, as DistServe published it.
    """

    prefill: tuple[float, float, float] = (18.10, 0.10191, 7.122e-6)
    decode: tuple[float, float, float] = (19.93, 6.269e-4, 0.03851)
    large: tuple[float, float, float] = (7.166, 5.798e-4, 0.15831)
    threshold: int = 95
    kv_bytes: int = 819_200
    kv_tokens: int = 48_828
    spec: LMSpec = field(default_factory=lambda: MODELS["opt-13b"])

    @classmethod
    def to(
        cls, prefills: Sequence[tuple[int, float]], decodes: Sequence[tuple[int, int, float]], **sizes: Any
    ) -> "Fitted":
        """Fit the times to measurements, by least squares of relative errors.

        Arguments:
            prefills: tokens of a prompt, and the seconds that its prefill took.
            decodes: requests, tokens in the cache of all of them together, and the seconds that a step took.
            sizes: the other fields.

        Raises:
            ValueError: if there are fewer than three of each.
        """
        if min(len(prefills), len(decodes)) < 3:
            raise ValueError(f"three of each are needed, got {len(prefills)} prefills and {len(decodes)} decodes")
        length, took = np.array(prefills, float).T
        n, context, step = np.array(decodes, float).T
        fit = lambda columns, seconds: nnls(np.stack(columns, 1) / seconds[:, None], np.full(len(seconds), 1e3))[0]
        prefill = tuple(fit([np.ones_like(length), length, length**2], took).tolist())
        decode = tuple(fit([np.ones_like(n), context, n], step).tolist())
        return cls(prefill, decode, decode, **sizes)

    def weight_bytes(self, work: Work) -> float:
        return float(self.spec.params * self.spec.bytes)

    def iteration(self, work: Work) -> float:
        """Seconds of one iteration."""
        constant = rest = 0.0
        if work.tokens:
            constant, b, c = self.prefill
            rest = work.layers * (b * work.tokens + c * 2 * work.pairs)
        if n := work.decodes:
            a, b, c = self.decode if n < self.threshold else self.large
            constant, rest = max(constant, a), rest + b * work.held + c * n
        return (constant + rest) / 1e3 / work.share

    def traffic(self, work: Work) -> float:
        """Seconds of bandwidth: none, since these times do not tell them from arithmetic."""
        return 0.0

    def decode_steps(self, work: Work, k: int) -> Float64[np.ndarray, " k"]:
        """Seconds of k iterations that only decode: the first one, and those that follow it."""
        n = work.decodes
        a, b, c = self.decode if n < self.threshold else self.large
        return np.arange(k) * (b * n / 1e3) + (a + b * work.held + c * n) / 1e3


VLLM = Fitted((22.05, 0.14051, 8.077e-6), (23.48, 5.929e-4, 0.06073), (20.21, 4.908e-4, 0.12000))
"""OPT-13B on one A100-80G under vLLM, as DistServe published it."""
