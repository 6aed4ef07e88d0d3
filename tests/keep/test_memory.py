"""Memories of attention that forget."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.keep.memory import H2O, KeyNorm, Random, Sinks, SnapKV, ValueNorm, Window
from anabranch.models.llama import Config, Decoder, Llama, rope

CONFIG = Config(vocab=37, width=24, layers=2, heads=6, kv_heads=2, hidden=40, rope_base=1000.0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, 48), jnp.int32)
POLICIES = [
    Window(12, room=4), Sinks(12, 2, room=4), H2O(12, 4, room=4), H2O(12, 4, fair=True, room=4), SnapKV(12, 4, room=4),
    KeyNorm(12, room=4), ValueNorm(12, room=4), Random(12, room=4),
]  # fmt: skip
advance = eqx.filter_jit(Decoder.advance)


@pytest.fixture(scope="module")
def llama():
    return jax.tree.map(lambda x: 4 * x, eqx.filter_jit(Llama)(CONFIG, key=jax.random.PRNGKey(0)))


def streamed(cell, tokens, chunk=4):
    """The state after a stream in chunks, and all logits."""
    state, found = cell.init(), []
    for i in range(0, len(tokens), chunk):
        state, logits = advance(cell, state, tokens[i : i + chunk])
        found.append(logits)
    return state, jnp.concatenate(found)


@pytest.mark.parametrize("keep", POLICIES, ids=lambda keep: type(keep).__name__)
def test_memory_is_bounded_sorted_and_what_it_held_is_unchanged(llama, keep):
    state, logits = streamed(Decoder(llama, keep=keep), TOKENS)
    for held in state.memory:
        position = np.asarray(held.position)
        assert position.shape == (2, 16) and (held.live <= 16).all() and (held.live >= 12).all()
        for row, live in zip(position, held.live.tolist(), strict=True):
            assert (np.diff(row[:live]) > 0).all() and (row[live:] == -1).all()
            if isinstance(keep, Window):
                assert (row[:live][-4:] == np.arange(44, 48)).all()
        if isinstance(keep, Sinks):
            assert (position[:, :2] == [0, 1]).all()
    assert bool(jnp.isfinite(logits).all())


@pytest.mark.parametrize("compact", [True, False])
def test_with_room_for_all_it_is_the_full_memory(llama, compact):
    for keep in (H2O(44, 4, room=8, compact=compact), Sinks(44, 2, room=8, compact=compact)):
        _, logits = streamed(Decoder(llama, keep=keep), TOKENS, 8)
        np.testing.assert_allclose(logits, llama(TOKENS), atol=2e-4)


def test_a_window_with_sinks_is_a_masked_pass(llama):
    """One layer, positions as they came: what is visible is known beforehand."""
    one = jax.tree.map(lambda x: x[:1], llama.blocks)
    config = Config(**{**vars(CONFIG), "layers": 1})
    block = eqx.tree_at(lambda b: b, jax.tree.map(lambda x: x[0], one), jax.tree.map(lambda x: x[0], one))
    model = eqx.tree_at(lambda m: m.blocks, llama, one)
    object.__setattr__(model, "config", config)
    cell = Decoder(model, keep=Sinks(10, 2, room=1, compact=False))
    _, logits = streamed(cell, TOKENS[:24], 1)

    t = jnp.arange(24)
    visible = (t <= t[:, None]) & ((t < 2) | (t > t[:, None] - 9))  # ten are kept and one comes: two, eight, and itself
    h = llama.embedding[TOKENS[:24]]
    q, k, v = block.qkv(h, t)
    score = jnp.einsum("tkgd,skd->kgts", q.reshape(24, 2, 3, 4), k) / 2
    share = jax.nn.softmax(jnp.where(visible, score, -jnp.inf))
    attended = jnp.einsum("kgts,skd->tkgd", share, v).reshape(24, -1)
    wanted = cell.logits(block.close(h, attended))
    np.testing.assert_allclose(logits, wanted, atol=2e-4)


def test_attention_is_conserved(llama):
    """Every query gives each of its heads a whole of attention."""
    memory = H2O(6, 2, room=3).empty(2, 4)
    rng, rotate = np.random.default_rng(1), lambda x, at: rope(x, at, CONFIG.frequencies)
    extend = jax.jit(lambda memory, q, kv, at: memory.extend(q, kv, kv, at, rotate))
    for t in range(0, 21, 3):
        before = memory.compressed() if int(memory.live[0]) + 3 > 9 else memory
        q, kv = rng.normal(size=(3, 6, 4)).astype(np.float32), rng.normal(size=(3, 2, 4)).astype(np.float32)
        _, memory = extend(memory, q, kv, t + np.arange(3))
        np.testing.assert_allclose(memory.last.sum(-1), 9, rtol=1e-5)  # three queries, three heads each
        np.testing.assert_allclose(memory.mass.sum(-1) - before.mass.sum(-1), 9, rtol=1e-5)


def test_what_got_most_attention_stays():
    memory = H2O(4, 1, room=4).empty(1, 2)
    held = eqx.tree_at(
        lambda m: (m.position, m.mass),
        memory,
        (jnp.arange(8)[None], jnp.array([[5.0, 0.1, 3.0, 0.2, 4.0, 0.3, 0.4, 0.0]])),
    )
    assert held.compressed().position[0].tolist() == [0, 2, 4, 7, -1, -1, -1, -1]


def test_neighbours_of_what_matters_stay_with_it():
    memory = SnapKV(4, 1, 3, room=4).empty(1, 2)
    last = jnp.array([[0.0, 9.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    held = eqx.tree_at(lambda m: (m.position, m.last), memory, (jnp.arange(8)[None], last))
    assert held.compressed().position[0].tolist() == [0, 1, 2, 7, -1, -1, -1, -1]


def test_what_stays_anyway_lends_its_neighbours_nothing():
    memory = SnapKV(4, 1, 3, room=4).empty(1, 2)
    last = jnp.array([[0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 30.0]])
    held = eqx.tree_at(lambda m: (m.position, m.last), memory, (jnp.arange(8)[None], last))
    assert held.compressed().position[0].tolist() == [0, 1, 2, 7, -1, -1, -1, -1]


def test_a_layer_may_have_a_budget_of_its_own():
    """One static size, of which a layer uses as much as its budget says; none of it beyond is live."""
    held = eqx.tree_at(lambda m: (m.position, m.budget), Window(6, room=2).empty(1, 2), (jnp.arange(8)[None], 3))
    assert held.compressed().position[0].tolist() == [5, 6, 7, -1, -1, -1, -1, -1]


def test_streams_side_by_side_are_each_alone(llama):
    cell = Decoder(llama, keep=H2O(8, 2, room=2))
    texts = TOKENS.reshape(3, 16)
    run = lambda text: jax.lax.scan(lambda state, x: cell.step(state, x), cell.init(), text)[1]
    together = jax.jit(jax.vmap(run))(texts)
    for text, found in zip(texts, together, strict=True):
        np.testing.assert_allclose(streamed(cell, text, 1)[1], found, atol=1e-4)


def test_contract(llama):
    """When it forgets depends on how many tokens come at once, so that only as a stream it is always the same."""
    report = contract.check(Decoder(llama, keep=Sinks(8, 2, room=4)), TOKENS[:24], key=jax.random.PRNGKey(0))
    broken = [row.name for row in report.rows if row.verdict == "breaks"]
    assert set(broken) <= {"offline-equal"}, str(report)


def test_a_long_block_is_taken_as_room_allows(llama):
    cell = Decoder(llama, keep=H2O(8, 2, room=4))
    _, wanted = streamed(cell, TOKENS[:22], 4)
    np.testing.assert_allclose(advance(cell, cell.init(), TOKENS[:22])[1], wanted, atol=1e-4)


def test_bad_arguments_are_named(llama):
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        Window(0)
    cell, x = Decoder(llama, keep=Window(8, room=2)), jnp.ones((3, 2, 4))
    with pytest.raises(ValueError, match="room=2 beside its budget takes no 3 tokens at once"):
        cell.init().memory[0].extend(x, x, x, jnp.arange(3), lambda x, at: x)
    with pytest.raises(AttributeError, match="is Window, which has no size"):
        _ = cell.size


def test_a_memory_that_forgets_takes_no_filled_up_text():
    sizes = Config(vocab=11, width=8, layers=1, heads=2, kv_heads=1, hidden=8)
    cell = Decoder(Llama(sizes, key=jax.random.PRNGKey(0)), keep=Sinks(8, room=4))
    with pytest.raises(TypeError, match="prefill fills a text up, which Sinks would remember: use advance"):
        cell.prefill(cell.init(), jnp.arange(4), jnp.int32(2))
