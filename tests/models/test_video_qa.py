"""The small model of streaming video, and its world."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.keep.memory import Window
from anabranch.keep.video import NOW, gate, whole
from anabranch.models import video_qa
from anabranch.models.video_qa import (
    ALERT,
    BACK,
    COUNT,
    DIGIT,
    FIRST,
    GRID,
    NO,
    NONE,
    PATCHES,
    QUADRANT,
    SEEN,
    SILENT,
    WHERE,
    YES,
    Config,
    Stream,
    VideoQA,
    Watcher,
    World,
    alerts,
    asked,
    load,
    question,
)
from anabranch.train import WEIGHTS

SMALL = Config(vocab=64, width=32, layers=2, heads=4, kv_heads=2, hidden=32, rope_base=1000.0)
KEY = jax.random.PRNGKey(0)
step, tell, ask = (eqx.filter_jit(f) for f in (Watcher.step, Watcher.tell, Watcher.ask))


@pytest.fixture(scope="module")
def model():
    return eqx.filter_jit(VideoQA)(SMALL, key=KEY)


@pytest.fixture(scope="module")
def world():
    """Random pictures for digits: of each, twelve."""
    rng = np.random.default_rng(0)
    return World(jnp.asarray(rng.uniform(size=(120, 10, 10)), jnp.float32), jnp.arange(120) // 12, scene=(2, 4))


@pytest.fixture(scope="module")
def stream(world):
    return jax.jit(lambda key: world.stream(key, 12))(KEY)


ROUNDS = jnp.stack([jnp.append(question(kind, c), c) for kind, c in ((ALERT, 3), (COUNT, 2), (BACK, 1))])


@pytest.mark.parametrize("compact", [True, False])
def test_a_stream_with_a_memory_for_all_is_the_whole_clip(model, stream, compact):
    """A standing question, one that is as if it had not been asked, and a round that stays."""
    at, kept = jnp.array([-1, 5, 8]), jnp.array([True, False, True])
    said, spoken = eqx.filter_jit(model)(stream.frames, ROUNDS, at, kept)
    watcher = Watcher(model, Window(230, room=19, compact=compact))
    state, first = tell(watcher, watcher.init(), ROUNDS[0])
    np.testing.assert_allclose(first, spoken[0], atol=1e-4)
    for t, frame in enumerate(stream.frames):
        state, logits = step(watcher, state, frame)
        np.testing.assert_allclose(logits, said[t], atol=1e-4)
        if t == 5:
            np.testing.assert_allclose(tell(watcher, state, ROUNDS[1])[1], spoken[1], atol=1e-4)
            np.testing.assert_allclose(ask(watcher, state, ROUNDS[1, :3]), spoken[1, 2], atol=1e-4)
        if t == 8:
            state, logits = tell(watcher, state, ROUNDS[2])
            np.testing.assert_allclose(logits, spoken[2], atol=1e-4)


def test_a_frame_that_counts_for_those_left_out(model, stream, monkeypatch):
    """In one layer a frame is to those that follow what so many of it are; its own tokens see it once."""
    monkeypatch.setattr(video_qa, "PIECE", 2)  # more pieces than one, and one that is not whole
    layer = jax.tree.map(lambda x: x[:1], model.llama.blocks)
    one = eqx.filter_jit(eqx.tree_at(lambda m: m.llama.blocks, model, layer))
    at, kept, stride = jnp.array([-1, 1, 2]), jnp.array([True, False, True]), jnp.array([0, 1, 2])
    said, spoken = one(stream.frames[:3], ROUNDS, at, kept, stride, times=jnp.array([3, 2, 1]))
    which = np.array([0, 0, 0, 1, 1, 2])  # copies stand at the same tick
    monkeypatch.setattr(video_qa, "PIECE", 16)
    many, told = one(stream.frames[which], ROUNDS, jnp.array([-1, 3, 5]), kept, jnp.array([0, 0, 0, 1, 0, 2]))
    np.testing.assert_allclose(said, many[np.array([0, 3, 5])], atol=1e-4)
    np.testing.assert_allclose(spoken, told, atol=1e-4)


def test_contract(model, stream):
    report = contract.check(Watcher(model, Window(48, room=19)), stream.frames, key=KEY)
    assert report.ok, str(report)


def test_a_memory_knows_time_and_place_of_its_slots(model, stream):
    watcher = Watcher(model, Window(48, room=19))
    state, _ = tell(watcher, watcher.init(), question(DIGIT))
    for frame in stream.frames[:5]:
        state, _ = step(watcher, state, frame)
    for held in state.memory:  # 3 + 4 * 16 tokens were held when the fifth frame came, of which the last 48 stayed
        for position, place in zip(held.position, held.place, strict=True):
            np.testing.assert_array_equal(position[:64], np.repeat(np.arange(4, 8), 16))
            at = np.asarray(place[:64] - 1) @ [GRID, 1]
            np.testing.assert_array_equal(at, np.tile(np.arange(PATCHES), 4))
            assert (position[64:] == -1).all()


def test_compact_ticks_close_ranks(model, stream):
    """What is remembered is read as if nothing else had ever been; where ticks are not compact it is not."""
    watchers = [Watcher(model, Window(32, room=35, compact=compact)) for compact in (True, False)]
    for watcher in watchers:
        state = watcher.init()
        for frame in stream.frames[:6]:
            state, _ = step(watcher, state, frame)
        late = state._replace(
            memory=tuple(eqx.tree_at(lambda m: m.position, m, m.position + 7 * (m.position > 3)) for m in state.memory)
        )
        late = late._replace(tick=state.tick + 7)
        here, there = ask(watcher, state, question(DIGIT)), ask(watcher, late, question(DIGIT))
        assert bool(jnp.allclose(here, there, atol=1e-5)) == watcher.keep.compact


@pytest.mark.parametrize("n", [0, 5])
def test_tokens_beyond_the_first_n_are_as_if_they_had_never_been(model, stream, n):
    watcher = Watcher(model, Window(64, room=19))
    see = eqx.filter_jit(Watcher.see)
    places = 1 + jnp.stack(jnp.divmod(jnp.arange(16), 4), 1)
    state, _ = step(watcher, watcher.init(), stream.frames[0])
    tokens = watcher.stem(stream.frames[3])
    some, h = see(watcher, state, tokens, places, jnp.int32(n))
    plain, exact = see(watcher, state, tokens[:n], places[:n]) if n else (state._replace(tick=state.tick + 1), h[:0])
    np.testing.assert_allclose(h[:n], exact, atol=1e-5)
    np.testing.assert_allclose(
        step(watcher, some, stream.frames[5])[1], step(watcher, plain, stream.frames[5])[1], atol=1e-4
    )
    assert int(some.memory[0].live[0]) == 16 + n


def test_the_world_is_what_it_says(world, stream):
    digit, scene, begun = (np.asarray(x) for x in (stream.digit, stream.scene, stream.begun))
    new = np.flatnonzero(begun == 0)
    assert new[0] == 0 and (np.diff(new) >= 2).all() and (np.diff(new) <= 4).all()
    np.testing.assert_array_equal(scene, np.cumsum(begun == 0) - 1)
    for a, b in itertools.pairwise(new):
        assert len(set(digit[a:b])) == 1 and digit[a] != digit[b]
    assert len(set(digit)) <= world.palette and stream.frames.shape == (12, 16, 16)
    assert 0 <= stream.frames.min() and stream.frames.max() <= 1
    # The ink is where the centre is said to be.
    flat = eqx.tree_at(lambda w: (w.glyphs, w.contrast), world, (jnp.ones((120, 10, 10)), 0.0))
    plain = jax.jit(lambda key: flat.stream(key, 12))(KEY)
    rows = jnp.stack(jnp.meshgrid(jnp.arange(16.0), jnp.arange(16.0), indexing="ij"), -1)
    found = (plain.frames[..., None] * rows).sum((1, 2)) / plain.frames.sum((1, 2))[:, None]
    np.testing.assert_allclose(found, plain.centre, atol=1e-3)
    still = np.flatnonzero((begun[1:] > 0) & (np.abs(np.diff(plain.centre, axis=0)).sum(1) == 0)) + 1
    moving = np.flatnonzero((begun[1:] > 0) & (np.abs(np.diff(plain.centre, axis=0)).sum(1) > 0)) + 1
    assert len(still) and len(moving)
    np.testing.assert_array_equal(stream.frames[still], stream.frames[still - 1])


def test_answers_by_hand():
    digit = jnp.array([4, 4, 7, 7, 7, 4, 4, 1, 1, 1])
    scene = jnp.array([0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    begun = jnp.array([0, 1, 0, 1, 2, 0, 1, 0, 1, 2])
    stream = Stream(jnp.zeros((10, 16, 16)), digit, jnp.tile(jnp.array([10.0, 5.0]), (10, 1)), scene, begun)
    put = jax.jit(jax.vmap(lambda kind, at, key: asked(stream, kind, at, key), (None, None, 0)))
    keys = jax.random.split(KEY, 64)

    def table(kind, at):
        """The answers and evidence by argument, of those questions that make sense."""
        found = put(jnp.int32(kind), jnp.int32(at), keys)
        rows = zip(found.question[:, 1].tolist(), found.answer.tolist(), found.evidence.tolist(), strict=True)
        return {row for row, valid in zip(rows, found.valid, strict=True) if valid}

    assert table(DIGIT, 3) == {(NONE, 7, 3)} and table(WHERE, 3) == {(NONE, QUADRANT + 2, 3)}
    assert table(BACK, 8) == {(1, 4, 6), (2, 7, 4), (3, 4, 1)} and table(BACK, 5) == {(1, 7, 4), (2, 4, 1)}
    assert table(BACK, 1) == set() and table(FIRST, 9) == {(NONE, 4, 1)}
    count, seen = table(COUNT, 5), table(SEEN, 5)
    assert {(4, 2, 5), (7, 1, 4)} < count and {(4, YES, 5), (7, YES, 4)} < seen
    assert {(a, e) for c, a, e in count if c not in (4, 7)} == {(0, -1)}
    assert {(a, e) for c, a, e in seen if c not in (4, 7)} == {(NO, -1)} and len(seen) > 4
    assert alerts(stream, jnp.int32(1)).tolist() == [SILENT] * 7 + [YES] * 3
    assert alerts(stream, jnp.int32(7)).tolist() == [SILENT] * 2 + [YES] * 3 + [SILENT] * 5


def test_bad_input_is_refused(model, world):
    with pytest.raises(ValueError, match="room=15"):
        Watcher(model, Window(64, room=15))
    with pytest.raises(ValueError, match="got 3"):
        question(3)
    with pytest.raises(ValueError, match="argument of 'seen' must be 0 to 9, got 18"):
        question(SEEN)
    with pytest.raises(ValueError, match="argument of 'first' must be none, got 2"):
        question(FIRST, 2)
    with pytest.raises(ValueError, match="palette must be 2 to 10 digits, got 1"):
        World(world.glyphs, world.labels, palette=1)
    with pytest.raises(ValueError, match="scene must be"):
        World(world.glyphs, world.labels, scene=(3, 2))


def test_trained_weights_are_small_and_know_what_is_there_now(data):
    """Handwriting that they were not trained on."""
    assert (WEIGHTS / "video_qa.safetensors").stat().st_size < 3e6
    answers = whole(load(), World.of(held_out=True, scene=(2, 6)), 0, streams=20, frames=8)
    assert answers.pooled(("digit", "where")) > 0.8 and answers.table()["seen"] > 0.75


def test_the_record_of_the_trained_weights_tells_what_they_know_of_the_past():
    short, long = (gate()[f"{n} frames"] for n in (64, 192))
    assert np.mean([short[kind] for kind in NOW]) >= 0.9
    assert min(short[kind] for kind in ("back 1", "back 2", "back 3", "count", "seen")) >= 0.8
    assert min(long.values()) >= 0.75
