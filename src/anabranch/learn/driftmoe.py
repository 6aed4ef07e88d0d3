"""DriftMoE: A Mixture of Experts Approach to Handle Concept Drifts. arXiv 2507.18464, 2025."""

import dataclasses
import itertools
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt32

from anabranch.cell import Event, Learner, Maybe, noise
from anabranch.learn.trees import HoeffdingTree, Tree, when

TEMPERATURE = 0.8
Params = list[tuple[Float[Array, "out in"], Float[Array, " out"]]]


class RouterMLP(eqx.Module):
    """The router: D → hidden → hidden/2 → E, ReLU, dropout after the first layer."""

    D: int = eqx.field(static=True)
    E: int = eqx.field(static=True)
    hidden: int = eqx.field(static=True, default=256)
    dropout: float = eqx.field(static=True, default=0.2)

    def init(self, key: PRNGKeyArray) -> Params:
        """Xavier-uniform weights, no bias."""
        widths = (self.D, self.hidden, self.hidden // 2, self.E)
        xavier = jax.nn.initializers.glorot_uniform(in_axis=-1, out_axis=-2)
        return [
            (xavier(noise(key, i, "router"), (after, before)), jnp.zeros(after))
            for i, (before, after) in enumerate(itertools.pairwise(widths))
        ]

    def __call__(self, params: Params, x: Float[Array, " D"], *, key: Any = None) -> Float[Array, " E"]:
        """Logits; with a key in training mode, with dropout."""
        (w1, b1), (w2, b2), (w3, b3) = params
        h = jax.nn.relu(w1 @ x + b1)
        if key is not None:
            h = jnp.where(jax.random.bernoulli(key, 1 - self.dropout, h.shape), h / (1 - self.dropout), 0.0)
        return w3 @ jax.nn.relu(w2 @ h + b2) + b3


class DriftMoEState(NamedTuple):
    """The experts, the router, and what the router is yet to learn from."""

    trees: Tree
    """The E experts."""
    router: Params
    adam: PyTree
    buffer_x: Float[Array, "B D"]
    """Router inputs since its last update, and for each which experts were right."""
    buffer_mask: Float[Array, "B E"]
    buffered: Int[Array, ""]
    scale: tuple[Float[Array, ""], Float[Array, " D"], Float[Array, " D"]]
    """Number, mean and sum of squared deviations of the inputs."""
    usage: Int[Array, " E"]
    """How often each expert was chosen for an event that was then learned. An expert never chosen starves."""
    rejected: Int[Array, ""]
    """Labelled events that were ignored (see `HoeffdingTree`)."""
    t: Int[Array, ""]
    key: UInt32[Array, "2"]


class DriftMoE(Learner):
    """Hoeffding trees as experts and a neural router, trained together at every event.

    Stream: `Event(x f32[D], Maybe(label i32, valid), weight)`; the weight counts for the trees alone. Output: class
    scores f32[C]. State: `DriftMoEState`, dominated by E trees of about `max_leaves * C * 5 * D` words and three times
    the router's parameters.

    `mode="data"`: the expert that the router likes best answers; the `top_k` it likes best learn the event. The router
    learns, by binary cross-entropy on batches of `batch` events, which experts would have been right; if none was, the
    one that gave the true class most.

    `mode="task"`: expert c says whether the class is c, and learns every event. The router's own argmax is the answer,
    and it takes a step at every event. Its target is one-hot of the true class whatever the experts say, so that **the
    experts influence neither the answer nor the router**: this mode is an online multilayer perceptron. It is here
    because the paper has it.

    Where the official code and this one differ: there the task mode answers with dropout on (here `predict` is pure);
    there a delayed label is paired with the newest input (here `learn` gets the input it belongs to); there an expert
    that has learned nothing gives each class 1/E in the data mode, which counts where no expert is right (here 1/C);
    nominal features are split one value against the rest, where MOA splits into all values at once.

    Args:
        D: number of features.
        C: number of classes.
        E: number of experts; in task mode it is C.
        top_k: how many experts learn an event, in data mode.
        mode: "data" or "task".
        max_leaves: leaf slots of each expert.
        nominal: indices of nominal features, with values 0..n_values-1.
        n_values: number of values of nominal features.
        batch: events between two steps of the router, in data mode.
        learning_rate: of the router's Adam.
        standardise: let the router see inputs scaled by their running mean and deviation. Ours; the paper has it off.

    Raises:
        ValueError: if an argument is out of range, or `init` gets no key.
    """

    tree: HoeffdingTree
    router: RouterMLP
    C: int = eqx.field(static=True)
    E: int = eqx.field(static=True)
    top_k: int = eqx.field(static=True)
    mode: Literal["data", "task"] = eqx.field(static=True)
    batch: int = eqx.field(static=True)
    learning_rate: float = eqx.field(static=True)
    standardise: bool = eqx.field(static=True)

    def __init__(
        self,
        D: int,
        C: int,
        E: int = 12,
        top_k: int = 3,
        mode: Literal["data", "task"] = "data",
        *,
        max_leaves: int = 64,
        nominal: tuple[int, ...] = (),
        n_values: int = 2,
        batch: int = 256,
        learning_rate: float = 2e-3,
        standardise: bool = False,
    ):
        if mode not in ("data", "task"):
            raise ValueError(f"mode must be 'data' or 'task', got {mode!r}")
        if mode == "data" and not 1 <= top_k <= E:
            raise ValueError(f"top_k must lie in 1..E={E}, got {top_k}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        tree = HoeffdingTree(
            D, C, max_leaves=max_leaves, grace=50, delta=1e-7, nominal=tuple(nominal), n_values=n_values
        )
        self.tree = tree if mode == "data" else dataclasses.replace(tree, C=2)
        self.C, self.E, self.top_k, self.mode = C, C if mode == "task" else E, top_k, mode
        self.router = RouterMLP(D, self.E)
        self.batch, self.learning_rate, self.standardise = 1 if mode == "task" else batch, learning_rate, standardise

    def init(self, *, key: PRNGKeyArray | None = None) -> DriftMoEState:
        if key is None:
            raise ValueError("the router starts at random: init needs a key")
        router, D = self.router.init(key), self.tree.D
        return DriftMoEState(
            trees=self.tree.plant(self.E),
            router=router,
            adam=optax.adam(self.learning_rate).init(router),
            buffer_x=jnp.zeros((self.batch, D)),
            buffer_mask=jnp.zeros((self.batch, self.E)),
            buffered=jnp.int32(0),
            scale=(jnp.zeros(()), jnp.zeros(D), jnp.zeros(D)),
            usage=jnp.zeros(self.E, jnp.int32),
            rejected=jnp.int32(0),
            t=jnp.int32(0),
            key=key,
        )

    def predict(self, state: DriftMoEState, x: Float[Array, " D"]) -> Float[Array, " C"]:
        x = jnp.asarray(x, float)
        logits = self.router(state.router, self._scaled(state, x))
        return jax.nn.softmax(logits) if self.mode == "task" else self.tree.ask(state.trees, x, jnp.argmax(logits))

    def learn(self, state: DriftMoEState, x: Float[Array, " D"], target: Int[Array, ""], weight: Any = 1.0):
        return self.step(state, Event(x, Maybe(target, True), weight))[0]

    def step(self, state: DriftMoEState, x: Event) -> tuple[DriftMoEState, Float[Array, " C"]]:
        state, scores = self._answer(state, x)
        return self._train_router(state), scores

    def advance(self, state: DriftMoEState, xs: Event) -> tuple[DriftMoEState, Float[Array, "T C"]]:
        """As event by event, in runs that end where the router is due.

        Its large products keep XLA from compiling a loop that holds them as one function; a run holds none, which makes
        one stream more than twice as fast. Under `vmap` streams wait for each other, and it is 1.5 times slower.
        """
        xs, T = jax.tree.map(jnp.asarray, xs), len(jax.tree.leaves(xs)[0])

        def event(carry):
            i, state, answers = carry
            state, scores = self._answer(state, jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 0, False), xs))
            return i + 1, state, lax.dynamic_update_index_in_dim(answers, scores, i, 0)

        def run(carry):
            i, state, answers = lax.while_loop(lambda c: (c[0] < T) & (c[1].buffered < self.batch), event, carry)
            return i, self._train_router(state), answers

        start = jnp.int32(0), state, jnp.zeros((T, self.C))
        return lax.while_loop(lambda c: c[0] < T, run, start)[1:]

    def _answer(self, state: DriftMoEState, x: Event) -> tuple[DriftMoEState, Float[Array, " C"]]:
        """One event, but for the router's update, which is due when its buffer is full."""
        features, y, weight = jnp.asarray(x.x, float), jnp.asarray(x.target.value), jnp.asarray(x.weight, float)
        good = self.tree.acceptable(features, jnp.where((0 <= y) & (y < self.C), 0, -1), weight)
        learns = x.target.valid & good
        y = jnp.clip(y, 0, self.C - 1)

        scaled = self._scaled(state, features)
        logits = self.router(state.router, scaled)
        chosen = jnp.argmax(logits)
        # Predictions of all experts come from before any learning: the trees do not know of each other.
        trees, scores = self._visit(state.trees, features, y, weight, learns, self._selected(logits))
        mask = self._mask(scores, y)
        n = state.buffered
        state = state._replace(
            trees=trees,
            buffer_x=state.buffer_x.at[n].set(jnp.where(learns, scaled, state.buffer_x[n])),
            buffer_mask=state.buffer_mask.at[n].set(jnp.where(learns, mask, state.buffer_mask[n])),
            buffered=n + learns,
            scale=self._rescale(state.scale, features, learns),
            usage=state.usage.at[chosen].add(learns),
            rejected=state.rejected + (x.target.valid & ~good),
            t=state.t + 1,
        )
        return state, jax.nn.softmax(logits) if self.mode == "task" else scores[chosen]

    def _selected(self, logits: Float[Array, " E"]) -> Bool[Array, " E"]:
        """The experts that learn: the top_k of π = softmax(logits / TEMPERATURE), of equals the lower index."""
        if self.mode == "task":
            return jnp.ones(self.E, bool)
        share = jax.nn.softmax(logits / TEMPERATURE)
        i = jnp.arange(self.E)
        rank = ((share > share[:, None]) | ((share == share[:, None]) & (i < i[:, None]))).sum(1)
        return rank < self.top_k

    def _visit(self, trees: Tree, x, y, weight, learns, selected) -> tuple[Tree, Float[Array, "E c"]]:
        """All experts' scores, and the trees after the selected ones have learned."""

        def visit(e, carry):
            trees, scores = carry
            target = y if self.mode == "data" else (y == e).astype(jnp.int32)
            trees, new = self.tree.update(trees, x, target, weight, learns & selected[e], e)
            return trees, lax.dynamic_update_index_in_dim(scores, new, e, 0)

        return lax.fori_loop(0, self.E, visit, (trees, jnp.zeros((self.E, self.tree.C))))

    def _mask(self, scores: Float[Array, "E c"], y: Int[Array, ""]) -> Float[Array, " E"]:
        """What the router should have said: which experts are right, and if none is, the nearest to it."""
        if self.mode == "task":
            right = (jnp.arange(self.E) == y) & (jnp.argmax(scores, -1) == 1)
            fallback = jnp.arange(self.E) == y
        else:
            right = jnp.argmax(scores, -1) == y
            fallback = jnp.arange(self.E) == jnp.argmax(scores[:, y])
        return jnp.where(right.any(), right, fallback).astype(float)

    def _train_router(self, state: DriftMoEState) -> DriftMoEState:
        """One step of Adam, if the buffer is full."""
        full = state.buffered >= self.batch

        def loss(router):
            # The router has been constant since the buffer was empty, so these are the logits of each event's time.
            # In data mode they are those of the evaluation mode: dropout is never active, as in the official code.
            key = noise(state.key, state.t - 1, "dropout") if self.mode == "task" else None
            logits = jax.vmap(lambda x: self.router(router, x, key=key))(state.buffer_x)
            return optax.sigmoid_binary_cross_entropy(logits, state.buffer_mask).mean()

        def flush(carry):
            router, adam = carry
            updates, adam = optax.adam(self.learning_rate).update(jax.grad(loss)(router), adam)
            return optax.apply_updates(router, updates), adam

        router, adam = when(full, flush, (state.router, state.adam))
        return state._replace(router=router, adam=adam, buffered=jnp.where(full, 0, state.buffered))

    def _scaled(self, state: DriftMoEState, x: Float[Array, " D"]) -> Float[Array, " D"]:
        """What the router sees of x."""
        n, mean, squares = state.scale
        if self.standardise:
            x = (x - mean) / jnp.where(squares > 0, jnp.sqrt(squares / jnp.maximum(n, 1.0)), 1.0)
        return jnp.where(jnp.isfinite(x), x, 0.0)

    def _rescale(self, scale, x, learns):
        """Welford's update of the inputs' mean and spread."""
        n, mean, squares = scale
        n = n + learns
        new = mean + (x - mean) / jnp.maximum(n, 1.0)
        return n, jnp.where(learns, new, mean), jnp.where(learns, squares + (x - mean) * (x - new), squares)


def example() -> tuple[DriftMoE, Event]:
    """Three small experts on two features, and 72 events of two classes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(72, 2)).astype(np.float32)
    # Unequal weights: where votes tie, scores jump and have no slope.
    weight = rng.uniform(1.1, 1.9, 72).astype(np.float32)
    label = (x[:, 0] > 0.2).astype(np.int32)
    return DriftMoE(2, 2, E=3, top_k=2, max_leaves=4, batch=32), Event(x, Maybe(label, np.ones(72, bool)), weight)
