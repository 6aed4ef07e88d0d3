import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.models.growing import GrowingEnsemble, GrowingMoE, MixtureLayer, size

D, C = 4, 3
KEY = jax.random.PRNGKey(0)


@pytest.fixture(scope="module")
def rows():
    return jnp.asarray(np.random.default_rng(0).normal(size=(30, D)), jnp.float32), jnp.ones(30, bool)


def test_a_share_is_the_product_along_the_path():
    layer = MixtureLayer(D, 2, 4, key=KEY)
    layer = layer.split(jnp.array([0.1, 0.9, 0.0, 0.0])).split(jnp.array([0.9, 0.1, 0.0, 0.0]))
    x = jnp.arange(1.0, 1.0 + D)
    stay, go = np.asarray(jax.nn.softmax(jax.vmap(lambda gate: gate(x))(layer.gates))).T
    by_hand = [stay[0] * stay[2], go[0] * stay[1], go[0] * go[1], stay[0] * go[2]]
    np.testing.assert_allclose(layer.shares(x), by_hand, atol=1e-6)
    experts = jax.nn.relu(jax.vmap(lambda expert: expert(x))(layer.experts))
    np.testing.assert_allclose(layer(x), np.asarray(by_hand) @ experts, rtol=1e-5)


def test_the_most_used_expert_is_split_and_rows_that_are_not_there_do_not_count(rows):
    x, _ = rows
    model = GrowingMoE(D, C, width=5, slots=4, key=KEY)
    shares = jax.vmap(model.layers[0].shares)(x)
    for expert in (0, 1):
        there = jnp.argmax(shares, 1) == expert
        grown = model.grow(x, there).layers[0]
        np.testing.assert_array_equal(grown.experts.weight[2], model.layers[0].experts.weight[expert])


def test_growth_of_a_mixture_does_not_change_the_function(rows):
    model = GrowingMoE(D, C, width=5, slots=4, key=KEY)
    grown, sizes = model, [float(size(model))]
    for _ in range(3):
        grown = grown.grow(*rows)
        sizes.append(float(size(grown)))
    assert [int(layer.n) for layer in grown.layers] == [4, 4]  # the third growth finds no slot
    np.testing.assert_allclose(jax.vmap(grown)(rows[0]), jax.vmap(model)(rows[0]), atol=1e-5)
    added = (5 * (D + 1) + 2 * (D + 1)) + (5 * 6 + 2 * 6)  # an expert and a gate in each layer
    assert np.diff(sizes).tolist() == [added, added, 0]


def test_slots_that_are_not_in_use_get_no_gradient(rows):
    model = GrowingMoE(D, C, width=5, slots=4, key=KEY).grow(*rows)
    grads = eqx.filter_grad(lambda model: (jax.vmap(model)(rows[0]) ** 2).sum())(model)
    for layer in grads.layers:
        assert (layer.experts.weight[3] == 0).all() and (layer.gates.weight[2] == 0).all()
        assert (layer.experts.weight[2] != 0).any() and (layer.gates.weight[1] != 0).any()


def test_an_ensemble_answers_by_the_mean_and_trains_its_last(rows):
    model = GrowingEnsemble(D, C, width=5, slots=2, key=KEY)
    x = rows[0][0]
    first = model.trained()
    np.testing.assert_allclose(model(x), first(x), rtol=1e-6)
    grown = model.grow(*rows)
    np.testing.assert_allclose(grown(x), first(x), rtol=1e-5)
    changed = jax.tree.map(lambda leaf: 2 * leaf if eqx.is_array(leaf) else leaf, grown.trained())
    after = grown.put(changed)
    np.testing.assert_allclose(after(x), (first(x) + changed(x)) / 2, rtol=1e-5)
    one = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(first, eqx.is_array)))
    assert [float(size(m)) for m in (model, grown, after.grow(*rows))] == [one, 2 * one, 2 * one]


def test_bad_arguments():
    with pytest.raises(ValueError, match="slots must be at least 2, got 1"):
        GrowingMoE(D, C, slots=1, key=KEY)
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        GrowingEnsemble(D, C, slots=0, key=KEY)
