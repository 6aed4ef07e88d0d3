"""Tasks are made as they say, and what was forgotten is read as its papers define it."""

import numpy as np
import pytest

from anabranch.learn.continual import by_class, chunks, summary


def test_tasks_hold_their_classes_and_every_row_once():
    labels = np.random.default_rng(0).integers(0, 6, 200)
    tasks = by_class(labels, 2, seed=3)
    assert len(tasks) == 3 and sorted(np.concatenate(tasks).tolist()) == list(range(200))
    classes = [set(labels[task].tolist()) for task in tasks]
    assert all(len(mine) == 2 for mine in classes) and set.union(*classes) == set(range(6))
    assert not np.array_equal(tasks[0], by_class(labels, 2, seed=4)[0])
    with pytest.raises(ValueError, match="6 classes cannot be dealt out in tasks of 4"):
        by_class(labels, 4, seed=0)


def test_chunks_hold_every_row_once():
    parts = chunks(103, 10, seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(103)) and {len(p) for p in parts} == {10, 11}
    with pytest.raises(ValueError, match="3 rows cannot be dealt out in 4"):
        chunks(3, 4, seed=0)


def test_summary_by_hand():
    R = np.array([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.8, 0.5, 0.6]])
    assert summary(R, untrained=np.array([0.1, 0.1, 0.1])) == pytest.approx({
        "accuracy": 1.9 / 3,
        "anytime": (0.9 + 0.75 + 1.9 / 3) / 3,
        "learning": 2.3 / 3,
        "forgetting": (0.1 + 0.3) / 2,
        "backward": (-0.1 - 0.3) / 2,
        "forward": (0.1 + 0.2) / 2,
    })  # fmt: skip
    with pytest.raises(ValueError, match="square"):
        summary(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"accuracies in \[0, 1\]"):
        summary(np.array([[np.nan]]))
