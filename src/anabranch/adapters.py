"""Learners in River and scikit-learn, and River's and scikit-learn's models as learners.

`RiverClassifier`, `RiverRegressor`, `SklearnClassifier` and `SklearnRegressor` give a `Learner` the interface of either
library, for use in its pipelines, evaluations and searches. `HostLearner` goes the other way. Neither library is needed
to import this module.
"""

import copy
from collections.abc import Hashable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from anabranch.cell import Event, Learner, Maybe, State

try:
    from river import base as river
except ImportError:
    river = None
try:
    import sklearn.base as sklearn
except ImportError:
    sklearn = None
# An estimator has the base classes of its library where the library is there.
_CLASSIFIER: Any = river.Classifier if river else object
_REGRESSOR: Any = river.Regressor if river else object
_SKLEARN_CLASSIFIER: Any = (sklearn.ClassifierMixin, sklearn.BaseEstimator) if sklearn else ()
_SKLEARN_REGRESSOR: Any = (sklearn.RegressorMixin, sklearn.BaseEstimator) if sklearn else ()

_predict = eqx.filter_jit(lambda learner, state, x: learner.predict(state, x))
_predict_many = eqx.filter_jit(lambda learner, state, xs: jax.vmap(lambda x: learner.predict(state, x))(xs))
_learn = eqx.filter_jit(lambda learner, state, x, y, weight: learner.learn(state, x, y, weight))
_learn_many = eqx.filter_jit(lambda learner, state, events: learner.advance(state, events)[0])


def _needs(module: Any, name: str, what: Any) -> None:
    if module is None:
        raise ImportError(f"{type(what).__name__} needs {name}: pip install 'anabranch[peers]'")


def _classes(learner: Learner, state: State, x) -> int:
    """How many classes the learner tells apart; a scalar prediction is the probability of class 1."""
    shape = jax.eval_shape(learner.predict, state, x).shape
    return shape[0] if shape else 2


def _probabilities(scores, n: int) -> Float[np.ndarray, "... n"]:
    """Probabilities of the first n classes, from predictions (…) of two classes or (…, C) of C, with n ≤ C."""
    scores = np.asarray(scores, np.float64)[..., :n]
    total = scores.sum(-1, keepdims=True)
    return np.where(total > 0, scores / np.where(total > 0, total, 1.0), 1 / n)


class _River:
    """What the two River estimators share: features as a dict, in the order of the first event or as given."""

    learner: Learner
    features: Sequence[Hashable] | None
    seed: int

    def _start(self, learner, features, seed):
        _needs(river, "River", self)
        # River clones an estimator from its constructor's arguments: they are kept as they came.
        self.learner, self.features, self.seed = learner, features, seed
        self._order = None if features is None else list(features)
        self._state = learner.init(key=jax.random.PRNGKey(seed))

    def _row(self, x: dict) -> Float[np.ndarray, " D"]:
        if self._order is None:
            self._order = list(x)
        unknown = [name for name in x if name not in self._order]
        if unknown:
            raise ValueError(f"unknown feature {unknown[0]!r}: the features are {self._order}")
        row = np.full(len(self._order), np.nan, np.float32)  # a feature that is not there is missing
        for i, name in enumerate(self._order):
            if name in x:
                try:
                    row[i] = x[name]
                except (TypeError, ValueError):
                    raise ValueError(f"feature {name!r} must be a number, got {x[name]!r}") from None
        return row


class RiverClassifier(_River, _CLASSIFIER):
    """A learner as a River classifier.

    `learner` predicts the probability of class 1 or the probabilities of C classes. Labels may be any hashables; they
    take the classes 0, 1, … in the order of `labels` or of first appearance (False and True are always 0 and 1).
    `features` fixes the order of the features; otherwise it is that of the first event. A feature that an event lacks
    is NaN to the learner.

    Raises:
        ValueError: on a feature that is not known or not a number, and on more labels than the learner has classes.
        ImportError: if River is not installed.
    """

    def __init__(
        self,
        learner: Learner,
        features: Sequence[Hashable] | None = None,
        labels: Sequence[Hashable] | None = None,
        seed: int = 0,
    ):
        self._start(learner, features, seed)
        self.labels = labels
        self._labels: list[Hashable] = list(labels or ())
        self._most: int | None = None

    @property
    def _multiclass(self) -> bool:
        return True

    def learn_one(self, x: dict, y: Hashable, w: float = 1.0) -> None:
        row = self._row(x)
        if y not in self._labels:
            if self._most is None:
                self._most = _classes(self.learner, self._state, row)
            new = [False, True] if isinstance(y, bool | np.bool_) and not self._labels else [y]
            if len(self._labels) + len(new) > self._most:
                raise ValueError(
                    f"label {y!r} is one too many: {type(self.learner).__name__} has {self._most} classes, "
                    f"taken by {self._labels}"
                )
            self._labels += new
        self._state = _learn(self.learner, self._state, row, np.int32(self._labels.index(y)), np.float32(w))

    def predict_proba_one(self, x: dict) -> dict[Hashable, float]:
        if not self._labels:
            return {}
        p = np.asarray(_predict(self.learner, self._state, self._row(x)))
        p = np.array([1 - p, p]) if p.ndim == 0 else p
        return dict(zip(self._labels, _probabilities(p, len(self._labels)).tolist()))


class RiverRegressor(_River, _REGRESSOR):
    """A learner that predicts a number, as a River regressor. Features are treated as in `RiverClassifier`."""

    def __init__(self, learner: Learner, features: Sequence[Hashable] | None = None, seed: int = 0):
        self._start(learner, features, seed)

    def learn_one(self, x: dict, y: float, w: float = 1.0) -> None:
        self._state = _learn(self.learner, self._state, self._row(x), np.float32(y), np.float32(w))

    def predict_one(self, x: dict) -> float:
        return float(_predict(self.learner, self._state, self._row(x)))


class _Sklearn:
    learner: Learner
    seed: int

    def _matrix(self, X, first: bool) -> Float[np.ndarray, "n D"]:
        X = np.asarray(X, np.float32)
        if X.ndim != 2:
            raise ValueError(f"X must have the shape (rows, features), got {X.shape}")
        if first:
            _needs(sklearn, "scikit-learn", self)
            self.n_features_in_ = X.shape[1]
            self._state = self.learner.init(key=jax.random.PRNGKey(self.seed))
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} was fitted with {self.n_features_in_}"
            )
        return X

    def _fit_rows(self, X: Any, y: Any, weight: Any):
        n = len(X)
        weight = np.ones(n, np.float32) if weight is None else np.asarray(weight, np.float32)
        for name, column in (("y", y), ("sample_weight", weight)):
            if column.shape != (n,):
                raise ValueError(f"{name} must have the shape ({n},), got {column.shape}")
        # Padded to a power of two with events whose target never comes, so that few lengths are compiled.
        there: Any = np.arange(1 << max(n - 1, 0).bit_length()) < n
        pad = len(there) - n
        X, y, weight = np.pad(X, ((0, pad), (0, 0))), np.pad(y, (0, pad)), np.pad(weight, (0, pad))
        self._state = _learn_many(self.learner, self._state, Event(X, Maybe(y, there), weight))

    def _answers(self, X) -> np.ndarray:
        if not hasattr(self, "_state"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call partial_fit or fit")
        return np.asarray(_predict_many(self.learner, self._state, self._matrix(X, first=False)))


class SklearnClassifier(_Sklearn, *_SKLEARN_CLASSIFIER):
    """A learner as a scikit-learn classifier. Rows are learned one after the other, in their order.

    `learner` predicts the probability of class 1 or the probabilities of C classes.

    Raises:
        ValueError: on wrong shapes, on a label that is not in `classes`, on more classes than the learner has.
        ImportError: if scikit-learn is not installed.
    """

    def __init__(self, learner: Learner, seed: int = 0):
        _needs(sklearn, "scikit-learn", self)
        self.learner = learner
        self.seed = seed

    def fit(self, X, y, sample_weight=None):
        """Forget everything, then learn the rows once."""
        self.__dict__.pop("classes_", None)
        return self.partial_fit(X, y, np.unique(y), sample_weight)

    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Learn the rows. The first call must say which classes there are, as everywhere in scikit-learn."""
        first = not hasattr(self, "classes_")
        if first and classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit")
        X, y = self._matrix(X, first), np.asarray(y)
        if first:
            self.classes_ = np.unique(np.asarray(classes))
            most = _classes(self.learner, self._state, X[0])
            if len(self.classes_) > most:
                names, n = type(self.learner).__name__, len(self.classes_)
                del self.classes_
                raise ValueError(f"classes has {n} entries, but {names} has {most}")
        index = np.minimum(np.searchsorted(self.classes_, y), len(self.classes_) - 1)
        wrong = y[self.classes_[index] != y]
        if len(wrong):
            raise ValueError(
                f"y has the label {wrong.tolist()[0]!r}, which is not among the classes {self.classes_.tolist()}"
            )
        self._fit_rows(X, index.astype(np.int32), sample_weight)
        return self

    def predict_proba(self, X) -> Float[np.ndarray, "n C"]:
        p = self._answers(X)
        return _probabilities(np.stack([1 - p, p], -1) if p.ndim == 1 else p, len(self.classes_))

    def predict(self, X) -> np.ndarray:
        p = self.predict_proba(X)
        return self.classes_[p.argmax(-1)]


class SklearnRegressor(_Sklearn, *_SKLEARN_REGRESSOR):
    """A learner that predicts a number, as a scikit-learn regressor. Rows are learned one after the other."""

    def __init__(self, learner: Learner, seed: int = 0):
        _needs(sklearn, "scikit-learn", self)
        self.learner = learner
        self.seed = seed

    def fit(self, X, y, sample_weight=None):
        """Forget everything, then learn the rows once."""
        self.__dict__.pop("_state", None)
        return self.partial_fit(X, y, sample_weight)

    def partial_fit(self, X, y, sample_weight=None):
        X = self._matrix(X, first=not hasattr(self, "_state"))
        self._fit_rows(X, np.asarray(y, np.float32), sample_weight)
        return self

    def predict(self, X) -> Float[np.ndarray, " n"]:
        return self._answers(X)


class HostLearner(Learner):
    """A River or scikit-learn model as a learner that runs in Python: `HostLearner(model, classes=2)`.

    Any model with `learn_one` (River's features are named 0 … D−1, or `names`) or with `partial_fit`. With `classes` =
    C it predicts the probabilities f32[C] of the labels 0 … C−1, and before it has learned anything 1/C each; without,
    it is a regressor and predicts a f32 scalar, at first 0.

    The state is the model itself, a copy of the one given, and `learn` changes it in place: whoever wants to go back
    keeps `copy.deepcopy(state)`. `weight` is passed on if the model takes one, otherwise it must be 1.

    Raises:
        TypeError: if the model has neither `learn_one` nor `partial_fit`.
    """

    host = True

    model: Any = eqx.field(static=True)
    classes: int | None = eqx.field(static=True, default=None)
    names: tuple[Hashable, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not (hasattr(self.model, "learn_one") or hasattr(self.model, "partial_fit")):
            raise TypeError(f"HostLearner needs a model with learn_one or partial_fit, got {self.model!r}")

    def init(self, *, key: PRNGKeyArray | None = None) -> Any:
        return copy.deepcopy(self.model)

    def predict(self, state: Any, x) -> Float[np.ndarray, "*C"] | np.float32:
        river_like = hasattr(state, "learn_one")
        row = self._row(x) if river_like else np.asarray(x)[None]
        if self.classes is None:
            return np.float32(self._ask(state, "predict_one" if river_like else "predict", row, 0.0))
        p = self._ask(state, "predict_proba_one" if river_like else "predict_proba", row, {})
        if p is None:  # no probabilities, then the class it names
            answer = self._ask(state, "predict_one" if river_like else "predict", row, None)
            p = {} if answer is None else {int(answer): 1.0}
        if not isinstance(p, dict):
            p = dict(zip(state.classes_.tolist(), p))
        scores = np.array([p.get(c, 0.0) for c in range(self.classes)], np.float32)
        return scores if scores.sum() > 0 else np.full(self.classes, 1 / self.classes, np.float32)

    def learn(self, state: Any, x, target, weight=1.0) -> Any:
        y = float(target) if self.classes is None else int(target)
        weight = float(np.asarray(weight))
        if hasattr(state, "learn_one"):
            state.learn_one(self._row(x), y, **({} if weight == 1.0 else {"w": weight}))
        else:
            known = {} if self.classes is None else {"classes": np.arange(self.classes)}
            state.partial_fit(
                np.asarray(x)[None], [y], **known, **({} if weight == 1.0 else {"sample_weight": [weight]})
            )
        return state

    def step(self, state: Any, x: Event) -> tuple[Any, Any]:
        y = self.predict(state, x.x)
        return (self.learn(state, x.x, x.target.value, x.weight) if x.target.valid else state), y

    def _row(self, x) -> dict[Hashable, float]:
        x = np.asarray(x).tolist()
        return dict(zip(range(len(x)) if self.names is None else self.names, x, strict=True))

    @staticmethod
    def _ask(model, method: str, row, unfitted):
        """The model's answer for one row; `unfitted` before its first event, None if it has no such method."""
        ask = getattr(model, method, None)
        if ask is None:
            return None
        try:
            answer = ask(row)
        except NotImplementedError:
            return None
        except ValueError as error:
            if type(error).__name__ == "NotFittedError":  # scikit-learn's, which need not be installed
                return unfitted
            raise
        if method.endswith("_one"):
            return unfitted if answer is None else answer
        return answer[0]
