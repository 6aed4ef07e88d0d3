import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.claim import chi_square
from anabranch.decode.base import warp
from anabranch.decode.drafts import NGram, Skip
from anabranch.decode.heads import FeatureDraft, Heads
from anabranch.decode.mirror_sd import MirrorDecoder, Overlapped, Times, example, mirror_plan
from anabranch.models.llama import Config, Decoder, Llama
from anabranch.plan import simulate

KEY = jax.random.PRNGKey(0)
SIZES = Config(vocab=7, width=16, layers=3, heads=4, kv_heads=2, hidden=24, rope_base=100.0)
PROMPT = jnp.array([1, 2, 3, 1, 2])
step = eqx.filter_jit(MirrorDecoder.step)


@pytest.fixture(scope="module")
def target():
    return Decoder(jax.tree.map(lambda x: 6 * x, Llama(SIZES, key=KEY)), size=32)


def say(cell, begun, n):
    state, out, hits = begun, [], []
    while len(out) < n:
        state, said = step(cell, state)
        out += said.tokens[: said.n].tolist()
        hits.append(bool(state.hit))
    return out[:n], hits


def heads():
    return Heads.random(SIZES, 8, jnp.array([0, 1, 2, 3, 5, 6]), (1, 2), key=KEY)


@pytest.mark.parametrize("kind", ["skip", "feature"])
def test_greedy_it_says_what_the_model_says_alone(target, kind):
    draft = Skip(target, 1, 2) if kind == "skip" else FeatureDraft(target, heads(), 32, pairs=True)
    cell = MirrorDecoder(target, draft, 2, window=3, foreseen=2, heads=None if kind == "skip" else heads())
    out, hits = say(cell, cell.begin(cell.init(), PROMPT, 5), 20)
    logits = eqx.filter_jit(Decoder.advance)(target, target.init(), jnp.concatenate([PROMPT, jnp.array(out[:-1])]))[1]
    assert out == jnp.argmax(logits[4:], -1).tolist()
    assert any(hits) and not all(hits)


def test_a_hit_gives_the_window_that_a_draft_after_verification_would_have_made(target):
    """Where a draft does not look at the model's features, mirroring changes nothing but when it guesses."""
    cell = MirrorDecoder(target, Skip(target, 1, 2), 2, window=3, foreseen=2)
    state = cell.begin(cell.init(), PROMPT, 5)
    for _ in range(8):
        state, _ = step(cell, state)
        anew = cell.anew(state.draft, state.key, state.round)
        np.testing.assert_array_equal(state.window.tokens, anew.tokens)


def test_the_reuse_rule(target):
    """The figure of the paper: two guesses are accepted; the window is reused if the third place foresaw what comes."""
    cell = MirrorDecoder(target, Skip(target, 1, 2), 2, window=3, foreseen=1)
    state = cell.begin(cell.init(), PROMPT, 5)
    session, logits = eqx.filter_jit(Decoder.advance)(target, target.init(), PROMPT)
    text = [int(jnp.argmax(logits[-1]))]
    for _ in range(3):
        session, logits = eqx.filter_jit(Decoder.step)(target, session, jnp.int32(text[-1]))
        text.append(int(jnp.argmax(logits)))
    window = state.window._replace(tokens=jnp.array([text[0], text[1], (text[2] + 1) % 7]), n=jnp.int32(3))
    state = state._replace(window=window)

    @eqx.filter_jit
    def round_(cell, state, foreseen):
        windows = cell.branches(state, foreseen)
        return cell.end(state, *cell.upper(state, cell.lower(state)), foreseen, windows), windows

    for third, hit in ((text[2], True), ((text[2] + 2) % 7, False)):
        foreseen = jnp.array([[text[0]], [text[1]], [third], [text[3]]])  # m1, m2, m4 do not matter
        (after, said), windows = round_(cell, state, foreseen)
        assert int(said.n) == 3 and said.tokens[:3].tolist() == text[:3]
        assert bool(after.hit) == hit
        if hit:
            np.testing.assert_array_equal(after.window.tokens, windows.tokens[2, 0])


def test_what_was_guessed_is_not_foreseen_as_its_own_correction(target):
    cell = MirrorDecoder(target, Skip(target, 1, 2), 2, window=3, foreseen=6)
    state = cell.begin(cell.init(), PROMPT, 5)
    foreseen = cell.lower(state).foreseen
    assert not (foreseen[:3] == state.window.tokens[:, None]).any()
    assert foreseen.shape == (4, 6)


def test_warm_it_says_what_the_model_would(target):
    cell = MirrorDecoder(target, Skip(target, 1, 2), 2, window=1, foreseen=3, temperature=0.8)
    runs = 10_000
    begun = cell.begin(cell.init(), jnp.array([1, 2]), 2)

    def one(key):
        state = begun._replace(key=key, window=cell.anew(begun.draft, key, begun.round))
        out, at, hits = jnp.zeros(6, jnp.int32), jnp.int32(0), jnp.int32(0)
        for _ in range(3):
            state, said = cell.step(state)
            out = jax.lax.dynamic_update_slice(out, said.tokens, (at,))
            at, hits = at + said.n, hits + state.hit
        return (out[0] * 7 + out[1]) * 7 + out[2], hits

    codes, hits = jax.jit(jax.vmap(one))(jax.random.split(jax.random.PRNGKey(5), runs))
    p = lambda *text: np.exp(np.asarray(warp(target.advance(target.init(), jnp.array(text))[1][-1], 0.8), float))
    three = np.stack([[p(1, 2)[i] * p(1, 2, i)[j] * p(1, 2, i, j) for j in range(7)] for i in range(7)])
    assert chi_square(np.bincount(codes, minlength=343), three) > 1e-3
    assert runs / 2 < int(hits.sum()) < 3 * runs  # reused windows are part of what was tested


def test_two_threads_give_what_one_program_gives(target):
    cell = MirrorDecoder(target, Skip(target, 1, 2), 2, window=3, foreseen=2)
    begun = cell.begin(cell.init(), PROMPT, 5)
    wanted, hits = say(cell, begun, 16)
    both, state, out, found = Overlapped(cell), begun, [], []
    while len(out) < 16:
        state, said = both.step(state)
        out += said.tokens[: said.n].tolist()
        found.append(bool(state.hit))
    both.close()
    assert (out[:16], found) == (wanted, hits)


def test_the_plan_takes_as_long_as_a_hand_simulation():
    times, hits = Times(0.4, 0.6, 0.7, 0.3), [True, False, True, True, False]
    now = times.anew
    for hit in hits:
        left = now + times.lower
        model, draft = left + times.upper, left + times.branches
        now = draft if hit else max(model, draft) + times.anew
        now = max(now, model)
    assert simulate(mirror_plan(times, hits)).makespan == pytest.approx(now)


def test_contract():
    report = contract.check(*example(), key=KEY)
    assert report.ok, str(report)


def test_bad_input_is_named(target):
    draft = NGram(32)
    for name, value in (("exit_layer", 3), ("exit_layer", 0), ("window", 0), ("window", 32), ("foreseen", 7)):
        with pytest.raises(ValueError, match=f"{name} must be from .*, got {value}"):
            MirrorDecoder(target, draft, **({"exit_layer": 2} | {name: value}))
    with pytest.raises(ValueError, match=r"layer must be one of those with an exit, \(1, 2\), got 3"):
        heads().exit(3)
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        MirrorDecoder(target, draft, 2, temperature=-1)
