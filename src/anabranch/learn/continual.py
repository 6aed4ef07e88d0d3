"""Learning task after task: streams that come in tasks, and how much of the earlier ones is kept.

A task is an array of row numbers, in the order of the stream. What was learned and forgotten is read from one matrix,
R[i, j]: the accuracy on task j after training on task i.

    >>> import numpy as np
    >>> [np.unique(ys) for ys in (np.array([0, 1, 2, 3, 2, 1])[t] for t in by_class([0, 1, 2, 3, 2, 1], 2, seed=None))]
    [array([0, 1]), array([2, 3])]
    >>> summary(np.array([[0.9, 0.1], [0.6, 0.8]]))["forgetting"]
    0.3

Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning", NeurIPS 2017 (transfer); Chaudhry et al.,
"Riemannian walk for incremental learning", ECCV 2018 (forgetting).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def by_class(
    labels: Sequence[int] | Int[np.ndarray, " n"], classes: int, seed: int | None
) -> list[Int[np.ndarray, " m"]]:
    """Tasks of so many classes each; classes and rows are shuffled, or in order if `seed` is None.

    Raises:
        ValueError: if the classes cannot be dealt out in tasks of that size.
    """
    labels = np.asarray(labels)
    order = np.unique(labels)
    if classes < 1 or len(order) % classes:
        raise ValueError(f"{len(order)} classes cannot be dealt out in tasks of {classes}")
    rng = None if seed is None else np.random.default_rng(seed)
    order = order if rng is None else rng.permutation(order)
    tasks = [np.flatnonzero(np.isin(labels, mine)) for mine in np.split(order, len(order) // classes)]
    return tasks if rng is None else [rng.permutation(task) for task in tasks]


def chunks(rows: int, count: int, seed: int) -> list[Int[np.ndarray, " m"]]:
    """Mega-batches: all rows, shuffled once, in `count` parts of nearly the same size.

    Raises:
        ValueError: if there are fewer rows than parts.
    """
    if not 0 < count <= rows:
        raise ValueError(f"{rows} rows cannot be dealt out in {count} parts")
    return np.array_split(np.random.default_rng(seed).permutation(rows), count)


def summary(R: Float[np.ndarray, "n n"], untrained: Float[np.ndarray, " n"] | None = None) -> dict[str, float]:
    """What a matrix of accuracies says of n tasks learned one after the other.

    Arguments:
        R: R[i, j] is the accuracy on task j after training on task i; what lies above the diagonal counts only for
            `forward`.
        untrained: accuracies before any training, from which `forward` is measured; without it there is none.

    Returns:
        accuracy: mean over all tasks at the end.
        anytime: mean over time of the mean over the tasks so far.
        learning: mean accuracy on each task just after it.
        forgetting: mean loss of the earlier tasks against the best they once had.
        backward: mean change of the earlier tasks since they were learned; negative is forgetting.
        forward: mean gain on each task just before it, over the untrained model.

    Raises:
        ValueError: if R is not square, or holds values that are not accuracies on or below its diagonal.
    """
    R = np.asarray(R, float)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise ValueError(f"R must be square, got shape {R.shape}")
    past = R[np.tril_indices(len(R))]
    if not ((past >= 0) & (past <= 1)).all():
        raise ValueError("R must hold accuracies in [0, 1] on and below its diagonal")
    n, last, diagonal = len(R), R[-1], np.diag(R)
    best = np.array([R[j : n - 1, j].max() for j in range(n - 1)])
    found = {
        "accuracy": last.mean(),
        "anytime": np.mean([R[i, : i + 1].mean() for i in range(n)]),
        "learning": diagonal.mean(),
        "forgetting": (best - last[:-1]).mean() if n > 1 else 0.0,
        "backward": (last[:-1] - diagonal[:-1]).mean() if n > 1 else 0.0,
    }
    if untrained is not None and n > 1:
        found["forward"] = (np.diag(R, 1) - np.asarray(untrained)[1:]).mean()
    return {name: round(float(value), 12) for name, value in found.items()}
