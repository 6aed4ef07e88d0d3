"""What streaming agents share: steps that do not overshoot, sparse networks with traces, and running statistics.

After Elsayed, Vasan, Mahmood (arXiv 2410.14606, 2024); the agents are in `stream_x`.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import noise, select

EPS = 1e-8


# Steps that do not overshoot


def obgd(
    trace: PyTree, delta: Float[Array, ""], kappa: Float[ArrayLike, ""] = 2.0, alpha: Float[ArrayLike, ""] = 1.0
) -> PyTree:
    """What overshooting-bounded gradient descent adds to the weights: α δ z / max(1, α κ max(|δ|, 1) ‖z‖₁).

    ‖z‖₁ is that of the whole network. For a linear δ, the error after the step keeps its sign where κ ≥ 1.

    >>> [round(float(obgd(jnp.array([z]), jnp.float32(3.0))[0]), 3) for z in (0.01, 10.0)]  # δz, then 1/κ
    [0.03, 0.5]
    """
    bound = alpha * kappa * jnp.maximum(jnp.abs(delta), 1.0) * _l1(trace)
    step = alpha / jnp.maximum(bound, 1.0)
    return jax.tree.map(lambda z: step * delta * z, trace)


def _l1(tree: PyTree) -> Float[Array, ""]:
    return sum((jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)), jnp.zeros(()))


class ObGD(eqx.Module):
    """`obgd` as a rule: what a traced error does to the weights. Any other rule has the same two methods."""

    kappa: Float[ArrayLike, ""] = 2.0
    alpha: Float[ArrayLike, ""] = 1.0

    def __check_init__(self):
        for name in ("kappa", "alpha"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def init(self, net: PyTree) -> PyTree:
        """What the rule keeps, for a network of these shapes."""
        return ()

    def update(self, trace: PyTree, memory: PyTree, delta: Float[Array, ""]) -> tuple[PyTree, PyTree]:
        """What to add to the weights, and the next memory."""
        return obgd(trace, delta, self.kappa, self.alpha), memory


class AdaptiveObGD(ObGD):
    """ObGD on traces that are divided by the root of the running mean square of δz, as Adam divides gradients."""

    beta2: float = 0.999

    def init(self, net):
        return jax.tree.map(jnp.zeros_like, net), jnp.zeros((), jnp.int32)

    def update(self, trace, memory, delta):
        squares, n = memory
        squares = jax.tree.map(lambda v, z: self.beta2 * v + (1 - self.beta2) * (delta * z) ** 2, squares, trace)
        weight = -jnp.expm1((n + 1) * math.log(self.beta2))
        scaled = jax.tree.map(lambda z, v: z / jnp.sqrt(v / weight + EPS), trace, squares)
        return obgd(scaled, delta, self.kappa, self.alpha), (squares, n + 1)


# The network


def sparse_init(key: PRNGKeyArray, shape: tuple[int, int], sparsity: float = 0.9) -> Float[Array, "out in"]:
    """Weights from U(±1/√in), of which ⌈sparsity · in⌉ in each row, drawn at random, are 0.

    At the sparsity of the paper, .9, a layer of fewer than ten inputs starts with no weight at all, and learns.
    """
    draw, drop = jax.random.split(key)
    weight = jax.random.uniform(draw, shape, minval=-1.0, maxval=1.0) / math.sqrt(shape[1])
    rank = jnp.argsort(jax.random.uniform(drop, shape), axis=1)
    return jnp.where(rank < math.ceil(sparsity * shape[1]), 0.0, weight)


class Net(eqx.Module):
    """Linear layers with LeakyReLU between them, of pre-activations that are normalised (without affine parameters)."""

    weights: tuple[Float[Array, "out in"], ...]
    biases: tuple[Float[Array, " out"], ...]
    layernorm: bool = eqx.field(static=True)

    def __init__(self, sizes: tuple[int, ...], sparsity: float, layernorm: bool, *, key: PRNGKeyArray):
        shapes = list(zip(sizes[1:], sizes))
        self.weights = tuple(sparse_init(noise(key, i, "layer"), shape, sparsity) for i, shape in enumerate(shapes))
        self.biases = tuple(jnp.zeros(out) for out, _ in shapes)
        self.layernorm = layernorm

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = weight @ x + bias
            if self.layernorm:
                x = (x - x.mean()) / jnp.sqrt(x.var() + 1e-5)
            x = jnp.where(x > 0, x, 0.01 * x)  # its slope at 0, where networks start that see few inputs, is 0.01
        return self.weights[-1] @ x + self.biases[-1]


class Traced(NamedTuple):
    """A network that learns, its eligibility trace, and what the rule keeps."""

    net: Net
    trace: Net
    memory: PyTree


def traced(net: Net, rule: ObGD) -> Traced:
    """A network before it learns."""
    return Traced(net, jax.tree.map(jnp.zeros_like, net), rule.init(net))


def descend(
    rule: ObGD,
    learned: Traced,
    gradient: Net,
    delta: Float[Array, ""],
    decay: float | Float[Array, ""],
    ok: Bool[Array, ""],
    cut: Bool[Array, ""],
) -> tuple[Traced, Bool[Array, ""]]:
    """One update by the error δ along the trace; and whether it was made. It is not where `ok` is False."""
    trace = jax.tree.map(lambda z, g: decay * z + g, learned.trace, gradient)
    updates, memory = rule.update(trace, learned.memory, delta)
    ok = ok & jnp.isfinite(_l1(updates))
    net = jax.tree.map(lambda w, u: jnp.where(ok, w + u, w), learned.net, updates)
    trace = jax.tree.map(lambda z: jnp.where(ok & ~cut, z, 0.0), trace)
    return Traced(net, trace, select(ok, memory, learned.memory)), ok


# The senses


class Welford(NamedTuple):
    """Running mean and variance."""

    mean: Float[Array, "..."]
    p: Float[Array, "..."]
    """The sum of squared differences from the mean."""
    n: Int[Array, ""]

    @classmethod
    def zeros(cls, *shape: int) -> "Welford":
        return cls(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((), jnp.int32))

    def add(self, x: Float[Array, "..."]) -> "Welford":
        n = self.n + 1
        mean = self.mean + (x - self.mean) / n
        return Welford(mean, self.p + (x - self.mean) * (x - mean), n)

    @property
    def scale(self) -> Float[Array, "..."]:
        """The standard deviation; 1 for fewer than two numbers."""
        return jnp.sqrt(jnp.where(self.n < 2, 1.0, self.p / jnp.maximum(self.n - 1, 1)) + EPS)


def normalise(seen: Welford, x: Float[Array, " d"]) -> tuple[Welford, Float[Array, " d"]]:
    """Statistics with x, and x normalised by them."""
    known = jnp.isfinite(x)
    seen = select(known.all(), seen.add(x), seen)
    return seen, jnp.where(known, (x - seen.mean) / seen.scale, 0.0)


class Returns(NamedTuple):
    """The scale of rewards: statistics of their discounted sum."""

    stats: Welford
    sum: Float[Array, ""]

    @classmethod
    def zeros(cls) -> "Returns":
        return cls(Welford.zeros(), jnp.zeros(()))

    def add(self, reward: Float[Array, ""], gamma: float | Float[Array, ""]) -> tuple["Returns", Float[Array, ""]]:
        """With one more reward, and that reward scaled; one that is not finite counts as none."""
        known = jnp.isfinite(reward)
        reward = jnp.where(known, reward, 0.0)
        total = gamma * self.sum + reward
        stats = select(known, self.stats.add(total), self.stats)
        return Returns(stats, total), reward / stats.scale
