import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anabranch import contract
from anabranch.fit import Backprop, fit
from anabranch.learn.streambp import Pairs, Rollouts, StreamBP, dpo, example, grpo, next_tokens, xent
from anabranch.models.llama import Config, Llama

KEY = jax.random.PRNGKey(0)
CONFIG = Config(vocab=31, width=16, layers=2, heads=4, kv_heads=2, hidden=24)


def model(config=CONFIG):
    return jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, Llama(config, key=KEY))  # attention far from uniform


class Whole(eqx.Module):
    """What the losses are given, without chunks."""

    model: Llama

    def logps(self, tokens, labels):
        logits = jax.vmap(self.model)(tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.where(labels >= 0, -losses, 0.0)

    def xent(self, tokens, labels):
        return -self.logps(tokens, labels).sum() / jnp.maximum((labels >= 0).sum(), 1)


def text(length=21):
    tokens = jax.random.randint(jax.random.PRNGKey(1), (2, length), 0, 31)
    labels = next_tokens(tokens)
    return tokens, labels.at[1, 15:].set(-100).at[0, :3].set(-100)


def same(found, wanted, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.linalg.norm(a - b) <= tolerance * jnp.linalg.norm(b)


def batch_of(loss):
    tokens, labels = text()
    if loss is xent:
        return tokens, labels
    if loss is dpo:
        return Pairs(tokens[None], labels[None], jnp.array([[-50.0, -30.0]]))
    logps = Whole(model()).logps(tokens, labels)
    # Off the kinks of the clipped ratio, and on both sides of them.
    old = logps + jnp.where(jnp.arange(21) % 3 == 0, 0.5, 0.05)
    return Rollouts(tokens, labels, jnp.array([1.0, -0.7]), old, logps - 0.3)


def test_contract():
    report = contract.check(*example())
    assert report.ok, report


@pytest.mark.parametrize("chunk, logits_chunk", [(8, 6), (21, 64), (1, 1)])
@pytest.mark.parametrize("loss", [xent, dpo, grpo])
def test_gradients_are_exact(loss, chunk, logits_chunk):
    batch = batch_of(loss)
    streamed = StreamBP(loss, chunk=chunk, logits_chunk=logits_chunk)
    value, found = eqx.filter_jit(streamed.value_and_grad)(model(), batch, KEY)
    wanted_value, wanted = eqx.filter_value_and_grad(lambda m: loss(Whole(m), batch))(model())
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    same(found, wanted)


def test_a_head_of_its_own_has_its_own_gradient():
    untied = model(Config(vocab=31, width=16, layers=1, heads=2, kv_heads=2, hidden=24, tied=False))
    _, found = StreamBP(chunk=8).value_and_grad(untied, text(), KEY)
    same(found, eqx.filter_grad(lambda m: Whole(m).xent(*text()))(untied))


def test_nothing_to_learn_gives_zero():
    tokens, labels = text()
    value, grads = StreamBP(chunk=8).value_and_grad(model(), (tokens, jnp.full_like(labels, -100)), KEY)
    assert value == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


def test_it_needs_much_less_memory_than_the_plain_gradient():
    wide = Llama(Config(vocab=512, width=16, layers=4, heads=2, kv_heads=1, hidden=64), key=KEY)
    batch = text(1024)
    plain = Backprop(lambda m, batch, key: Whole(m).xent(*batch)).memory(wide, batch)
    assert StreamBP(chunk=64, logits_chunk=64).memory(wide, batch) < plain / 8


def test_fit_takes_it():
    _, history = fit(StreamBP(chunk=8), model(), text(), optax.adam(1e-2), 30, key=KEY)
    assert history["loss"][-1] < history["loss"][0] / 2


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="logits_chunk must be at least 1, got 0"):
        StreamBP(logits_chunk=0)
    with pytest.raises(TypeError, match="needs a Llama, got MLP"):
        StreamBP().value_and_grad(eqx.nn.MLP(2, 2, 2, 1, key=KEY), text(), KEY)
