import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.claim import chi_square
from anabranch.decode.base import warp
from anabranch.decode.drafts import Drafted, NGram, Skip
from anabranch.decode.tetris import TetrisDecoder, example, select
from anabranch.models.llama import Config, Decoder, Llama

KEY = jax.random.PRNGKey(0)
SIZES = Config(vocab=7, width=16, layers=3, heads=4, kv_heads=2, hidden=24, rope_base=100.0)


@pytest.fixture(scope="module")
def target():
    return Decoder(jax.tree.map(lambda x: 6 * x, Llama(SIZES, key=KEY)), size=32)


def drawn(seed, *shape):
    return np.log(np.random.default_rng(seed).uniform(0.05, 1, shape)).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_lengths_are_those_of_the_authors_rule(seed):
    logp, capacity = drawn(seed, 6, 5), 12
    flat = logp.cumsum(1).ravel()
    best = np.argsort(-flat, kind="stable")[:capacity]
    wanted = np.zeros(6, int)  # theirs leaves a row without any selected token as it was: here it is 0
    np.maximum.at(wanted, best // 5, best % 5 + 1)
    found = select(jnp.asarray(logp), capacity)
    np.testing.assert_array_equal(found, wanted)
    assert found.sum() == capacity


def test_no_other_lengths_promise_more():
    logp = drawn(7, 4, 4)
    survive = np.pad(np.exp(logp.cumsum(1)).cumsum(1), ((0, 0), (1, 0)))
    promise = lambda lengths: survive[np.arange(4), np.asarray(lengths)].sum()
    for capacity in (3, 8, 11):
        best = max(promise(l) for l in itertools.product(range(5), repeat=4) if sum(l) <= capacity)
        assert promise(select(jnp.asarray(logp), capacity)) == pytest.approx(best, rel=1e-6)


def test_edges():
    logp = jnp.asarray(drawn(3, 3, 4))
    assert select(logp, 0).tolist() == [0, 0, 0] and select(logp, 100).tolist() == [4, 4, 4]
    sure = jnp.zeros((2, 3))  # ties: the earlier token, then the earlier stream
    assert select(sure, 3).tolist() == [2, 1] and select(sure, 4).tolist() == [2, 2]
    broken = jnp.array([[-0.1, jnp.nan, -0.1], [-jnp.inf, -0.1, -0.1], [-0.1, 0.3, -0.1]])
    assert select(broken, 9).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="capacity must not be negative, got -1"):
        select(logp, -1)


def test_the_prefix_score_does_not_look_at_the_token_itself():
    logp, top = jnp.log(jnp.array([[0.5, 0.01], [0.4, 0.9]])), jnp.log(jnp.array([[0.5, 0.99], [0.6, 0.9]]))
    # .5, .5 · .99 and .6, .4 · .9; by the token's own chances .5, .5 · .01 and .4, .4 · .9
    assert select(logp, 3, top).tolist() == [2, 1]
    assert select(logp, 3).tolist() == [1, 2]


PROMPTS = jnp.array([[1, 2, 3, 1, 2, 3, 1, 2], [5, 4, 5, 4, 0, 0, 0, 0], [6, 3, 2, 1, 4, 4, 0, 0]])
N = jnp.array([8, 4, 6])


@pytest.mark.parametrize("draft", ["ngram", "skip"])
def test_greedy_every_text_is_what_the_model_says_alone(target, draft):
    draft = NGram(32) if draft == "ngram" else Skip(target, 1, 2)
    cell = TetrisDecoder(target, draft, streams=3, window=2, extra=2)
    state, said = cell.begin(cell.init(), PROMPTS, N), [[], [], []]
    step, lengths, many = eqx.filter_jit(cell.step), eqx.filter_jit(lambda s: cell.lengths(cell.propose(s))), []
    for _ in range(28):
        many.append(lengths(state))
        state, out = step(state, None)
        for i in range(3):
            said[i] += out.tokens[i][: out.n[i]].tolist()
    for i in range(3):
        text = PROMPTS[i][: N[i]].tolist()
        assert len(said[i]) == 32 - len(text) + 1  # until its memory is full
        logits = eqx.filter_jit(target.advance)(target.init(), jnp.array(text + said[i][:-1]))[1]
        assert said[i] == jnp.argmax(logits[len(text) - 1 :], -1).tolist()
    assert np.max(many) > 2 and np.sum(many, 1).max() <= 6  # more than the window: another text made room


def test_packed_rows_give_what_each_text_gives_alone(target):
    cell = TetrisDecoder(target, NGram(32), streams=3, window=2, extra=1)
    state = cell.begin(cell.init(), PROMPTS, N)
    drafted = Drafted(jnp.array([[3, 1, 2], [5, 4, 5], [1, 1, 1]]), jnp.array([3, 0, 2]), None, jnp.zeros((3, 3)))
    after, said = eqx.filter_jit(cell.verified)(state, drafted)
    for i in range(3):
        text = PROMPTS[i][: N[i]]
        whole = jnp.concatenate([text, drafted.tokens[i][: drafted.n[i]]])
        best = jnp.argmax(target.advance(target.init(), whole)[1], -1)[len(text) - 1 :]
        right = np.cumprod(np.asarray(drafted.tokens[i][: drafted.n[i]] == best[:-1])).sum()
        assert int(said.n[i]) == right + 1
        assert said.tokens[i][: right + 1].tolist() == best[: right + 1].tolist()
    np.testing.assert_array_equal(after.length, state.length + said.n)


def test_few_streams_draft_nothing_extra(target):
    cell = TetrisDecoder(target, NGram(32), streams=3, window=2, extra=2, least=4)
    assert cell.extra == 0 and cell.lengths(cell.propose(cell.init())).max() <= 2


RUNS = 10_000


def joint(target, score):
    """Chi-square of the first token of two texts and the second of the first, at T = 1, under a small capacity."""
    cell = TetrisDecoder(target, Skip(target, 1, 2), 2, window=1, extra=1, capacity=1, score=score, temperature=1.0)
    begun = cell.begin(cell.init(), jnp.array([[1, 2], [5, 3]]), jnp.array([2, 2]))

    def one(key):
        state = begun._replace(key=key)
        state, a = cell.step(state, None)
        _, b = cell.step(state, None)
        second = jnp.where(a.n[0] > 1, a.tokens[0, 1], b.tokens[0, 0])
        return (a.tokens[0, 0] * 7 + second) * 7 + a.tokens[1, 0]

    codes = jax.jit(jax.vmap(one))(jax.random.split(jax.random.PRNGKey(5), RUNS))
    p = lambda *text: np.exp(np.asarray(warp(target.advance(target.init(), jnp.array(text))[1][-1], 1.0), float))
    two = np.stack([p(1, 2)[i] * p(1, 2, i) for i in range(7)])
    return chi_square(np.bincount(codes, minlength=343), two[:, :, None] * p(5, 3))


def test_warm_the_prefix_score_is_exact_and_the_published_one_is_not(target):
    assert joint(target, "prefix") > 1e-3
    assert joint(target, "token") < 1e-6


def test_contract():
    report = contract.check(*example(), key=KEY)
    assert report.ok, str(report)


def test_bad_input_is_named(target):
    for name, value in (("streams", 0), ("window", 0), ("extra", -1), ("capacity", -1), ("temperature", -1)):
        with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
            TetrisDecoder(target, NGram(32), **({"streams": 2} | {name: value}))
    with pytest.raises(ValueError, match="window \\+ extra must be below 32, got 33"):
        TetrisDecoder(target, NGram(32), 2, window=30, extra=3)
    with pytest.raises(ValueError, match="score must be"):
        TetrisDecoder(target, NGram(32), 2, score="heap")
