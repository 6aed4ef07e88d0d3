"""Flash-VStream against the arithmetic of the authors' code, derived again in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.keep.flash_vstream import (
    FlashVStream,
    Read,
    SemanticAttention,
    STARMemory,
    answer,
    example,
    weighted_kmeans,
)
from anabranch.models.video_qa import BACK, Config, VideoQA, question

KEY = jax.random.PRNGKey(0)
SMALL = Config(vocab=64, width=16, layers=2, heads=4, kv_heads=2, hidden=16, rope_base=1000.0)
write = eqx.filter_jit(STARMemory.write)


def official_kmeans(x, weight, start):
    """As `weighted_kmeans` of the code, without clusters that become empty."""
    c = x[start]
    for _ in range(10):
        label = np.sqrt(((x[:, None] - c[None]) ** 2).sum(2)).argmin(1)
        total = np.array([weight[label == j].sum() for j in range(len(start))])
        assert (total > 0).all()
        new = np.stack([(weight[label == j, None] * x[label == j]).sum(0) for j in range(len(start))]) / total[:, None]
        moved = np.linalg.norm(c - new, axis=1).sum()
        if moved < 1e-4:
            break
        c = new
    return c, total, label


@pytest.mark.parametrize(("n", "k"), [(26, 25), (70, 6)])
def test_kmeans_is_that_of_the_authors(n, k):
    rng = np.random.default_rng(n)
    x, weight = rng.normal(size=(n, 5)), rng.integers(1, 9, n).astype(float)
    start = rng.permutation(n)[:k]
    found = weighted_kmeans(jnp.float32(x), jnp.float32(weight), jnp.asarray(start), KEY)
    for a, b in zip(found, official_kmeans(x, weight, start), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_abstract_memory_is_that_of_the_authors():
    """The first frames fill it, blocks after that are mixed in; a block may do both."""
    memory = STARMemory(SemanticAttention(6, key=KEY), 4, clusters=3, grid=1, abstract=4)
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(12, 4, 6)).astype(np.float32)
    state, M = memory.init(), np.zeros((0, 6))
    wq, bq, wk, bk = (np.float64(x) for m in (memory.attention.q, memory.attention.k) for x in (m.weight, m.bias))
    for i in range(0, 12, 3):
        state = write(memory, state, frames[i : i + 3])
        rows = np.concatenate([M, frames[i : i + 3].mean(1, dtype=np.float64)])
        M, new = rows[:4], rows[4:]
        if len(new):
            score = (M @ wq.T + bq) @ (new @ wk.T + bk).T / np.sqrt(32)
            share = 0.2 * np.exp(score) / np.exp(score).sum(1, keepdims=True)
            M = M * (1 - share.sum(1, keepdims=True)) + share @ new
        np.testing.assert_allclose(state.abstract[: len(M)], M, atol=1e-6)
    one = SemanticAttention(6, key=KEY)(jnp.ones((4, 6)), jnp.full((1, 6), 2.0), jnp.array([True]))
    np.testing.assert_allclose(one, 1.2, rtol=1e-6)  # a single new token is mixed into all alike


@pytest.fixture(scope="module")
def scenes():
    """120 frames of scenes of five to ten, one of which comes again."""
    rng = np.random.default_rng(3)
    kinds = rng.normal(size=(9, 16, 8))
    numbers = np.repeat(rng.integers(0, 9, 30), rng.integers(5, 11, 30))[:120]
    return (kinds[numbers] + 0.2 * rng.normal(size=(120, 16, 8))).astype(np.float32)


@pytest.fixture(scope="module")
def memory():
    return STARMemory(SemanticAttention(8, key=KEY), 16, grid=2, abstract=5)


@pytest.fixture(scope="module")
def walked(memory, scenes):
    """States and what was read after each frame."""

    def step(state, x):
        state, read = memory.step(state, x)
        return state, (state, read)

    return jax.jit(lambda: jax.lax.scan(step, memory.init(key=KEY), scenes)[1])()


def pooled(frames):
    return frames.reshape(-1, 2, 2, 2, 2, 8).mean((2, 4)).reshape(-1, 4, 8)


def test_weights_and_means_are_those_of_all_frames(walked, scenes):
    state, _ = walked
    t = np.arange(1, 121)
    np.testing.assert_allclose(state.weight.sum(1), t, rtol=1e-5)
    share = state.weight / state.weight.sum(1, keepdims=True)
    mean = np.cumsum(pooled(scenes), 0) / t[:, None, None]
    np.testing.assert_allclose(jnp.einsum("tn,tnpd->tpd", share, state.centroid), mean, atol=1e-4)
    np.testing.assert_allclose((share * state.time).sum(1), (t - 1) / 2, atol=1e-3)
    assert ((state.weight > 0).sum(1)[25:] == 25).all() and float(state.weight[-1].max()) > 3


def test_without_weights_a_centroid_counts_as_one_frame(scenes):
    memory = STARMemory(SemanticAttention(8, key=KEY), 16, clusters=6, grid=2, abstract=5, weighted=False)
    state = memory.init(key=KEY)
    for i in range(0, 20, 5):
        state = write(memory, state, scenes[i : i + 5])
    assert float(state.weight.sum()) == 11  # six centroids and the last five frames


def test_frames_are_as_they_came_while_there_is_place(walked, scenes):
    _, read = walked
    tokens, there = read.tokens[4], np.asarray(read.there[4])
    assert there.sum() == 5 + 5 * 4 + 4 * 16 and there[:5].all() and not there[25:105].any()
    np.testing.assert_allclose(tokens[5:25], pooled(scenes[:5]).reshape(20, 8), atol=1e-6)
    np.testing.assert_allclose(tokens[:5], scenes[:5].mean(1), atol=1e-6)
    np.testing.assert_array_equal(tokens[-16:], scenes[4])
    time, y, x = np.asarray(read.positions[4]).T
    assert (time[:5] == 0).all() and time[5:25].tolist() == np.repeat(np.arange(1, 6), 4).tolist()
    assert y[:25].tolist() == [2.5] * 5 + [1.5, 1.5, 3.5, 3.5] * 5 and x[:25].tolist() == [2.5] * 5 + [1.5, 3.5] * 10
    assert time[-16:].tolist() == [5] * 16 and y[-16:].tolist() == np.repeat(np.arange(1, 5), 4).tolist()
    assert np.asarray(read.there).sum(1)[:2].tolist() == [1 + 4 + 2 * 16, 2 + 2 * 4 + 3 * 16]


def test_what_is_read_is_in_the_order_of_time(walked):
    _, read = walked
    time = np.asarray(read.positions)[20:, :, 0]
    assert (np.diff(time[10:, 5:105]) >= 0).all() and (np.diff(time[:, 105:153]) >= 0).all()
    assert (time[:, -1] == time.max(1)).all() and time.max() <= 25 + 4


def test_retrieved_frames_are_those_of_a_buffer_of_all(walked, scenes):
    """Nearly always: a frame that became the nearest after it had been dropped is missed."""
    state, read = walked
    same = []
    for t in range(25, 120):
        heaviest = np.argsort(-np.asarray(state.weight[t]), kind="stable")[:3]
        far = ((pooled(scenes[: t + 1])[:, None] - np.asarray(state.centroid[t])[heaviest]) ** 2).sum((2, 3))
        wanted, found = scenes[far.argmin(0)], np.asarray(read.tokens[t, 105:153]).reshape(3, 1, 16, 8)
        same.append((found == wanted).all((2, 3)).any(0))
    assert np.mean(same) >= 0.9


def test_frames_that_repeat_leave_places_free():
    memory = STARMemory(SemanticAttention(3, key=KEY), 4, clusters=3, grid=2, abstract=2)
    state = memory.init(key=KEY)
    weights = []
    for _ in range(5):
        state = write(memory, state, jnp.ones((1, 4, 3)))
        weights.append(sorted(state.weight.tolist()))
    assert weights[2:] == [[1, 1, 1], [0, 0, 4], [0, 1, 4]]
    assert all(bool(jnp.isfinite(x).all()) for x in memory.read(state) if x.dtype == jnp.float32)


def test_a_prompt_of_whole_frames_is_the_whole_clip():
    model = jax.tree.map(lambda x: 2 * x, eqx.filter_jit(VideoQA)(SMALL, key=KEY))
    frames = jax.random.uniform(KEY, (5, 16, 16))
    rounds = jnp.stack([jnp.append(question(BACK, n), 0) for n in (1, 3)])
    wanted = eqx.filter_jit(model)(frames, rounds, jnp.array([4, 4]), jnp.zeros(2, bool))[1][:, 2]
    place = 1 + np.stack(np.divmod(np.arange(16), 4), 1)
    positions = np.concatenate([np.repeat(np.arange(5), 16)[:, None], np.tile(place, (5, 1))], 1).astype(np.float32)
    tokens = jax.vmap(model.stem)(frames).reshape(80, -1)
    gap = jnp.zeros((3, 16)), np.full((3, 3), 99, np.float32)  # what is not there does nothing
    read = Read(jnp.concatenate([tokens, gap[0]]), jnp.concatenate([positions, gap[1]]), jnp.arange(83) < 80)
    found = eqx.filter_jit(lambda read, asked: jax.vmap(lambda x: answer(model, read, x))(asked))(read, rounds[:, :3])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_contract():
    report = contract.check(*example(), key=KEY)
    assert report.ok, str(report)


def test_it_watches_and_answers():
    model = eqx.filter_jit(VideoQA)(SMALL, key=KEY)
    watcher = FlashVStream(model, STARMemory(SemanticAttention(16, key=KEY), 16, clusters=4, grid=2, abstract=3))
    frames = jax.random.uniform(KEY, (9, 16, 16))
    state, _ = eqx.filter_jit(lambda: watcher.advance(watcher.init(), frames))()
    logits = eqx.filter_jit(watcher.ask)(state, question(BACK, 2))
    assert logits.shape == (64,) and bool(jnp.isfinite(logits).all())
    np.testing.assert_allclose(state.recent[0], model.stem(frames[-1]), atol=1e-5)


def test_bad_arguments_are_named(memory):
    for arguments, said in (
        ({"clusters": 0}, "clusters must be at least 1, got 0"),
        ({"clusters": 2}, "retrieved must be at most clusters=2, got 3"),
        ({"patches": 15}, "patches must be a square whose side is a multiple of grid=4, got 15"),
        ({"grid": 3}, "patches must be a square whose side is a multiple of grid=3, got 64"),
    ):
        with pytest.raises(ValueError, match=said):
            STARMemory(SemanticAttention(8, key=KEY), **arguments)
    with pytest.raises(ValueError, match="at most abstract=5 frames can come at once, got 6"):
        memory.write(memory.init(), jnp.zeros((6, 16, 8)))
    with pytest.raises(ValueError, match=r"16 patches of width 16, got \(16, 8\)"):
        FlashVStream(VideoQA(SMALL, key=KEY), memory)
