import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.decode.heads import FeatureDraft, Frequent, Heads, unit
from anabranch.models.llama import Config, Decoder, Llama, int8

KEY = jax.random.PRNGKey(0)
SIZES = Config(vocab=29, width=16, layers=3, heads=4, kv_heads=2, hidden=24, rope_base=100.0)
IDS = jnp.array([1, 4, 9, 16, 25])


@pytest.fixture(scope="module")
def target():
    return Decoder(jax.tree.map(lambda x: 6 * x, Llama(SIZES, key=KEY)), size=32)


@pytest.fixture(scope="module")
def draft(target):
    heads = Heads.random(SIZES, 8, IDS, (1, 2), key=KEY)
    return FeatureDraft(target, jax.tree.map(lambda x: 4 * x if x.ndim == 2 else x, heads), 32)


def hidden(n):
    return jax.random.normal(jax.random.PRNGKey(n), (n, 16))


def test_what_is_read_in_parts_is_what_is_read_at_once(draft):
    tokens, h = jnp.arange(6) * 4 % 29, hidden(6)
    whole = draft.read(draft.init(), tokens, h, 6)
    first = draft.read(draft.init(), tokens, h, 2)  # the others do not count, and are read again
    parts = draft.read(first, tokens[2:], h[2:], 4)
    np.testing.assert_allclose(parts.feature, whole.feature, atol=1e-4)
    assert int(parts.length) == 6
    np.testing.assert_array_equal(draft.read(whole, tokens, h, 0).feature, whole.feature)


def test_to_follow_is_to_read_with_its_own_feature(draft):
    state = draft.read(draft.init(), jnp.array([3, 5]), hidden(2), 2)
    followed = draft.follow(state, jnp.int32(7))
    read = draft.read(state, jnp.array([7]), state.feature[None], 1)
    np.testing.assert_allclose(followed.feature, read.feature, atol=1e-5)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_guesses_are_frequent_tokens_and_what_they_were_drawn_from_is_given(target, draft, pairs, warm):
    draft = FeatureDraft(target, draft.heads, 32, pairs=pairs)
    state = draft.read(draft.init(), jnp.array([3, 5]), hidden(2), 2)
    said = draft.propose(state, KEY, 5, jax.nn.log_softmax if warm else None)
    assert said.tokens.shape == (5,) and set(said.tokens.tolist()) <= set(IDS.tolist()) and int(said.n) == 5
    if warm:
        assert said.logq.shape == (5, 29)
        np.testing.assert_allclose(jnp.exp(said.logq).sum(-1), 1, rtol=1e-5)
        assert jnp.isfinite(said.logq[jnp.arange(5), said.tokens]).all()
        np.testing.assert_allclose(said.sure, said.logq.max(-1), rtol=1e-6)
    else:
        assert said.logq is None


def test_a_pair_is_one_step_of_two_tokens(target, draft):
    draft = FeatureDraft(target, draft.heads, 32, pairs=True)
    state = draft.read(draft.init(), jnp.array([3, 5]), hidden(2), 2)
    said = draft.propose(state, KEY, 3, None).tokens
    best = lambda u: int(IDS[jnp.argmax(draft.frequent(u[None])[0])])
    first = best(state.feature)
    between = draft.heads.pair(draft.embedding[jnp.array([first])], state.feature[None])
    second = best(between[0])
    features = jnp.concatenate([state.feature[None], between])
    third = draft.read(state, jnp.array([first, second]), features, 2)
    assert said.tolist() == [first, second, best(third.feature)]


def test_the_frequent_rows_give_the_logits_of_the_model(target):
    h = hidden(3)
    exact = target.logits(h)[:, IDS]
    for model in (target, int8(target)):
        np.testing.assert_allclose(Frequent.of(model, IDS)(h), exact, atol=0.02 * float(jnp.abs(exact).max()))


def test_untrained_a_feature_stays_as_it_was(target):
    heads = Heads.random(SIZES, 8, IDS, (1, 2), key=KEY)
    h = hidden(4)
    np.testing.assert_allclose(unit(heads.exit(2)(h)), unit(h), atol=1e-5)
    np.testing.assert_allclose(heads.pair(h, unit(h)), unit(h), atol=1e-4)


def test_the_trained_heads_guess_what_smollm2_says(smollm2):
    from anabranch.decode.heads import smollm2_heads

    cell, text = smollm2
    heads = smollm2_heads()
    tokens = jnp.array(text.encode("The capital of France is Paris. The capital of Germany is Berlin. The capital of"))
    h, _ = cell.run_layers(cell.embedding[tokens], cell.init().memory, jnp.arange(len(tokens)))
    draft = FeatureDraft(cell, heads, 64)
    before = jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])
    at = jnp.arange(len(tokens))
    features, _ = heads.read(cell.embedding[tokens], unit(before), at, draft.init().memory.extend)
    guesses = heads.ids[jnp.argmax(draft.frequent(features), -1)]
    assert float((guesses == jnp.argmax(cell.logits(h), -1)).mean()) > 0.3
