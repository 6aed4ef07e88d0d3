"""The form of a language model that lives on a stream."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.layers.kv import KV, Grouped, Rows
from anabranch.models.llama import Config, Decoder, Llama, int8

CONFIG = Config(vocab=37, width=24, layers=3, heads=6, kv_heads=2, hidden=40, rope_base=1000.0)
advance, prefill, step = (eqx.filter_jit(f) for f in (Decoder.advance, Decoder.prefill, Decoder.step))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, 19), jnp.int32)


@pytest.fixture(scope="module")
def llama():
    return jax.tree.map(lambda x: 4 * x, eqx.filter_jit(Llama)(CONFIG, key=jax.random.PRNGKey(0)))


@pytest.fixture(scope="module")
def cell(llama):
    return Decoder(llama, size=24)


def test_contract(cell):
    report = contract.check(cell, TOKENS, key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


def test_all_at_once_in_chunks_and_one_by_one_are_the_same(llama, cell):
    wanted = llama(TOKENS)
    _, whole = advance(cell, cell.init(), TOKENS)
    np.testing.assert_allclose(whole, wanted, atol=1e-4)
    state, found = cell.init(), []
    for low, high in ((0, 8), (8, 16), (16, 19)):
        state, logits = advance(cell, state, TOKENS[low:high])
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found), wanted, atol=1e-4)
    _, singly = jax.jit(lambda xs: jax.lax.scan(lambda state, x: cell.step(state, x), cell.init(), xs))(TOKENS)
    np.testing.assert_allclose(singly, wanted, atol=1e-4)


def test_prefill_takes_the_first_n_and_gives_the_logits_after_them(cell):
    padded = jnp.concatenate([TOKENS[:11], jnp.full(5, 36)])
    state, logits = prefill(cell, cell.init(), padded, 11)
    plain, all_logits = advance(cell, cell.init(), TOKENS[:11])
    assert int(state.length) == 11
    np.testing.assert_allclose(logits, all_logits[-1], atol=1e-5)
    np.testing.assert_allclose(step(cell, state, TOKENS[11])[1], step(cell, plain, TOKENS[11])[1], atol=1e-5)


def test_going_back_is_as_if_it_had_never_been(cell):
    state, _ = advance(cell, cell.init(), TOKENS[:8])
    further, _ = advance(cell, state, TOKENS[8:])
    again, one = advance(cell, further._replace(length=state.length), TOKENS[3:9])
    _, other = advance(cell, state, TOKENS[3:9])
    np.testing.assert_array_equal(one, other)
    for a, b in zip(again.memory, state.memory, strict=True):
        np.testing.assert_array_equal(a.k[:, :8], b.k[:, :8])


def test_a_full_memory_gives_nan_and_keeps_what_it_holds(cell):
    state, _ = advance(cell, cell.init(), jnp.concatenate([TOKENS, TOKENS[:3]]))
    after, logits = advance(cell, state, TOKENS[:4])  # room for two of the four
    assert bool(jnp.isfinite(logits[:2]).all()) and bool(jnp.isnan(logits[2:]).all())
    np.testing.assert_array_equal(after.memory[1].k[:, :22], state.memory[1].k[:, :22])


def test_layers_may_be_run_in_parts(cell):
    positions = jnp.arange(19)

    @eqx.filter_jit
    def in_parts(cell):
        h, memory = cell.run_layers(cell.embedding[TOKENS], cell.init().memory, positions, 0, 2)
        return cell.logits(cell.run_layers(h, memory, positions, 2)[0])

    np.testing.assert_allclose(in_parts(cell), advance(cell, cell.init(), TOKENS)[1], atol=1e-5)


def test_streams_that_take_turns_equal_each_alone(llama, cell):
    texts = [TOKENS[:5], TOKENS[5:12], TOKENS[12:14]]
    rows = eqx.filter_jit(Decoder.rows)
    memory = tuple(Rows(jnp.zeros((4, 2, 24, 4)), jnp.zeros((4, 2, 24, 4))) for _ in range(3))
    found = {}
    for t in range(7):
        some = [i for i, text in enumerate(texts) if t < len(text)]
        pad = [4] * (3 - len(some))  # a stream that is none
        tokens = jnp.array([int(texts[i][t]) for i in some] + [0] * len(pad))
        positions = jnp.array([t] * len(some) + [0] * len(pad))
        memory, logits = rows(cell, memory, tokens, positions, jnp.array([3 - i for i in some] + pad))
        found |= {i: logits[j] for j, i in enumerate(some)}
    for i, text in enumerate(texts):
        np.testing.assert_allclose(found[i], llama(text)[-1], atol=1e-4)
    assert not bool(memory[0].k[0].any())


def test_texts_that_share_a_prefix_read_it_once_and_say_the_same(llama, cell):
    prefix, rest = TOKENS[:9], TOKENS[9:15].reshape(3, 2)
    state, _ = advance(cell, cell.init(), prefix)
    blank = lambda: jnp.zeros((3, 2, 6, 4))
    memory = [Grouped(KV(m.k[:, :9], m.v[:, :9]), Rows(blank(), blank())) for m in state.memory]

    @jax.jit
    def step(memory, tokens, positions):
        h, memory = cell.run_layers(cell.embedding[tokens], memory, positions)
        return memory, cell.logits(h)

    for t in range(2):
        memory, logits = step(memory, rest[:, t], jnp.full(3, 9 + t))
    for i in range(3):
        np.testing.assert_allclose(logits[i], llama(jnp.concatenate([prefix, rest[i]]))[-1], atol=1e-4)


def test_int8_is_close_and_rows_do_not_depend_on_each_other(llama, cell):
    small = int8(cell)
    _, exact = advance(cell, cell.init(), TOKENS)
    _, found = advance(small, small.init(), TOKENS)
    assert float(jnp.corrcoef(found.ravel(), exact.ravel())[0, 1]) > 0.999
    states = jax.vmap(lambda _: small.init())(jnp.arange(5))
    _, together = jax.jit(jax.vmap(small.step))(states, TOKENS[:5])
    alone = jnp.stack([step(small, small.init(), x)[1] for x in TOKENS[:5]])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert small.head.w.dtype == jnp.int8


def test_a_step_copies_no_memory(llama):
    """Donated, what attention remembers is updated in place: temporary arrays are far smaller."""
    big = Decoder(llama, 4096)
    states = jax.vmap(lambda _: big.init())(jnp.arange(8))
    donated = jax.jit(lambda states, x: jax.vmap(big.step)(states, x), donate_argnums=0)
    used = donated.lower(states, TOKENS[:8]).compile().memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(states))
    assert used.temp_size_in_bytes < 0.5 * held, (used.temp_size_in_bytes, held)


def test_bad_size_is_named(llama):
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Decoder(llama, 0)
