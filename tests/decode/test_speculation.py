"""What speculation says is distributed as what the model says alone."""

from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.cell import noise
from anabranch.claim import chi_square
from anabranch.decode.base import warp
from anabranch.decode.drafts import Draft, Drafted, NGram, Skip, Surer
from anabranch.decode.speculation import Speculative, verify, verify_greedy, verify_multi
from anabranch.models.llama import Config, Decoder, Llama

V, W, RUNS = 8, 3, 200_000
KEY = jax.random.PRNGKey(0)
table = lambda use: 1.5 * jax.random.normal(noise(KEY, 0, use), (V, V, V))
P, Q = table("p"), table("q")
"""Logits of the next token by the two before it."""


def joint(p):
    """Exact probabilities of the first three tokens after 0, 0."""
    p = np.exp(np.asarray(jax.vmap(jax.vmap(p))(P), np.float64))
    return p[0, 0][:, None, None] * p[0][:, :, None] * p


def propose(key, context, rule, of):
    """W tokens of the draft, and log-probabilities of the model beside them."""
    a, b = context
    tokens, logq, logp = [], [], []
    for i in range(W):
        logq.append(rule(of[a, b])), logp.append(rule(P[a, b]))
        a, b = b, jax.random.categorical(noise(key, i, "draft"), logq[-1])
        tokens.append(b)
    return jnp.stack(tokens), jnp.stack(logq), jnp.stack([*logp, rule(P[a, b])])


@cache
def sampler(check, rule, length, same):
    def one(key):
        def round_(carry, i):
            out, at, context = carry
            mine = noise(key, i)
            tokens, logq, logp = propose(mine, context, rule, P if same else Q)
            n = jnp.int32(W) if length is None else length(mine, tokens, logq)
            said = check(mine, Drafted(tokens, n, logq, logq.max(-1)), logp)
            out = jax.lax.dynamic_update_slice(out, said.tokens, (at,))
            at = at + said.n
            return (out, at, (jnp.where(at > 1, out[at - 2], 0), out[at - 1])), said.n

        begun = jnp.zeros(3 + 3 * W, jnp.int32), jnp.int32(0), (jnp.int32(0), jnp.int32(0))
        (out, _, _), counts = jax.lax.scan(round_, begun, jnp.arange(3))
        return out[0] * V * V + out[1] * V + out[2], counts[0]

    return jax.jit(jax.vmap(one))


def run(seed, check, rule=jax.nn.log_softmax, length=None, same=False, runs=RUNS):
    """Counts of the first three tokens, and how many tokens each first round gave; `same`: the draft is the model."""
    codes, first = sampler(check, rule, length, same)(jax.random.split(jax.random.PRNGKey(seed), runs))
    return np.bincount(codes, minlength=V**3), np.asarray(first)


def careless(key, drafted, logp):
    """Draws from p, and not from the residual, after a refusal."""
    said = verify(key, drafted, logp)
    again = jax.random.categorical(noise(key, 0, "again"), logp[said.n - 1])
    return said._replace(tokens=said.tokens.at[said.n - 1].set(again))


def by_own(key, tokens, logq):
    """Drops what the draft found unlikely: this must not be."""
    return jnp.cumprod(logq[jnp.arange(W), tokens] > jnp.log(0.3)).sum()


def by_max(key, tokens, logq):
    return jnp.cumprod(logq.max(-1) > jnp.log(0.4)).sum()


def at_random(key, tokens, logq):
    return jax.random.randint(noise(key, 0, "length"), (), 0, W + 1)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_said_is_distributed_as_the_model(seed):
    assert chi_square(run(seed, verify)[0], joint(jax.nn.log_softmax)) > 1e-3


@pytest.mark.parametrize("length", [at_random, by_max])
def test_lengths_that_do_not_look_at_the_token_change_nothing(length):
    assert chi_square(run(2, verify, length=length)[0], joint(jax.nn.log_softmax)) > 1e-3


def test_warped_on_both_sides_it_is_distributed_as_the_warped_model():
    rule = partial(warp, temperature=0.8, top_p=0.8)
    assert chi_square(run(5, verify, rule)[0], joint(rule)) > 1e-3


def test_the_test_would_see_a_wrong_residual_and_a_length_that_looks_at_the_token():
    exact = joint(jax.nn.log_softmax)
    assert chi_square(run(1, careless)[0], exact) < 1e-6
    assert chi_square(run(1, verify, length=by_own)[0], exact) < 1e-6
    assert chi_square(run(1, verify, length=by_own, same=True)[0], exact) < 1e-6  # even where the draft is the model


def test_as_many_are_accepted_as_the_overlap_says():
    p, q = jnp.broadcast_to(P[1, 2], P.shape), jax.nn.log_softmax(Q[3, 4])
    overlap = float(jnp.minimum(jnp.exp(q), jax.nn.softmax(p[0, 0])).sum())

    def one(key):
        tokens = jax.random.categorical(noise(key, 0, "draft"), q, shape=(W,))
        drafted = Drafted(tokens, jnp.int32(W), jnp.broadcast_to(q, (W, V)), jnp.zeros(W))
        return verify(key, drafted, jnp.broadcast_to(jax.nn.log_softmax(p[0, 0]), (W + 1, V))).n - 1

    accepted = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, RUNS)))
    error = accepted.std() / RUNS**0.5
    assert abs(accepted.mean() - sum(overlap**i for i in range(1, W + 1))) < 3 * error


def test_a_draft_that_is_the_model_is_always_right_and_one_that_is_elsewhere_never():
    assert (run(6, verify, same=True, runs=RUNS)[1] == W + 1).all()
    p = jnp.where(jnp.arange(V) < 4, P[0, 0], -jnp.inf)
    logp, q = jax.nn.log_softmax(p), jax.nn.log_softmax(jnp.where(jnp.arange(V) < 4, -jnp.inf, P[0, 1]))

    def one(key):
        tokens = jax.random.categorical(noise(key, 0, "draft"), q, shape=(W,))
        drafted = Drafted(tokens, jnp.int32(W), jnp.broadcast_to(q, (W, V)), jnp.zeros(W))
        return verify(key, drafted, jnp.broadcast_to(logp, (W + 1, V)))

    said = jax.jit(jax.vmap(one))(jax.random.split(KEY, 20_000))
    assert (said.n == 1).all()
    assert chi_square(np.bincount(said.tokens[:, 0], minlength=V), jnp.exp(logp)) > 1e-3


@pytest.mark.parametrize("drawn", [True, False])
def test_several_candidates_for_one_place(drawn):
    logp, logq = jax.nn.log_softmax(P[0, 0]), jax.nn.log_softmax(jnp.stack([Q[0, 0], Q[1, 1], P[0, 1]]))

    def one(key):
        if drawn:
            tokens = jax.vmap(jax.random.categorical)(jax.random.split(noise(key, 0, "draft"), 3), logq)
        else:
            tokens = jnp.array([2, 5, 2])
        return verify_multi(key, tokens, logq if drawn else None, logp)

    which, token = jax.jit(jax.vmap(one))(jax.random.split(jax.random.PRNGKey(7), RUNS))
    assert chi_square(np.bincount(token, minlength=V), jnp.exp(logp)) > 1e-3
    shares = np.bincount(np.asarray(which) + 1, minlength=4) / RUNS
    if drawn:  # the first is accepted as often as the two overlap
        assert shares[1] == pytest.approx(float(jnp.minimum(jnp.exp(logp), jnp.exp(logq[0])).sum()), abs=0.005)
    else:
        assert shares[3] == 0 and shares[1] == pytest.approx(float(jnp.exp(logp[2])), abs=0.005)


def test_greedy_is_verification_of_a_model_that_is_sure():
    tokens, best = jnp.array([[3, 1, 4], [3, 1, 4], [3, 1, 4]]), jnp.array([[3, 1, 4, 1], [3, 2, 4, 1], [3, 1, 4, 1]])
    n = jnp.array([3, 3, 1])
    drafted = Drafted(tokens, n, None, jnp.zeros((3, W)))
    quick = jax.vmap(verify_greedy)(drafted, best)
    slow = jax.vmap(verify)(jax.random.split(KEY, 3), drafted, jnp.log(jax.nn.one_hot(best, V)))
    assert quick.n.tolist() == slow.n.tolist() == [4, 2, 2]
    for i, wanted in enumerate(([3, 1, 4, 1], [3, 2], [3, 1])):
        assert quick.tokens[i][: quick.n[i]].tolist() == slow.tokens[i][: slow.n[i]].tolist() == wanted


# Drafts, and the cell


@pytest.fixture(scope="module")
def target():
    sizes = Config(vocab=11, width=16, layers=3, heads=4, kv_heads=2, hidden=24, rope_base=100.0)
    return Decoder(jax.tree.map(lambda x: 6 * x, Llama(sizes, key=KEY)), size=40)


step, target_step = eqx.filter_jit(Speculative.step), eqx.filter_jit(Decoder.step)


def alone(target, prompt, n):
    """What the model says without a draft."""
    state, logits = target.advance(target.init(), jnp.asarray(prompt))
    out, last = [], logits[-1]
    for _ in range(n):
        out.append(int(jnp.argmax(last)))
        state, last = target_step(target, state, jnp.int32(out[-1]))
    return out


def say(cell, prompt, n, key=None):
    state, out, counts = cell.begin(cell.init(key=key), jnp.asarray(prompt), len(prompt)), [], []
    while len(out) < n:
        state, said = step(cell, state)
        counts.append(int(said.n))
        out += said.tokens[: said.n].tolist()
    return out[:n], counts


PROMPT = [1, 2, 3, 1, 2, 3, 1]


def drafts(target):
    return {"ngram": NGram(40), "skip": Skip(target, 1, 2), "surer": Surer(Skip(target, 1, 2), NGram(40), 11)}


@pytest.mark.parametrize("name", ["ngram", "skip", "surer"])
def test_greedy_it_says_what_the_model_says_alone(target, name):
    cell = Speculative(target, drafts(target)[name], window=3)
    out, counts = say(cell, PROMPT, 20)
    assert out == alone(target, PROMPT, 20)
    assert max(counts) > 1


def test_contract(target):
    report = contract.check(Speculative(target, NGram(40), window=2), jnp.arange(12), key=KEY)
    assert report.ok, str(report)


def test_it_stops_where_the_memory_is_full(target):
    out, counts = say(Speculative(target, NGram(40), window=3), PROMPT, 40 - len(PROMPT) + 1)
    assert out == alone(target, PROMPT, 40 - len(PROMPT) + 1)
    cell = Speculative(target, NGram(40), window=3)
    state = cell.begin(cell.init(), jnp.asarray(PROMPT), 7)
    counts = []
    for _ in range(40):
        state, said = step(cell, state)
        counts.append(int(said.n))
    assert sum(counts) == 40 - len(PROMPT) + 1 and counts[-1] == 0


@pytest.mark.parametrize("name", ["skip", "surer"])
def test_warm_a_cell_says_what_the_model_would(target, name):
    cell = Speculative(target, drafts(target)[name], window=2, temperature=0.7)
    begun = cell.begin(cell.init(), jnp.array([5, 3]), 2)

    def one(key):
        state = begun._replace(key=key)
        state, a = cell.step(state, None)
        _, b = cell.step(state, None)
        two = jnp.where(a.n > 1, a.tokens[1], b.tokens[0])
        return a.tokens[0] * 11 + two

    codes = jax.jit(jax.vmap(one))(jax.random.split(jax.random.PRNGKey(3), 10_000))
    first = lambda text: jnp.exp(warp(target.advance(target.init(), jnp.array(text))[1][-1], 0.7))
    exact = jnp.stack([first([5, 3])[i] * first([5, 3, i]) for i in range(11)])
    assert chi_square(np.bincount(codes, minlength=121), exact) > 1e-3


def test_ngram_takes_the_longest_match_and_of_these_the_latest():
    draft = NGram(16, longest=2)
    read = lambda text: draft.read(draft.init(), jnp.array(text), jnp.zeros((len(text), 1)), len(text))
    guess = lambda text, w=3: draft.propose(read(text), KEY, w, None)
    assert guess([1, 2, 7, 4, 2, 5, 1, 2]).tokens.tolist() == [7, 4, 2]  # 1 2, though 2 alone came later
    assert guess([1, 2, 7, 1, 2, 8, 1, 2]).tokens[0] == 8
    assert int(guess([1, 2, 3]).n) == 0
    over = guess([4, 5, 4, 5])
    assert over.tokens.tolist() == [4, 5, 4] and int(over.n) == 3  # beyond the end it goes round


def test_ngram_learns_how_often_matches_of_each_length_are_right():
    draft = NGram(16, longest=2)
    text = jnp.array([1, 2, 1, 2, 1, 3])
    state = draft.read(draft.init(), text, jnp.zeros((6, 1)), 6)
    # No match before 1, 2, 1; then "1" foretells 2, "1 2" foretells 1, "2 1" foretells 2, which was 3.
    np.testing.assert_array_equal(state.tries, [2 + 3, 2 + 1, 2 + 2])
    np.testing.assert_array_equal(state.hits[1:], [1 + 1, 1 + 1])


def test_bad_input_is_named(target):
    for bad in (0, 40):
        with pytest.raises(ValueError, match=f"window must be at least 1 and below 40, got {bad}"):
            Speculative(target, NGram(40), window=bad)
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        Speculative(target, NGram(40), temperature=-1)
    with pytest.raises(ValueError, match="low and high must be layers of 3, got 2, 4"):
        Skip(target, 2, 4)
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        NGram(8, 0)
    with pytest.raises(NotImplementedError):
        Draft().init()
