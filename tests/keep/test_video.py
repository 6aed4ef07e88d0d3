"""The protocol for memories of video."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.keep.video import Answers, Uniform, full, size, watch, whole
from anabranch.models.video_qa import BACK, COUNT, DIGIT, FIRST, NONE, SEEN, WHERE, Config, VideoQA, Watcher, World

SMALL = Config(vocab=64, width=16, layers=1, heads=2, kv_heads=1, hidden=16, rope_base=1000.0)
KEY = jax.random.PRNGKey(0)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    glyphs = jnp.asarray(rng.uniform(size=(30, 10, 10)), jnp.float32)
    return World(glyphs, jnp.arange(30) // 3, scene=(2, 4))


def test_a_memory_of_all_answers_as_the_whole_pass_does(world):
    """Answers of random weights vary, and so do which of them are right."""
    model = jax.tree.map(lambda x: 3 * x, eqx.filter_jit(VideoQA)(SMALL, key=KEY))
    there = whole(model, world, 3, streams=6, frames=12)
    here = watch(Watcher(model, full(12)), world, 3, streams=6, frames=12, together=3)
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a, b)
    # Of random weights few are right; what there is to be right about is of all kinds.
    assert {"digit", "where", "back 1", "first", "count", "seen"} <= set(here.table())
    other = watch(Watcher(model, full(12)), world, 4, streams=6, frames=12, together=3)
    assert not np.array_equal(other.argument, here.argument)
    with pytest.raises(ValueError, match="together=4, got 6"):
        watch(Watcher(model, full(12)), world, 3, streams=6, together=4)


def test_uniform_keeps_frames_evenly_spread(world):
    model = eqx.filter_jit(VideoQA)(SMALL, key=KEY)
    watcher = Watcher(model, Uniform(8 * 16, room=16 + 3))
    assert size(watcher.keep) == 8 * 16 + 19
    step = eqx.filter_jit(Watcher.step)
    state = watcher.init()
    for _ in range(34):
        state, _ = step(watcher, state, jnp.zeros((16, 16)))
    held = []
    for tick in range(34):  # nine frames fit; of those of one power of two, the newer ones stay
        if len(held) == 9:
            coarse = lambda t: (32 if t == 0 else (t & -t).bit_length(), t)
            held = sorted(sorted(held, key=coarse)[1:])
        held.append(tick)
    assert np.unique(state.memory[0].position[0]).tolist() == [-1, *held]
    assert held == [0, 8, 12, 16, 20, 24, 28, 32, 33]


def test_tables_by_hand():
    kind = np.array([[DIGIT, WHERE, BACK, BACK, FIRST, COUNT, SEEN], [DIGIT, WHERE, BACK, BACK, FIRST, COUNT, SEEN]])
    argument = np.array([[NONE, NONE, 1, 2, NONE, 3, 3], [NONE, NONE, 2, 3, NONE, 4, 4]])
    right = np.array([[1, 1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 0, 1]], bool)
    valid = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1]], bool)
    age = np.array([[0, 0, 9, 20, 40, 30, 5], [0, 0, 21, 35, 41, 50, 50]])
    answers = Answers(kind, argument, right, valid, age)
    assert answers.table() == {
        "digit": 1.0, "where": 0.5, "back 1": 1.0, "back 2": 0.5, "first": 0.0, "count": 0.5, "seen": 1.0,
    }  # fmt: skip
    assert answers.pooled(("digit", "where")) == 0.75
    by_age = answers.by_age([0, 10, 30, 45, 100], ("back 1", "back 2", "first"))
    assert by_age[:3] == [1.0, 0.5, 0.0] and np.isnan(by_age[3])
