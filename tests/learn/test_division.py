import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.learn.division import (
    Codec,
    Division,
    Packed,
    batchnorm_div,
    conv2d_div,
    example,
    pool,
    relu_div,
    upsample,
)
from anabranch.models.resnet import BatchNorm2d, Conv2d, ReLU, ResNet, cross_entropy

KEY = jax.random.PRNGKey(0)


class Exact(Codec):
    """Keeps everything."""

    def compress(self, x, key):
        return x


def images(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_contract():
    report = contract.check(*example())
    assert report.ok, report


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (5, 9)])
def test_equals_a_transcription_in_numpy(bits, size):
    import ml_dtypes

    x = np.asarray(images((2, 3, *size)))
    packed = Codec(bits=bits).compress(jnp.asarray(x), None)
    H, W = size
    a, b = min(8, H), min(8, W)
    for n in range(2):
        for c in range(3):
            low = np.array(
                [[x[n, c, i * a : i * a + a, j * b : j * b + b].mean() for j in range(W // b)] for i in range(H // a)]
            )
            np.testing.assert_allclose(np.asarray(packed.low[n, c], np.float32), low, rtol=1e-2, atol=1e-6)
            kept = np.asarray(packed.low[n, c], np.float32)
            spread = [[kept[i * (H // a) // H, j * (W // b) // W] for j in range(W)] for i in range(H)]
            rest = x[n, c] - np.array(spread, np.float32)
            minimum = (rest.min() - abs(rest.min()) / np.float32(128)).astype(ml_dtypes.bfloat16)
            top = np.float32(2**bits - 1)
            step = ((rest.max() - np.float32(minimum)) / top * np.float32(1 + 1 / 128)).astype(ml_dtypes.bfloat16)
            assert float(packed.minimum[n, c]) == float(minimum) <= rest.min()
            assert float(packed.step[n, c]) == float(step)
            assert float(minimum) + float(top) * float(step) >= rest.max()  # nothing is clipped
            q = np.floor((rest - np.float32(minimum)) / np.float32(step) + np.float32(0.5)).astype(int).ravel()
            found = np.unpackbits(np.asarray(packed.levels[n, c]), bitorder="little").reshape(-1, bits)
            np.testing.assert_array_equal((found << np.arange(bits)).sum(1)[: H * W], q)


def test_a_map_comes_back_within_a_step_and_right_on_average():
    x, codec = images((2, 3, 28, 28)), Codec()
    back = jax.vmap(lambda key: codec.decompress(codec.compress(x, key)))(jax.random.split(KEY, 400))
    step = codec.compress(x, KEY).step.astype(jnp.float32)[..., None, None]
    assert (jnp.abs(back - x) <= step * 1.001).all()
    # The errors of the means are those of chance, over all pixels: a single one may lie next to a level.
    chance = back.var(0).mean() / 400
    assert 0.8 < float(((back.mean(0) - x) ** 2).mean() / chance) < 1.2


def test_small_and_constant_maps():
    codec = Codec()
    single = images((2, 3, 1, 1))
    assert codec.compress(single, KEY) is single
    constant = jnp.full((1, 1, 8, 8), 3.14159)
    np.testing.assert_allclose(codec.decompress(codec.compress(constant, KEY)), constant, rtol=2e-4)
    zero = jnp.zeros((1, 1, 8, 8))
    np.testing.assert_array_equal(codec.decompress(codec.compress(zero, KEY)), zero)


def test_pooling_is_that_of_torch():
    torch = pytest.importorskip("torch")
    for size in (8, 28, 32):
        x = np.asarray(images((2, 3, size, size)))
        low = torch.nn.functional.avg_pool2d(torch.tensor(x), 8)
        np.testing.assert_allclose(pool(jnp.asarray(x), 8), low, atol=1e-6)
        up = torch.nn.functional.interpolate(low, size=(size, size), mode="nearest")
        np.testing.assert_array_equal(upsample(jnp.asarray(low.numpy()), (size, size)), up)


def layers():
    scale = BatchNorm2d(jnp.array([1.0, 2.0, 0.5]), jnp.array([0.0, 1.0, -1.0]))
    return [(conv2d_div, Conv2d(images((4, 3, 3, 3)), 2)), (batchnorm_div, scale), (relu_div, ReLU())]


@pytest.mark.parametrize("divided, layer", layers())
def test_layers_that_keep_everything_have_the_exact_gradient(divided, layer):
    x = images((4, 3, 9, 9))
    expected = jax.grad(lambda layer, x: (layer(x) ** 3).sum(), (0, 1))(layer, x)
    found = jax.grad(lambda layer, x: (divided(Exact(), layer, x, KEY) ** 3).sum(), (0, 1))(layer, x)
    np.testing.assert_array_equal(divided(Codec(), layer, x, KEY), layer(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, expected)


def test_a_convolution_has_an_exact_gradient_to_its_input_and_an_unbiased_one_to_its_weights():
    x, layer = images((4, 3, 16, 16)), Conv2d(images((4, 3, 3, 3)))
    target = images((4, 4, 16, 16), 1)
    exact = jax.grad(lambda layer, x: (layer(x) * target).sum(), (0, 1))(layer, x)

    @jax.vmap
    def drawn(key):
        return jax.grad(lambda layer, x: (jnp.asarray(conv2d_div(Codec(), layer, x, key)) * target).sum(), (0, 1))(
            layer, x
        )

    weights, inputs = drawn(jax.random.split(KEY, 500))
    np.testing.assert_allclose(inputs[0], exact[1], rtol=1e-5, atol=1e-5)
    error = np.asarray(weights.weight.mean(0) - exact[0].weight)
    z = error / (np.asarray(weights.weight.std(0)) / np.sqrt(500))
    assert np.abs(z).max() < 4.5 and 0.7 < np.sqrt((z**2).mean()) < 1.3


def test_a_network():
    net = ResNet(8, (4, 8, 16), key=KEY)
    batch = images((8, 1, 32, 32)), jnp.arange(8) % 10
    division, exact = Division(cross_entropy), Division(cross_entropy, Exact())
    loss, grads = eqx.filter_jit(division.value_and_grad)(net, batch, KEY)
    expected, true = eqx.filter_jit(jax.value_and_grad(cross_entropy))(net, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(true)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(true), strict=True):
        if a.ndim == 4:
            assert float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.8
    again = eqx.filter_jit(division.value_and_grad)(net, batch, jax.random.PRNGKey(1))[1]
    assert (np.asarray(again.stem[0].weight) != np.asarray(grads.stem[0].weight)).any()
    assert division.activation_bytes(net, batch) < 0.12 * exact.activation_bytes(net, batch)


def test_bytes_by_hand():
    # One convolution of 1 channel, 16 x 16: 4 means, 64 bytes of levels, minimum and step, for each image.
    batch = jnp.zeros((4, 1, 16, 16)), jnp.zeros((4, 1, 16, 16))

    def loss(model, batch, key):
        return (model(batch[0]) * 2).sum()

    kept = Division(loss).activation_bytes(Conv2d(jnp.ones((1, 1, 3, 3))), batch)
    assert kept == 4 * (4 * 2 + 64 + 4)
    packed = Codec().compress(batch[0], KEY)
    assert isinstance(packed, Packed) and packed.levels.shape == (4, 1, 64)


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"block": 0}])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Codec(**wrong)
