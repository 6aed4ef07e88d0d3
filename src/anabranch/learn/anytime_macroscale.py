"""ALMA: On Anytime Learning at Macroscale. arXiv 2106.09563, 2021.

Data come in large chunks of one distribution, and the model is asked all the time. When should it be trained: at each
chunk, or after having waited for several? With earlier chunks or without? Should it become larger on the way? What is
judged is the error at every moment, the cumulative error rate, beside what it cost in memory and compute.

`AnytimeLearner` is the learner, `anytime_report` the judge; the models that grow are in `anabranch.models.growing`. As
in the authors' code: a training starts from the model that serves, with a fresh Adadelta, and stops early; an expert
that is split leaves two copies of itself; a new member of an ensemble starts as a copy of the last one.

At this scale: one compiled call holds the whole training, so the passes have a bound; the last batch of a pass is
filled up with its first rows; the paper's FireFly growth, its convolutional networks and its language model are not
here.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Event, Learner, Maybe, noise, select
from anabranch.fit import Backprop
from anabranch.learn.base import cross_entropy
from anabranch.models.growing import Growing, GrowingMoE, size


class AnytimeState(NamedTuple):
    """The model that serves, and the chunks it is yet to learn from or may see again."""

    model: PyTree
    """All arrays of the model."""
    x: Float[Array, "chunks n D"]
    y: Int[Array, "chunks n"]
    good: Bool[Array, "chunks n"]
    """Rows that are there and have a finite x and a known class."""
    t: Int[Array, ""]
    """Chunks seen."""
    epochs: Int[Array, ""]
    """Passes of training, in sum."""
    flops: Float[Array, ""]
    """Six for each parameter trained and each row it is trained on."""
    refused: Int[Array, ""]
    """Growths that found all slots in use."""
    rejected: Int[Array, ""]
    """Rows left out."""
    key: PRNGKeyArray


class AnytimeLearner(Learner):
    """Learns from large chunks, waiting for `wait` of them; until it has trained again, the model it has serves.

    Stream: `Event(x f32[n, D], Maybe(labels i32[n], valid))`, one chunk of n shuffled rows an event. Output: scores
    f32[n, C]. State: `AnytimeState`, mostly the chunks kept: `max(wait, replay) * n * (D + 1)` words.

    The last tenth of every chunk is for validation. Training starts with a fresh optimiser from the model that serves
    (or from the first one), goes over the rows in shuffled passes, stops when `patience` passes brought no gain of more
    than `least` in validation accuracy, and keeps the best weights. The weight of an event is not used.

    Args:
        model: gives f32[C] for one x of f32[D]; one that is `Growing` grows at every update but the first.
        rows: n.
        features: D.
        classes: C.
        wait: chunks between two updates; a last group that is not full is never learned.
        replay: how many of the last chunks are trained on; 0 is only the new ones.
        scratch: train from the first weights at every update.
        epochs, batch, patience, least: as above; `batch` in rows.
        optimizer: the paper's Adadelta unless given.
        backprop: how a gradient is got.

    Raises:
        ValueError: if an argument is out of range.
    """

    smooth = False

    model: Any
    rows: int = eqx.field(static=True)
    features: int = eqx.field(static=True)
    classes: int = eqx.field(static=True)
    wait: int = eqx.field(static=True, default=1)
    replay: int = eqx.field(static=True, default=0)
    scratch: bool = eqx.field(static=True, default=False)
    epochs: int = eqx.field(static=True, default=100)
    batch: int = eqx.field(static=True, default=128)
    patience: int = eqx.field(static=True, default=25)
    least: float = eqx.field(static=True, default=0.001)
    optimizer: optax.GradientTransformation = eqx.field(static=True, default=optax.adadelta(1.0, rho=0.9, eps=1e-6))
    backprop: Backprop = Backprop(cross_entropy)

    def __check_init__(self):
        if self.rows < 10:
            raise ValueError(f"rows must be at least 10, of which one is for validation, got {self.rows}")
        for name in ("wait", "epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.replay and self.replay < self.wait:
            raise ValueError(f"replay must be 0 or at least wait={self.wait}, got {self.replay}")

    def init(self, *, key: PRNGKeyArray | None = None) -> AnytimeState:
        chunks = max(self.wait, self.replay)
        return AnytimeState(
            model=eqx.filter(self.model, eqx.is_array),
            x=jnp.zeros((chunks, self.rows, self.features)),
            y=jnp.zeros((chunks, self.rows), jnp.int32),
            good=jnp.zeros((chunks, self.rows), bool),
            t=jnp.int32(0),
            epochs=jnp.int32(0),
            flops=jnp.float32(0),
            refused=jnp.int32(0),
            rejected=jnp.int32(0),
            key=jax.random.PRNGKey(0) if key is None else key,
        )

    def serving(self, state: AnytimeState) -> Any:
        """The model that answers now."""
        return eqx.combine(state.model, self.model)

    def predict(self, state: AnytimeState, x: Float[Array, "m D"]) -> Float[Array, "m C"]:
        return jax.vmap(self.serving(state))(x)

    def learn(self, state: AnytimeState, x: Any, target: Any, weight: Any = 1.0) -> AnytimeState:
        x, y = jnp.asarray(x, jnp.float32), jnp.asarray(target, jnp.int32)
        good = jnp.isfinite(x).all(-1) & (0 <= y) & (y < self.classes)
        slot = state.t % len(state.x)
        state = state._replace(
            x=state.x.at[slot].set(jnp.where(good[:, None], x, 0.0)),
            y=state.y.at[slot].set(jnp.where(good, y, 0)),
            good=state.good.at[slot].set(good),
            t=state.t + 1,
            rejected=state.rejected + (~good).sum(),
        )
        due = state.t % self.wait == 0
        state = self._train(self._grow(state, due & (state.t > self.wait)), due)
        return state if self.replay else state._replace(good=state.good & ~due)

    def _rows(self, state: AnytimeState, validation: bool) -> tuple[Array, Array, Array]:
        """x, y, and which are there, of the rows to train on or of those to validate on."""
        cut = self.rows - self.rows // 10
        x, y, good = (a[:, cut:] if validation else a[:, :cut] for a in (state.x, state.y, state.good))
        return x.reshape(-1, self.features), y.ravel(), good.ravel()

    def _grow(self, state: AnytimeState, now: Bool[Array, ""]) -> AnytimeState:
        model = self.serving(state)
        if not isinstance(model, Growing):
            return state
        x, _, there = self._rows(state, validation=True)
        larger = model.grow(x, there)
        return state._replace(
            model=select(now, eqx.filter(larger, eqx.is_array), state.model),
            refused=state.refused + (now & (larger.size() == model.size())),
        )

    def _train(self, state: AnytimeState, due: Bool[Array, ""]) -> AnytimeState:
        """Early-stopped passes over the chunks kept; none at all unless `due`, so that no branch is needed."""
        x, y, good = self._rows(state, validation=False)
        vx, vy, vgood = self._rows(state, validation=True)
        whole = self.serving(state)
        part = _trained(whole)
        params, fixed = eqx.partition(part, eqx.is_inexact_array)
        rows = good.sum()

        def one_batch(i, carry, order, epoch):
            params, opt = carry
            take = order[(i * self.batch + jnp.arange(self.batch)) % rows]
            key = noise(noise(state.key, state.epochs + epoch, "loss"), i)
            _, grads = self.backprop.value_and_grad(eqx.combine(params, fixed), (x[take], y[take]), key)
            updates, opt = self.optimizer.update(grads, opt, params)
            return optax.apply_updates(params, updates), opt

        def one_epoch(carry):
            epoch, params, opt, best, top, misses = carry
            chance = jax.random.uniform(noise(state.key, state.epochs + epoch, "order"), good.shape)
            order = jnp.argsort(jnp.where(good, chance, 2.0))  # rows that are not there come last
            batches = -(-rows // self.batch)
            params, opt = lax.fori_loop(0, batches, lambda i, c: one_batch(i, c, order, epoch), (params, opt))
            right = jnp.argmax(jax.vmap(eqx.combine(params, fixed))(vx), -1) == vy
            accuracy = (right & vgood).sum() / jnp.maximum(vgood.sum(), 1)
            better = accuracy > top + self.least
            best, top = select(better, (params, accuracy), (best, top))
            return epoch + 1, params, opt, best, top, jnp.where(better, 0, misses + 1)

        first = params
        if self.scratch:
            weights = eqx.filter(self.model, eqx.is_inexact_array)
            again = eqx.combine(weights, eqx.filter(whole, eqx.is_inexact_array, inverse=True))
            first = eqx.filter(_trained(again), eqx.is_inexact_array)
        limit = jnp.where(due & (rows > 0), self.epochs, 0)
        start = (jnp.int32(0), first, self.optimizer.init(first), params, jnp.float32(-1), jnp.int32(0))
        epoch, _, _, best, _, _ = lax.while_loop(lambda c: (c[0] < limit) & (c[5] < self.patience), one_epoch, start)
        part = eqx.combine(best, fixed)
        return state._replace(
            model=eqx.filter(whole.put(part) if isinstance(whole, Growing) else part, eqx.is_array),
            epochs=state.epochs + epoch,
            flops=state.flops + 6.0 * size(part) * epoch * rows,
        )


def _trained(model: Any) -> Any:
    return model.trained() if isinstance(model, Growing) else model


class AnytimeReport(NamedTuple):
    """What was got, and what was paid for it, on a stream of B chunks."""

    errors: Float[np.ndarray, " B"]
    """Error rate on the whole test set of the model that serves after each chunk has come."""
    parameters: Float[np.ndarray, " B"]
    """Of that model."""
    compute: float
    """Floating-point operations of training."""
    refused: int
    """Growths that found all slots in use."""

    @property
    def cer(self) -> float:
        """The cumulative error rate, per chunk: what waits answers badly meanwhile, and that counts."""
        return float(self.errors.mean())

    @property
    def memory(self) -> float:
        """Parameters, summed over chunks."""
        return float(self.parameters.sum())


def anytime_report(
    cell: AnytimeLearner,
    chunks: tuple[Float[np.ndarray, "B n D"], Int[np.ndarray, "B n"]],
    test: tuple[Float[np.ndarray, "m D"], Int[np.ndarray, " m"]],
    key: PRNGKeyArray,
) -> AnytimeReport:
    """Train on B chunks one after the other, and ask the whole test set after each."""
    state, (errors, sizes) = _run(cell, jax.tree.map(jnp.asarray, chunks), jax.tree.map(jnp.asarray, test), key)
    return AnytimeReport(np.asarray(errors), np.asarray(sizes), float(state.flops), int(state.refused))


@eqx.filter_jit
def _run(cell: AnytimeLearner, chunks: Any, test: Any, key: PRNGKeyArray) -> tuple[AnytimeState, Any]:
    def step(state, chunk):
        state = cell.learn(state, *chunk)
        wrong = jnp.argmax(cell.predict(state, test[0]), -1) != test[1]
        return state, (wrong.mean(), size(cell.serving(state)))

    return lax.scan(step, cell.init(key=key), chunks)


def example() -> tuple[AnytimeLearner, Event]:
    """A small growing mixture, and 6 chunks of 20 rows with two features."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 20, 2)).astype(np.float32)
    y = (x[..., 0] > x[..., 1]).astype(np.int32)
    model = GrowingMoE(2, 2, width=4, slots=3, key=jax.random.PRNGKey(0))
    cell = AnytimeLearner(model, 20, 2, 2, wait=2, epochs=3, batch=8)
    return cell, Event(x, Maybe(y, np.ones(6, bool)), np.ones(6, np.float32))
