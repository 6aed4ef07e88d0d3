"""Linear models that learn one event at a time, and the running standardisation they need in front of them.

The conventions are River's, so that `StandardScaler() | LogisticRegression(SGD(0.1))` there and
`Scaled(LogisticRegression(D, optax.sgd(0.1)))` here give the same probabilities: the optimiser moves the weights, the
intercept takes plain gradient steps of its own, and the L2 penalty leaves the intercept alone.

    >>> import jax.numpy as jnp, optax
    >>> model = Scaled(LogisticRegression(2, optax.sgd(0.1)))
    >>> state = model.init()
    >>> for x, y in [((1.0, 5.0), 0), ((9.0, 5.0), 1)] * 20:
    ...     state = model.learn(state, jnp.array(x), y)
    >>> bool(model.predict(state, jnp.array((9.0, 5.0))) > 0.7)
    True
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from anabranch.cell import Cell, Learner, State


class ScalerState(NamedTuple):
    """What has been seen of each feature: count, mean, variance."""

    n: Float[Array, " D"]
    mean: Float[Array, " D"]
    var: Float[Array, " D"]


class Scaler(Cell):
    """Running standardisation: each feature minus its mean so far, over its standard deviation so far.

    One step takes x: f32[D] into the statistics (Welford's update of mean and population variance), then returns
    z: f32[D] under the new statistics. A feature that is NaN or infinite is missing: it leaves its statistics alone
    and comes out as 0, the mean. So does a feature that has not varied yet.

    Counts are f32 on purpose: they stop growing at 2^24 events, from where on the statistics forget exponentially,
    very slowly, and nothing overflows.

    Welford, "Note on a method for calculating corrected sums of squares and products", Technometrics 4(3), 1962.

        >>> scaler = Scaler(1)
        >>> state = scaler.init()
        >>> for x in (2.0, 4.0, float("nan"), 6.0):
        ...     state, z = scaler.step(state, jnp.array([x]))
        ...     print(round(float(z[0]), 3))
        0.0
        1.0
        0.0
        1.225
    """

    features: int = eqx.field(static=True)

    def __check_init__(self):
        if self.features < 1:
            raise ValueError(f"Scaler: features must be at least 1, got {self.features}")

    def init(self, *, key: PRNGKeyArray | None = None) -> ScalerState:
        zeros = jnp.zeros(self.features)
        return ScalerState(zeros, zeros, zeros)

    def update(self, state: ScalerState, x: Float[Array, " D"]) -> ScalerState:
        """The statistics with `x` counted in."""
        x = _features(self, x)
        there = jnp.isfinite(x)
        n = state.n + there
        delta = jnp.where(there, x - state.mean, 0.0)
        share = there / jnp.maximum(n, 1.0)
        mean = state.mean + delta * share
        var = state.var + (delta * (x - mean) - state.var) * share
        return ScalerState(n, mean, jnp.where(there, var, state.var))

    def transform(self, state: ScalerState, x: Float[Array, " D"]) -> Float[Array, " D"]:
        """`x` standardised by the statistics as they are."""
        x = _features(self, x)
        usable = jnp.isfinite(x) & (state.var > 0)
        return jnp.where(usable, (x - state.mean) * jax.lax.rsqrt(jnp.where(usable, state.var, 1.0)), 0.0)

    def step(self, state: ScalerState, x: Float[Array, " D"]) -> tuple[ScalerState, Float[Array, " D"]]:
        state = self.update(state, x)
        return state, self.transform(state, x)


class GLMState(NamedTuple):
    """The weights of a linear model."""

    weights: Float[Array, "*C D"]
    intercept: Float[Array, "*C"]
    opt: PyTree
    """The optimiser's own state."""


class GLM(Learner):
    """A generalised linear model. Subclasses say how a margin becomes a prediction, and the slope of their loss.

    Features must be finite: one NaN makes the weights NaN for good. `Scaled` takes care of missing features.
    """

    features: int = eqx.field(static=True)
    """D, the number of features."""
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    """Moves the weights; the intercept is not its business."""
    l2: float = 0.0
    """Weight of the penalty ½‖w‖²."""
    intercept_lr: float = 0.01
    """Step size of the intercept; 0 keeps it at 0."""

    def __check_init__(self):
        name = type(self).__name__
        if self.features < 1:
            raise ValueError(f"{name}: features must be at least 1, got {self.features}")
        if not hasattr(self.optimizer, "update"):
            raise TypeError(f"{name}: optimizer must be an optax.GradientTransformation, got {self.optimizer!r}")
        if isinstance(self.l2, float | int) and self.l2 < 0:
            raise ValueError(f"{name}: l2 must not be negative, got {self.l2}")

    outputs = ()

    def init(self, *, key: PRNGKeyArray | None = None) -> GLMState:
        weights = jnp.zeros((*self.outputs, self.features))
        return GLMState(weights, jnp.zeros(self.outputs), self.optimizer.init(weights))

    def predict(self, state: GLMState, x: Float[Array, " D"]) -> Float[Array, "*C"]:
        # Not a dot product: a multiply and a sum fuse with what follows, also when many models are stepped at once.
        return self._link(jnp.sum(state.weights * _features(self, x), axis=-1) + state.intercept)

    def learn(self, state: GLMState, x, target, weight=1.0) -> GLMState:
        slope = self._slope(self.predict(state, x), target) * weight
        gradient = slope[..., None] * x + self.l2 * state.weights
        updates, opt = self.optimizer.update(gradient, state.opt, state.weights)
        weights: Any = optax.apply_updates(state.weights, updates)
        return GLMState(weights, state.intercept - self.intercept_lr * slope, opt)

    def _link(self, margin):
        raise NotImplementedError

    def _slope(self, prediction, target):
        """Derivative of the loss with respect to the margin."""
        raise NotImplementedError


class LogisticRegression(GLM):
    """Logistic regression. Predicts P(class 1), a f32 scalar; the target is 0 or 1; `weight` scales the gradient.

    >>> model = LogisticRegression(2, adagrad(0.1))
    >>> state = model.learn(model.init(), jnp.array([1.0, -1.0]), target=1)
    >>> float(model.predict(model.init(), jnp.ones(2))), bool(model.predict(state, jnp.array([1.0, -1.0])) > 0.5)
    (0.5, True)
    """

    def _link(self, margin):
        return jax.nn.sigmoid(margin)

    def _slope(self, prediction, target):
        return prediction - target


class LinearRegression(GLM):
    """Linear regression under the squared loss (p − y)². Predicts and is told a f32 scalar.

    >>> model = LinearRegression(1, optax.sgd(0.1))
    >>> state = model.learn(model.init(), jnp.array([1.0]), target=3.0)  # the slope is 2 (0 - 3) = -6
    >>> round(float(state.weights[0]), 3), round(float(state.intercept), 3)
    (0.6, 0.06)
    """

    def _link(self, margin):
        return margin

    def _slope(self, prediction, target):
        return 2.0 * (prediction - target)


class SoftmaxRegression(GLM):
    """Softmax regression. Predicts the probabilities f32[C] of C classes; the target is a class index."""

    classes: int = eqx.field(static=True, kw_only=True)

    @property
    def outputs(self):
        return (self.classes,)

    def _link(self, margin):
        return jax.nn.softmax(margin)

    def _slope(self, prediction, target: Int[Array, ""]):
        return prediction - jax.nn.one_hot(target, self.classes)


class Scaled(Learner):
    """A learner behind a `Scaler`, as one learner: `Scaled(LogisticRegression(8, optax.sgd(0.1)))`.

    `predict` uses the statistics as they are. The scaler learns in `learn`, and first: the learner sees the features
    under statistics that already count them in, as a River pipeline does. An event whose target never comes does not
    move the statistics.
    """

    learner: Learner
    scaler: Scaler

    def __init__(self, learner: Learner, features: int | None = None):
        """`features` defaults to `learner.features`.

        Raises:
            ValueError: if the number of features is not given and the learner does not say.
        """
        features = getattr(learner, "features", None) if features is None else features
        if features is None:
            raise ValueError(f"Scaled: {type(learner).__name__} has no `features`; pass Scaled(learner, features=D)")
        self.learner = learner
        self.scaler = Scaler(features)

    @property
    def features(self) -> int:
        return self.scaler.features

    def init(self, *, key: PRNGKeyArray | None = None) -> tuple[ScalerState, State]:
        return self.scaler.init(), self.learner.init(key=key)

    def predict(self, state, x):
        scaler, learner = state
        return self.learner.predict(learner, self.scaler.transform(scaler, x))

    def learn(self, state, x, target, weight=1.0):
        scaler, learner = state
        scaler, z = self.scaler.step(scaler, x)
        return scaler, self.learner.learn(learner, z, target, weight)


def adagrad(lr: float = 0.1, eps: float = 1e-8) -> optax.GradientTransformation:
    """AdaGrad started from an empty accumulator, as in the paper and in River (Optax starts it at 0.1).

    Duchi, Hazan & Singer, "Adaptive subgradient methods for online learning and stochastic optimization", JMLR 2011.
    """
    return optax.adagrad(lr, initial_accumulator_value=0.0, eps=eps)


class FTRLState(NamedTuple):
    """Adjusted sums of gradients, and sums of squared gradients, of each weight."""

    z: PyTree
    n: PyTree


def ftrl(alpha: float = 0.05, beta: float = 1.0, l1: float = 0.0, l2: float = 1.0) -> optax.GradientTransformation:
    """FTRL-Proximal: per-coordinate step sizes, and weights that `l1` sets to exactly 0.

    The weights after an update are those that the next prediction uses, and a coordinate with |z| ≤ l1 is 0, as in
    Algorithm 1 of the paper. (River 0.26 has the same parameters but refreshes its weights one event late, and keeps
    the last weight of a coordinate whose |z| falls back below l1.)

    McMahan et al., "Ad click prediction: a view from the trenches", KDD 2013.

    Raises:
        ValueError: if alpha is not positive, or beta, l1 or l2 is negative.
    """
    if alpha <= 0:
        raise ValueError(f"ftrl: alpha must be positive, got {alpha}")
    for name, value in (("beta", beta), ("l1", l1), ("l2", l2)):
        if value < 0:
            raise ValueError(f"ftrl: {name} must not be negative, got {value}")

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return FTRLState(zeros, zeros)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("ftrl needs the current weights: call update(updates, state, params)")
        n = jax.tree.map(lambda n, g: n + g * g, state.n, updates)
        z = jax.tree.map(
            lambda z, g, old, new, w: z + g - (jnp.sqrt(new) - jnp.sqrt(old)) / alpha * w,
            *(state.z, updates, state.n, n, params),
        )
        weights = jax.tree.map(
            lambda z, n: (jnp.clip(z, -l1, l1) - z) / ((beta + jnp.sqrt(n)) / alpha + l2),
            *(z, n),
        )
        return jax.tree.map(jnp.subtract, weights, params), FTRLState(z, n)

    return optax.GradientTransformation(init, update)


def _features(cell: Scaler | GLM, x) -> Float[Array, " D"]:
    if jnp.shape(x) != (cell.features,):
        raise ValueError(f"{type(cell).__name__}: x must have shape ({cell.features},), got {jnp.shape(x)}")
    return jnp.asarray(x, jnp.float32)
