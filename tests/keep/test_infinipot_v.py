"""InfiniPot-V against the arithmetic of the authors' code, derived again in NumPy, and its true places."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.keep.infinipot_v import InfiniPotV
from anabranch.keep.memory import Held, Window
from anabranch.models.video_qa import BACK, DIGIT, Config, VideoQA, Watcher, question

GRID, P, F, C = (3, 3), 9, 12, 8
KEY = jax.random.PRNGKey(0)
PLACES = 1 + np.stack(np.divmod(np.arange(P), 3), 1)
compressed = eqx.filter_jit(Held.compressed)


def unit(k):
    return k / np.linalg.norm(k, axis=-1, keepdims=True)


def pooled(norm, size, width):
    """The mean over a window of that width along the last axes; zeros beyond the border count."""
    half, out = width // 2, np.zeros_like(norm)
    padded = np.pad(norm, [(0, 0)] * (norm.ndim - size) + [(half, half)] * size)
    for shift in itertools.product(range(width), repeat=size):
        at = tuple(slice(s, s + n) for s, n in zip(shift, norm.shape[norm.ndim - size :], strict=True))
        out += padded[(..., *at)]
    return out / width**size


def official(k, v, tar, query, layer=None):
    """Which tokens one layer of the authors' code keeps of k, v (heads, F * P, D); of four layers where it pools."""
    heads, n, D = k.shape
    frames, keep, newest = n // P, C * P, int(n // P * query) * P
    budget = keep - round((1 - tar) * keep)
    norm = np.linalg.norm(v, axis=-1)
    if layer is not None and layer < 3:
        size = 3 - layer
        width = {3: min(7, frames, *GRID), 2: min(5, frames, *GRID), 1: 3}[size]
        cube = norm.reshape(heads, frames, *GRID) if size > 1 else norm
        norm = pooled(cube, size, width - (width % 2 == 0)).reshape(heads, n)
    if tar:
        now = unit(k[:, -newest:]).reshape(heads, -1, 1, P, D)
        then = unit(k[:, :-newest]).reshape(heads, 1, -1, P, D)
        score = -(now * then).sum(-1).mean(1).reshape(heads, -1)
        best = np.argsort(-score, -1)[:, : budget - newest]
        chosen = np.concatenate([best, np.tile(np.arange(n - newest, n), (heads, 1))], 1)
        np.put_along_axis(norm, chosen, norm.max() + 1, 1)
    return np.sort(np.argsort(-norm, -1)[:, :keep], -1)


def held(keep, k, v, tick, place):
    """A memory with these tokens in front, (heads, n, ...) each."""
    empty, n = keep.empty(k.shape[0], k.shape[-1], places=2), k.shape[1]
    put = lambda old, new: old.at[:, :n].set(jnp.asarray(new, old.dtype))
    parts = lambda m: (m.k, m.v, m.position, m.place)
    return eqx.tree_at(parts, empty, tuple(put(*pair) for pair in zip(parts(empty), (k, v, tick, place), strict=True)))


def frames(rng, begin, n):
    """Keys, values, ticks and places of n random frames, of two heads."""
    k, v = rng.normal(size=(2, 2, n * P, 5)).astype(np.float32)
    v *= rng.uniform(0.5, 2, size=(2, n * P, 1)).astype(np.float32)
    tick, place = np.repeat(np.arange(begin, begin + n), P), np.tile(PLACES, (n, 1))
    return k, v, np.tile(tick, (2, 1)), np.tile(place, (2, 1, 1))


def joined(a, b):
    return tuple(np.concatenate(pair, 1) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize(("tar", "pool"), [(0.5, False), (0.0, False), (1.0, False), (0.5, True)])
def test_what_stays_is_what_the_authors_keep(tar, pool):
    """Three times full: after the first, what is left is no longer whole frames."""
    rng = np.random.default_rng(3)
    keep = InfiniPotV(C * P, room=(F - C) * P, grid=GRID, tar=tar, pool=pool, exact=False)
    for layer in range(4) if pool else (None,):
        now = frames(rng, 0, F)
        for begin in (F, 2 * F - C, 0):
            wanted = official(*now[:2], tar, 0.25, layer)
            memory = held(keep, *now)
            if pool:
                memory = keep.settle((memory,) * 4)[layer]
                assert int(memory.own) == 3 - layer
            found = compressed(memory)
            for part, array in zip((found.k, found.v, found.position, found.place), now, strict=True):
                picked = np.take_along_axis(array, wanted.reshape(2, -1, *[1] * (array.ndim - 2)), 1)
                np.testing.assert_array_equal(part[:, : C * P], picked)
            assert (found.position[:, C * P :] == -1).all()
            now = tuple(np.asarray(part[:, : C * P]) for part in (found.k, found.v, found.position, found.place))
            now = joined(now, frames(rng, begin, F - C))


def ragged(rng):
    """Frames with holes, a word of text before them and one between; the newest frames lack the place (2, 2)."""
    k, v, tick, place = frames(rng, 1, F)
    there = rng.uniform(size=F * P) < 0.6
    there &= ~((tick[0] > F - 2) & (place[0] == 2).all(-1))
    some = tuple(x[:, there] for x in (k, v, tick, place))
    word = lambda t: tuple(
        np.zeros((2, 1, *x.shape[2:]), x.dtype) + (t if x is tick else 0) for x in (k, v, tick, place)
    )
    cut = int((some[2][0] <= 5).sum())
    later = tuple(x[:, cut:] + (1 if x.ndim == 2 else 0) for x in some)
    return joined(word(0), joined(tuple(x[:, :cut] for x in some), joined(word(6), later)))


def test_true_places_and_text_by_loops():
    k, v, tick, place = ragged(np.random.default_rng(4))
    n, budget = k.shape[1], 44
    keep = InfiniPotV(budget, room=n - budget, grid=GRID, tar=0.7, query=0.45)
    found = np.asarray(compressed(held(keep, k, v, tick, place)).position)
    vision = [i for i in range(n) if place[0, i].all()]
    ticks = sorted({tick[0, i] for i in vision})
    newest = [i for i in vision if tick[0, i] in ticks[-int(0.45 * (len(vision) // P)) :]]
    older = [i for i in vision if i not in newest]
    absent = set()
    for h in range(2):
        score = {}
        for i in older:
            alike = [unit(k[h, i]) @ unit(k[h, j]) for j in newest if (place[h, i] == place[h, j]).all()]
            score[i] = -float(np.mean(alike)) if alike else 0.0
            absent |= set() if alike else {tuple(place[h, i])}
        tokens = budget - 2
        different = sorted(older, key=lambda i: (-score[i], -i))[: tokens - round(0.3 * tokens) - len(newest)]
        rest = sorted(set(older) - set(different), key=lambda i: -np.linalg.norm(v[h, i]))
        text = [i for i in range(n) if not place[0, i].all()]
        stay = sorted([*text, *newest, *different, *rest[: tokens - len(newest) - len(different)]])
        assert len(newest) < len(newest) + len(different) < tokens and len(stay) == budget
        np.testing.assert_array_equal(found[h, :budget], tick[h, stay])
        np.testing.assert_array_equal(found[h, budget:], -1)
    assert (2, 2) in absent and len(newest) > P


def test_pooling_takes_the_neighbours_that_are_there():
    k, v, tick, place = ragged(np.random.default_rng(5))
    keep = InfiniPotV(40, room=k.shape[1] - 40, grid=GRID, tar=0.6, query=0.3, pool=True)
    score = eqx.filter_jit(lambda keep, memory: keep.score(memory))
    memories = keep.settle((held(keep, k, v, tick, place),) * 4)
    vision = place[0].all(-1)
    rank, order = np.unique(tick[0] * vision, return_inverse=True)[1], np.cumsum(vision)
    for layer, memory in enumerate(memories):
        found = np.asarray(score(keep, memory))
        for i in np.flatnonzero(vision):
            near = np.abs(place[0] - place[0, i]).max(-1) <= 1
            near = {
                0: near & (abs(rank - rank[i]) <= 1), 1: near & (rank == rank[i]), 2: abs(order - order[i]) <= 1,
                3: np.arange(len(vision)) == i,
            }[layer]  # fmt: skip
            np.testing.assert_allclose(found[:, i], np.linalg.norm(v[:, near & vision], axis=-1).mean(1), rtol=1e-5)


@pytest.fixture(scope="module")
def model():
    small = Config(vocab=64, width=16, layers=2, heads=2, kv_heads=1, hidden=16, rope_base=1000.0)
    return eqx.filter_jit(VideoQA)(small, key=KEY)


def test_it_lives_on_a_stream(model):
    """The memory is full again and again; a standing question stays, and never more is held than there is room."""
    watcher = Watcher(model, InfiniPotV(6 * 16, room=2 * 16 + 3, pool=True))
    step, tell = eqx.filter_jit(Watcher.step), eqx.filter_jit(Watcher.tell)
    state, _ = tell(watcher, watcher.init(), question(BACK, 2))
    rng, live = np.random.default_rng(0), []
    for t in range(24):
        state, said = step(watcher, state, jnp.asarray(rng.uniform(size=(16, 16)), jnp.float32))
        live.append([int(m.live[0]) for m in state.memory])
        for m in state.memory:
            position, n = np.asarray(m.position[0]), live[-1][0]
            assert (np.diff(position[:n]) >= 0).all() and (position[n:] == -1).all()
            assert position[:3].tolist() == [0, 1, 2] and (position == t + 3).sum() == 16
    assert np.array(live).max() == 6 * 16 + 2 * 16 + 3 and (np.array(live)[8:] >= 6 * 16).all()
    assert [int(m.own) for m in state.memory] == [3, 1] and bool(jnp.isfinite(said).all())
    for _ in range(40):  # text beyond all bounds: of equals the newest stay
        state, _ = tell(watcher, state, question(DIGIT))
    assert [int(m.live[0]) <= 6 * 16 + 35 for m in state.memory] == [True, True]
    assert not state.memory[0].place[0].any()


def test_with_room_for_all_it_is_the_full_memory(model):
    frames = jnp.asarray(np.random.default_rng(1).uniform(size=(6, 16, 16)), jnp.float32)
    run = eqx.filter_jit(lambda watcher: watcher.advance(watcher.init(), frames)[1])
    np.testing.assert_allclose(*(run(Watcher(model, keep(96, room=19))) for keep in (InfiniPotV, Window)), atol=1e-6)


def test_contract():
    tiny = Config(vocab=64, width=8, layers=1, heads=2, kv_heads=1, hidden=8, rope_base=1000.0)
    frames = jnp.asarray(np.random.default_rng(1).uniform(size=(10, 16, 16)), jnp.float32)
    report = contract.check(Watcher(eqx.filter_jit(VideoQA)(tiny, key=KEY), InfiniPotV(64, room=35)), frames, key=KEY)
    assert report.ok, str(report)


def test_bad_arguments_are_named():
    for arguments, said in (
        ({"tar": 1.5}, "tar must be in 0..1, got 1.5"),
        ({"query": -0.1}, "query must be in 0..1, got -0.1"),
        ({"grid": (0, 4)}, r"grid must be rows and columns of at least 1, got \(0, 4\)"),
        ({"query": 0.6}, "query must make 1 to 64 tokens the newest of 9 frames, got 0.6: 80"),
        ({"query": 0.1}, "query must make 1 to 64 tokens the newest of 9 frames, got 0.1: 0"),
    ):
        with pytest.raises(ValueError, match=said):
            InfiniPotV(128, room=16, **arguments)
    memory = InfiniPotV(128, room=16).empty(1, 4)
    with pytest.raises(ValueError, match="whose tokens have places: the memory was made with places=0"):
        memory.compressed()
