"""Differential Token Drop against the authors' arithmetic, derived again in NumPy, and what is then seen."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.keep.infinipot_v import InfiniPotV
from anabranch.keep.memory import Window
from anabranch.keep.timechat_online import (
    DTD,
    Drop,
    DropCurve,
    ProactiveTrigger,
    TimeChatOnline,
    example,
    pack,
    patches,
)
from anabranch.models.video_qa import BACK, PATCHES, SILENT, Config, VideoQA, Watcher, question

KEY = jax.random.PRNGKey(0)
P, D, T = 12, 7, 20
advance = eqx.filter_jit(lambda cell, xs: cell.advance(cell.init(), xs)[1])
offline = eqx.filter_jit(lambda cell, xs: cell.offline(xs))


def official(xs, method, threshold, absolute):
    """The authors' mask of frames (T, 2, P, D), of which the first of a pair is used alone for features."""
    keep, before = np.ones((len(xs), P), bool), None
    for t, (first, last) in enumerate(xs):
        now = last if method == "pixel" else first
        if before is not None and method == "pixel":
            difference = np.abs(before - now).mean(1)
            least = np.argsort(difference)[: int(P * threshold)]
            keep[t, np.flatnonzero(difference < threshold) if absolute else least] = False
        elif before is not None:
            cosine = (before * now).sum(1) / (np.linalg.norm(before, axis=1) * np.linalg.norm(now, axis=1))
            most = np.argsort(-cosine)[: int(P * threshold)]
            keep[t, np.flatnonzero(cosine > threshold) if absolute else most] = False
        before = first
    return keep


@pytest.mark.parametrize(
    ("level", "absolute", "tau"),
    [("feature", True, 0.5), ("feature", False, 0.7), ("pixel", True, 0.3), ("pixel", False, 0.7)],
)
def test_what_passes_is_what_the_authors_keep(level, absolute, tau):
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(T, 2, P, D)) if level == "feature" else rng.uniform(size=(T, 2, P, D))
    xs = xs.astype(np.float32)
    if level == "feature":
        xs[1:] += xs[:-1] * rng.uniform(0, 2, size=(T - 1, 1, P, 1))  # some resemble those before
    wanted = official(xs, level, tau, absolute)
    assert 0.2 < wanted[1:].mean() < 0.8
    cell = DTD(P, D, tau, level, absolute, pair=level == "pixel")
    given = jnp.asarray(xs if level == "pixel" else xs[:, 0])
    for run in (advance, offline):
        np.testing.assert_array_equal(run(cell, given).keep, wanted)


def test_what_drifts_slowly_passes_only_beside_what_passed_last():
    angle = 0.2 * jnp.arange(30)
    xs = jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)[:, None]
    assert advance(DTD(1, 2), xs).keep[:, 0].sum() == 1
    kept = advance(DTD(1, 2, reference="last_kept"), xs).keep[:, 0]
    assert np.flatnonzero(kept).tolist() == [0, 6, 12, 18, 24]  # more than 60 degrees: six steps of 0.2


def test_a_still_video_has_a_pulse():
    xs = jnp.zeros((11, 3, 2)).at[..., 0].set(1).at[5:, 2].set(jnp.array([3, 4]))  # a cosine of 0.6
    kept = advance(DTD(3, 2, heartbeat=4), xs).keep
    assert np.argwhere(kept[1:]).tolist() == [[3, 0], [7, 0]]  # of equals the first
    changes = advance(DTD(3, 2, heartbeat=5), xs).keep
    assert np.argwhere(changes[1:]).tolist() == [[4, 2], [9, 0]]


def test_what_all_have_in_common_can_be_taken_away():
    xs = jax.random.normal(KEY, (30, P, D))
    common = xs + 20
    assert advance(DTD(P, D), common).keep[1:].mean() == 0
    centred = advance(DTD(P, D, centre=True), common).keep[5:].mean()
    assert abs(centred - advance(DTD(P, D), xs).keep[5:].mean()) < 0.1


def test_zeros_are_like_nothing():
    assert advance(DTD(2, 3, -1.0), jnp.zeros((3, 2, 3)).at[:, 1].set(1)).keep.tolist() == [
        [True, True],
        *[[True, False]] * 2,
    ]


def test_packing():
    keep, change = np.random.default_rng(0).uniform(size=(2, 40, P))
    for row, by in zip(keep < 0.5, change, strict=True):
        for cap in (3, P):
            index, n = pack(Drop(jnp.asarray(row), jnp.asarray(by)), cap)
            there = np.flatnonzero(row)
            wanted = np.sort(there[np.argsort(-by[there])[:cap]])
            assert index.shape == (cap,) and index[:n].tolist() == wanted.tolist()
    index, n = pack(Drop(jnp.ones(4, bool), jnp.full(4, jnp.inf)), 4)  # the first frame
    assert index.tolist() == [0, 1, 2, 3] and int(n) == 4


def test_valleys_are_those_of_the_demo():
    """At every frame, what the demo would say of the clip so far, or of its last frames."""
    rng = np.random.default_rng(1)
    passing = rng.integers(0, 41, 120)
    keep = jnp.arange(40) < passing[:, None]
    for window in (200, 16):
        curve = DropCurve(window, 0.25)
        found = advance(curve, Drop(keep, keep.astype(jnp.float32)))
        np.testing.assert_allclose(found.value, 1 - passing / 40, atol=1e-6)
        for t in range(2, 120):
            clip = (1 - passing / 40)[1 : t + 1][-window:]
            k = math.ceil(0.25 * len(clip))
            chosen = (clip <= clip[-1]).sum() <= k  # ties with it are chosen as well
            assert bool(found.valid[t]) == chosen
        assert not found.valid[:2].any() and 10 < found.valid.sum() < 50
    still = Drop(jnp.zeros((30, 4), bool).at[0].set(True), jnp.zeros((30, 4)))
    assert not advance(DropCurve(8), still).valid.any()


@pytest.fixture(scope="module")
def model():
    small = Config(vocab=64, width=16, layers=1, heads=2, kv_heads=1, hidden=16, rope_base=1000.0)
    return eqx.filter_jit(VideoQA)(small, key=KEY)


@pytest.fixture(scope="module")
def frames():
    """Scenes of four frames in which one patch changes."""
    rng = np.random.default_rng(0)
    scenes = np.repeat(rng.uniform(size=(4, 16, 16)), 4, 0).astype(np.float32)
    scenes[1::2, 8:12, 4:8] = rng.uniform(size=(8, 4, 4))
    return jnp.asarray(scenes)


step, ask = eqx.filter_jit(TimeChatOnline.step), eqx.filter_jit(TimeChatOnline.ask)


def test_what_is_dropped_is_as_if_it_had_never_been(model, frames):
    watcher = Watcher(model, Window(300, room=19))
    cell = TimeChatOnline(watcher, DTD(PATCHES, 16, 0.05, "pixel"))
    state, see = cell.init(), eqx.filter_jit(Watcher.see)
    plain, passed, before = watcher.init(), 0, None
    place = 1 + np.stack(np.divmod(np.arange(16), 4), 1)
    for frame in frames:
        state, _ = step(cell, state, frame)
        blocks = np.asarray(frame).reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(16, 16)
        np.testing.assert_array_equal(patches(frame), blocks)
        mine = np.full(16, True) if before is None else np.abs(blocks - before).mean(1) >= 0.05
        before, passed = blocks, passed + mine.sum()
        if mine.any():
            plain, _ = see(watcher, plain, watcher.stem(frame)[mine], jnp.asarray(place[mine]))
        else:
            plain = plain._replace(tick=plain.tick + 1)
    assert int(state.passed) == passed == int(state.watched.memory[0].live[0]) == 4 * 16 + 12
    np.testing.assert_allclose(
        ask(cell, state, question(BACK, 1)), ask(cell, state._replace(watched=plain), question(BACK, 1)), atol=1e-4
    )


def test_where_nothing_is_dropped_it_is_the_watcher(model, frames):
    watcher = Watcher(model, Window(300, room=19))
    cell = TimeChatOnline(watcher, DTD(PATCHES, 16, 0.0, absolute=False))
    state, said = eqx.filter_jit(lambda cell: cell.advance(cell.init(), frames))(cell)
    plain, wanted = eqx.filter_jit(lambda cell: cell.advance(cell.init(), frames))(watcher)
    np.testing.assert_allclose(said.value, wanted, atol=1e-4)
    np.testing.assert_allclose(state.watched.memory[0].k, plain.memory[0].k, atol=1e-5)
    assert int(state.passed) == 16 * 16 and not said.valid.any()


def test_it_speaks_where_scenes_change_unless_it_is_silent(model, frames):
    drop = DTD(PATCHES, 16, 0.05, "pixel")
    runs = {}
    for bias in (0.0, 1e3):
        head = eqx.tree_at(lambda m: m.llama.embedding, model, model.llama.embedding.at[SILENT].multiply(1 + bias))
        cell = TimeChatOnline(Watcher(head, Window(300, room=19)), drop, DropCurve(8, 0.3), cap=10)
        state = eqx.filter_jit(cell.tell)(cell.init(), question(BACK, 2))
        state, runs[bias] = eqx.filter_jit(lambda cell, state: cell.advance(state, frames))(cell, state)
        assert int(state.overflow) == 4 * 6 and int(state.passed) == 4 * 10 + 12 and int(state.watched.tick) == 19
    trigger = ProactiveTrigger(drop, DropCurve(8, 0.3))
    when = advance(trigger, jax.vmap(patches)(frames)).valid
    assert np.flatnonzero(when).tolist() == [4, 8, 12]
    for said in runs.values():
        np.testing.assert_array_equal(said.valid, when & (said.value.argmax(-1) != SILENT))
    assert (runs[0.0].valid.sum(), runs[1e3].valid.sum()) != (3, 3)


def test_contracts(model, frames):
    watcher = Watcher(model, InfiniPotV(64, room=35))
    for cell, xs in (example(), (TimeChatOnline(watcher, DTD(PATCHES, 16, 0.05, "pixel", heartbeat=3)), frames)):
        report = contract.check(cell, xs, key=KEY)
        assert report.ok, str(report)


def test_bad_arguments_are_named(model):
    for arguments, said in (
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"level": "edge"}, 'level must be "feature" or "pixel", got \'edge\''),
        ({"reference": "next"}, 'reference must be "previous" or "last_kept", got \'next\''),
        ({"tau": -1.5}, "tau must be in -1..1, got -1.5"),
        ({"tau": -0.5, "level": "pixel"}, "tau must be in 0..1, got -0.5"),
        ({"heartbeat": -1}, "heartbeat must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=said):
            DTD(**{"places": 2, "width": 3, **arguments})
    cell = DTD(2, 3)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(3, 2\)"):
        cell.step(cell.init(), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="window must be at least 2, got 1"):
        DropCurve(1)
    with pytest.raises(ValueError, match=r"share must be in 0\.\.1 and not 0, got 0"):
        DropCurve(8, 0)
    with pytest.raises(ValueError, match="cap must be 1 to 16, got 17"):
        TimeChatOnline(Watcher(model, Window(64, room=19)), cell, cap=17)
