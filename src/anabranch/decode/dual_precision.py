"""Dual Precision Quantization for Efficient and Accurate Deep Neural Networks Inference, arXiv 2505.14638, 2025.

The matrices of a language model are stored in 4 bits, on a grid whose values are numbers in 8-bit floating point (FP8,
E4M3). A step widens them to FP8, rounds what comes in to FP8 too, and multiplies: memory of 4 bits, arithmetic of 8.
The stream and its state are those of the `Decoder` that is given: tokens i32[] in, logits out; only its weights change.

    >>> cell, tokens = example()
    >>> type(cell.layers[0].down).__name__, cell.layers[0].down.q.shape
    ('W4A8Linear', (16, 16))
    >>> cell.step(cell.init(), tokens[0])[1].shape
    (11,)

A matrix w is near s8 · fp8(s4 · (q - z)): s8 is one power of two; s4 and z belong to each output and group of inputs.
As in GPTQ (arXiv 2210.17323), inputs are rounded one after the other, and those still to come make up for what is
lost, as far as real text lets them. What is lost is reckoned *after* the rounding to FP8. Inputs that matter most go
first, but none leaves its group ("gar", group-aware reordering), so that the order can be undone and a step gathers
nothing.

The authors' code (neural-compressor) is followed where it says more than the paper: s4 and z come from the matrix as it
was, rounded to FP8, not from what the rounding of earlier groups made of it; and without FP8 from the matrix as it then
is. It takes the range of FP8 from one format and rounds to another; that is `fp8="gaudi"`, and not the default. Here
matrices with the same input are one, so that they share s8. Embedding, head and norms stay as they are.

What is approximated: FP8 is rounded to exactly, but multiplied in float32, and widened in every step. On a CPU this
saves memory, not time. The scale of what comes in is fixed by the calibration, and is a power of two too: what is
larger later saturates.
"""

from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from anabranch.cell import noise
from anabranch.layers.kv import Room
from anabranch.layers.linear import Linear
from anabranch.models.llama import Config, Decoder, Layer, Llama

FP8 = {
    "e4m3fn": (448.0, jnp.float8_e4m3fn),
    "e4m3fnuz": (240.0, jnp.float8_e4m3fnuz),
    "gaudi": (240.0, jnp.float8_e4m3fn),
}
"""The largest number of each format that is used, and the format."""
TOP = 15
"""The largest number of 4 bits."""
BLOCK = 128
"""Inputs that are rounded before what they lost is handed on to all that follow."""
MATRICES = ("qkv", "out", "gate_up", "down")


def round8(x: Any, fp8: str | None, share: float = 1.0) -> Any:
    """The nearest numbers in FP8, within a share of its range, of x f32[...] in JAX or NumPy; x if `fp8` is None."""
    if fp8 is None:
        return x
    largest, dtype = FP8[fp8]
    return x.clip(-share * largest, share * largest).astype(dtype).astype(np.float32)


PROTECTED = 1 - 1 / TOP
"""The share of the range of FP8 that weights may have, so that none leaves it when it is rounded to 4 bits."""


def power_of_two(largest: float, fp8: str, share: float = 1.0) -> float:
    """The scale that brings numbers up to `largest` into a share of the range of FP8."""
    limit = share * FP8[fp8][0]
    return float(2 ** np.ceil(np.log2(max(largest / limit, 1 / (512 * limit)))))


class W4A8Linear(eqx.Module):
    """y = x w + b where w is 4 bits and x is rounded to FP8; summed in float32, given in BF16's precision."""

    q: UInt8[Array, "in/2 out"]
    """Two inputs in a byte, the even one low."""
    s4: Float[Array, "groups out"]
    z: UInt8[Array, "groups out"]
    s8: Float[Array, ""]
    sx: Float[Array, ""]
    """What a step of FP8 is of the weights, and of x."""
    b: Float[Array, " out"] | None = None
    order: Int[Array, " in"] | None = None
    """In which order inputs are gathered into groups, if not as they come."""
    fp8: str | None = eqx.field(static=True, default="e4m3fn")
    """None: nothing is rounded to FP8, neither w nor x (W4A16)."""

    def weights(self) -> Float[Array, "in out"]:
        """The matrix over s8, inputs in the order of the groups: every number is one of FP8."""
        q = jnp.stack([self.q & TOP, self.q >> 4], 1).reshape(*self.s4.shape[:1], -1, self.s4.shape[1])
        w = self.s4[:, None] * (q.astype(jnp.float32) - self.z[:, None].astype(jnp.float32))
        return round8(w.reshape(-1, w.shape[-1]), self.fp8, PROTECTED)

    def __call__(self, x: Float[Array, "T in"]) -> Float[Array, "T out"]:
        x = x if self.order is None else x[:, self.order]
        y = (round8(x / self.sx, self.fp8) @ self.weights()) * (self.s8 * self.sx)
        return lax.reduce_precision(y if self.b is None else y + self.b, exponent_bits=8, mantissa_bits=7)

    def in_fp8(self, fp8: str, largest: float) -> "W4A8Linear":
        """A matrix that was made without FP8 (W4A16), rounded to it afterwards; `largest` is that of |x|."""
        s8 = power_of_two(float(jnp.abs(self.weights()).max()), fp8, PROTECTED)
        sx = power_of_two(largest, fp8)
        return W4A8Linear(self.q, self.s4 / s8, self.z, jnp.float32(s8), jnp.float32(sx), self.b, self.order, fp8)


class Stats(eqx.Module):
    """What came into a matrix."""

    H: Float[Array, "in in"]
    """Twice the mean of x xᵀ. With the identity in its place, quantising is rounding to nearest."""
    largest: Float[Array, ""]
    """Of |x|."""


@eqx.filter_jit
def observe(layer: Layer, h: Float[Array, "B T d"]) -> tuple[Float[Array, "B T d"], dict[str, Stats]]:
    """The output of a layer for B texts, and what came into each of its matrices."""
    memory = Room(h.shape[1]).empty(layer.config.kv_heads, layer.config.head_width)

    def one(h: Array) -> tuple[Array, dict[str, Array]]:
        seen = {}

        def watched(name: str) -> Any:
            def linear(x: Array) -> Array:
                seen[name] = x
                return getattr(layer, name)(x)

            return linear

        named = lambda layer: [getattr(layer, name) for name in MATRICES]
        h, _ = eqx.tree_at(named, layer, [watched(name) for name in MATRICES])(h, jnp.arange(len(h)), memory.extend)
        return h, seen

    def stats(x: Float[Array, "B T in"]) -> Stats:
        rows = x.reshape(-1, x.shape[-1])
        return Stats(2 / len(rows) * rows.T @ rows, jnp.abs(rows).max())

    h, seen = jax.vmap(one)(h)
    return h, {name: stats(x) for name, x in seen.items()}


def gar_permutation(importance: Float[np.ndarray, " in"], group: int) -> Int[np.ndarray, " in"]:
    """Inputs in the order in which they are rounded: the group with the most important one first, and so in each group.

    >>> gar_permutation(np.array([1.0, 4.0, 9.0, 2.0, 3.0, 3.5]), 2).tolist()
    [2, 3, 1, 0, 5, 4]
    """
    groups = importance.reshape(-1, group)
    within = np.argsort(-groups, axis=1, kind="stable")
    between = np.argsort(-groups.max(1), kind="stable")
    return (within + group * np.arange(len(groups))[:, None])[between].reshape(-1)


def _grid(w: Float[np.ndarray, "group out"], sym: bool) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " out"]]:
    """The step and the zero of 16 levels that reach from the smallest to the largest weight of a group, and over 0."""
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    if sym:
        high = np.maximum(-low, high)
        low = np.where(low < 0, -high, low)
    low, high = (np.where((low == 0) & (high == 0), x, y) for x, y in ((-1, low), (1, high)))
    step = ((high - low) / TOP).astype(np.float32)
    return step, np.full_like(step, (TOP + 1) / 2) if sym else np.round(-low / step).astype(np.float32)


def _factor(H: Float[np.ndarray, "in in"], damp: float) -> Float[np.ndarray, "in in"]:
    """The upper Cholesky factor of the inverse of H, damped by a share of its mean diagonal.

    Raises:
        ValueError: if it is not positive definite, damped a thousand times as much.
    """
    mean = np.diag(H).mean()
    for share in damp * 10.0 ** np.arange(4):
        try:
            low = np.linalg.inv(np.linalg.cholesky(H + share * mean * np.eye(len(H))))
            return np.linalg.cholesky(low.T @ low).T.astype(np.float32)
        except np.linalg.LinAlgError:
            continue
    raise ValueError(f"H is not positive definite, even with damp={1000 * damp}")


@dataclass(frozen=True)
class DPQ:
    """How matrices are quantised.

    Arguments:
        group: inputs that share a step and a zero.
        fp8: the format, see `FP8`; None for GPTQ in 4 bits alone.
        order: in which inputs are rounded: "gar"; "none", as they come; or "act", by importance, groups cut from what
            comes of it, so that a step has to gather its inputs.
        damp: the share of the mean of H's diagonal that is added to it.
        sym: whether zero is always the same level.

    Raises:
        ValueError: if `fp8` or `order` is unknown, `group` is not positive, or `damp` is not.
    """

    group: int = 64
    fp8: str | None = "e4m3fn"
    order: Literal["gar", "none", "act"] = "gar"
    damp: float = 0.01
    sym: bool = False

    def __post_init__(self):
        if self.fp8 is not None and self.fp8 not in FP8:
            raise ValueError(f"fp8 must be one of {', '.join(FP8)} or None, got {self.fp8!r}")
        if self.order not in ("gar", "none", "act"):
            raise ValueError(f"order must be gar, none or act, got {self.order!r}")
        if self.group < 1:
            raise ValueError(f"group must be at least 1, got {self.group}")
        if not self.damp > 0:
            raise ValueError(f"damp must be positive, got {self.damp}")

    def linear(self, linear: Linear, stats: Stats) -> W4A8Linear:
        """A matrix in 4 bits.

        Raises:
            ValueError: if its inputs are no whole number of groups or odd, it or `stats` is not finite, `stats` is of
                another matrix, or H is not positive definite.
        """
        w, H, largest = np.array(linear.w, np.float32), np.array(stats.H, np.float64), float(stats.largest)
        size = len(w)
        if size % self.group or size % 2:
            raise ValueError(f"group: the inputs must be even and whole groups of {self.group}, got {size}")
        if H.shape != (size, size):
            raise ValueError(f"H must have shape {(size, size)}, got {H.shape}")
        for name, x in (("w", w), ("H", H), ("largest", np.array(largest))):
            if not np.isfinite(x).all():
                raise ValueError(f"{name} must be finite, got {x[~np.isfinite(x)][0]}")
        dead = np.diag(H) == 0
        H[dead, dead], w[dead] = 1, 0

        importance = np.diag(H)
        perm = {
            "gar": lambda: gar_permutation(importance, self.group),
            "act": lambda: np.argsort(-importance, kind="stable"),
            "none": lambda: np.arange(size),
        }[self.order]()
        s8 = sx = 1.0
        if self.fp8 is not None:
            s8, sx = power_of_two(float(np.abs(w).max()), self.fp8, PROTECTED), power_of_two(largest, self.fp8)
        q, s4, z = self._round(w[perm], _factor(H[np.ix_(perm, perm)], self.damp), np.float32(s8))
        if self.order == "gar":
            back = np.argsort(perm)
            groups = np.argsort(perm[:: self.group] // self.group)
            q, s4, z = q[back], s4[groups], z[groups]
        return W4A8Linear(
            jnp.asarray(q[0::2] | (q[1::2] << 4)), jnp.asarray(s4), jnp.asarray(z), jnp.float32(s8), jnp.float32(sx),
            linear.b, jnp.asarray(perm, jnp.int32) if self.order == "act" else None, self.fp8,
        )  # fmt: skip

    def _round(
        self, w: Float[np.ndarray, "in out"], factor: Float[np.ndarray, "in in"], s8: np.float32
    ) -> tuple[UInt8[np.ndarray, "in out"], Float[np.ndarray, "groups out"], UInt8[np.ndarray, "groups out"]]:
        """Rounds inputs in this order, and changes w to make up for it."""
        at_first = round8(w / s8, self.fp8, PROTECTED)
        q = np.empty(w.shape, np.uint8)
        s4 = np.empty((len(w) // self.group, w.shape[1]), np.float32)
        z = np.empty_like(s4)
        for start in range(0, len(w), BLOCK):
            stop = min(start + BLOCK, len(w))
            block, lost = w[start:stop].copy(), np.empty_like(w[start:stop])
            for i in range(start, stop):
                g = i // self.group
                if i % self.group == 0:
                    now = w if self.fp8 is None else at_first
                    s4[g], z[g] = _grid(now[i : i + self.group], self.sym)
                levels = np.clip(np.round(block[i - start] / s8 / s4[g]) + z[g], 0, TOP)
                near = s8 * round8(s4[g] * (levels - z[g]), self.fp8, PROTECTED)
                lost[i - start] = (block[i - start] - near) / factor[i, i]
                block[i - start :] -= factor[i, i:stop, None] * lost[i - start]
                q[i] = levels
            w[stop:] -= factor[start:stop, stop:].T @ lost
        return q, s4, z.astype(np.uint8)

    def layer(self, layer: Layer, stats: dict[str, Stats]) -> Layer:
        """A layer with all its matrices in 4 bits."""
        named = lambda layer: [getattr(layer, name) for name in MATRICES]
        new = [self.linear(getattr(layer, name), stats[name]) for name in MATRICES]
        return eqx.tree_at(named, layer, new)

    def quantise(self, cell: Decoder, tokens: Int[Array, "B T"]) -> "Quantised":
        """A model with the matrices of all layers in 4 bits; each is calibrated on what those before it now give.

        Arguments:
            tokens: B texts to calibrate on; best some thousand tokens of what will be read.

        Raises:
            ValueError: if `tokens` is not of two axes; see also `linear`.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have two axes, texts and their tokens, got shape {tokens.shape}")
        h, layers = cell.embedding[tokens], []
        for layer in cell.layers:
            layers.append(self.layer(layer, observe(layer, h)[1]))
            h, _ = observe(layers[-1], h)
        return Quantised(cell, tuple(layers))


class Quantised(Decoder):
    """A model with other layers, of which some or all are in 4 bits."""

    smooth = False  # it rounds what it multiplies

    def __init__(self, cell: Decoder, layers: tuple[Layer, ...]):
        self.embedding, self.layers, self.norm, self.head = cell.embedding, layers, cell.norm, cell.head
        self.keep, self.config = cell.keep, cell.config


def example() -> tuple[Quantised, Int[Array, " 12"]]:
    """A small model, quantised, and some tokens."""
    key = jax.random.PRNGKey(0)
    config = Config(vocab=11, width=16, layers=2, heads=2, kv_heads=1, hidden=32, rope_base=100.0)
    texts = jax.random.randint(noise(key, 0), (8, 12), 0, 11)
    return DPQ(group=8).quantise(Decoder(Llama(config, key=key), size=16), texts), texts[0]
