"""The protocol of text: what is told where, what is lost, and what is still known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.keep.memory import Window
from anabranch.keep.text import LINE, library, rank, read, retention, tell
from anabranch.models.llama import Config, Decoder, Llama


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture(scope="module")
def told():
    return tell(encode("The quick brown fox. " * 9), encode, places=[30, 140], length=192)


@pytest.fixture(scope="module")
def llama():
    sizes = Config(vocab=256, width=16, layers=2, heads=4, kv_heads=2, hidden=24)
    return jax.tree.map(lambda x: 4 * x, Llama(sizes, key=jax.random.PRNGKey(0)))


def test_facts_are_told_where_they_should_be(told):
    text = bytes(told.tokens.tolist()).decode()
    for i, place in enumerate((30, 140)):
        question, answers = (
            bytes(x.ravel().tolist()).decode() for x in (told.facts.question[i], told.facts.candidates[i])
        )
        line = text[told.facts.start[i] : told.facts.stop[i]]
        assert told.facts.start[i] == place and line == question + answers[:6] + ".\n" and line.count("\n") == 2
        assert len({answers[j : j + 6] for j in range(0, 48, 6)}) == 8
    assert len(text) == 192 and text.replace(text[30 : told.facts.stop[0]], "").startswith("The quick brown fox. The")
    names = [bytes(q.tolist()) for q in told.facts.question]
    assert len(set(names)) == 2


def test_the_loss_is_that_of_the_whole_model(told, llama):
    _, losses = read(Decoder(llama, 192), jnp.asarray(told.tokens), 32)
    logits = jax.nn.log_softmax(llama(jnp.asarray(told.tokens)))
    wanted = -np.asarray(logits)[np.arange(191), told.tokens[1:]]
    np.testing.assert_allclose(losses, wanted, atol=1e-3)


def test_who_would_say_the_answer_knows_it(told, llama):
    """Ranks are those of whole texts, and an answer that the model prefers is ranked first."""
    cell = Decoder(llama, 256)
    state, _ = read(cell, jnp.asarray(told.tokens), 32)
    found = rank(cell, state, told.facts)
    for i in range(2):
        said = []
        for answer in told.facts.candidates[i]:
            text = np.concatenate([told.tokens, told.facts.question[i], answer])
            logits = np.asarray(jax.nn.log_softmax(llama(jnp.asarray(text))))[-7:-1]
            said.append(logits[np.arange(6), answer].sum())
        assert found[i] == (np.array(said[1:]) >= said[0]).sum()
        best = np.argsort(said)[::-1]
        turned = told.facts._replace(candidates=told.facts.candidates[:, best])
        assert rank(cell, state, turned)[i] == 0


def test_what_a_window_holds_is_retained(told, llama):
    state, _ = read(Decoder(llama, keep=Window(64, room=32)), jnp.asarray(told.tokens), 32)
    np.testing.assert_array_equal(retention(state, told.facts), [[0, 0], [1, 1]])


def test_bad_passages_are_named(llama):
    with pytest.raises(ValueError, match="a fact at 31 would begin before the one at 30 has ended"):
        tell([1] * 99, encode, places=[30, 31], length=150)
    with pytest.raises(ValueError, match="must make 500 tokens, got"):
        tell([1] * 99, encode, places=[30], length=500)
    with pytest.raises(ValueError, match=r"names for \d+ facts, got 999"):
        tell([1] * 99, encode, places=range(0, 99_900, 100), length=500)
    with pytest.raises(ValueError, match="whole chunks of 7, got 99"):
        read(Decoder(llama, 128), jnp.ones(99, jnp.int32), 7)


def test_the_library_is_the_same_each_time():
    assert library() == library() and len(library()) > 1e6 and LINE not in library()
