import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.learn.division import (
    Codec,
    Division,
    Linear,
    MaxPool2d,
    Packed,
    batchnorm_div,
    dither,
    example,
    linear_div,
    maxpool_div,
    pack,
    pool,
    relu_div,
    unpack,
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


def smooth(shape, seed=0):
    """Images whose neighbouring pixels are alike, as those of cameras are."""
    coarse = images((*shape[:-2], shape[-2] // 16 + 1, shape[-1] // 16 + 1), seed)
    return jax.image.resize(coarse, shape, "cubic")


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


def test_dither_is_even_and_apart_from_values_to_come():
    drawn = np.asarray(dither(KEY, (3, 5, 7, 100)))
    assert drawn.shape == (3, 5, 7, 100) and 0 < drawn.min() and drawn.max() < 1
    found = np.bincount((drawn * 256).astype(int).ravel(), minlength=256)
    assert ((found - drawn.size / 256) ** 2).sum() / (drawn.size / 256) < 255 + 5 * np.sqrt(2 * 255)  # chi-squared
    pairs = np.corrcoef(drawn.ravel()[:-1], drawn.ravel()[1:])[0, 1]
    assert abs(pairs) < 5 / np.sqrt(drawn.size)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packing_is_undone(bits):
    level = np.random.default_rng(0).integers(0, 2**bits, (3, 21)).astype(np.uint8)
    packed = pack(jnp.asarray(level), bits)
    assert packed.shape == (3, -(-21 * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits)[:, :21], level)


def test_both_parts_of_a_map_are_needed():
    x = smooth((4, 3, 32, 32))

    def noise(codec):
        back = jax.vmap(lambda key: codec.decompress(codec.compress(x, key)))(jax.random.split(KEY, 50))
        return float(back.var(0).mean())

    spread = float(((x - upsample(pool(x, 8), (32, 32))) ** 2).mean())  # what is lost with the rest
    without_means = noise(Codec(block=32))  # one mean a map: it shifts the range and nothing else
    assert noise(Codec()) < 0.5 * without_means
    assert noise(Codec(bits=8)) < 1e-3 * spread


def test_nan_is_not_hidden():
    codec, x = Codec(), images((1, 2, 8, 8)).at[0, 1, 3, 3].set(jnp.nan)
    back = codec.decompress(codec.compress(x, KEY))
    assert jnp.isfinite(back[0, 0]).all() and jnp.isnan(back[0, 1]).all()


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
    linear = Linear(images((5, 12)), images((5,)))
    return [
        (linear_div, Conv2d(images((4, 3, 3, 3)), 2), (4, 3, 9, 9)),
        (linear_div, linear, (4, 12)),
        (linear_div, linear, (4, 20, 12)),
        (batchnorm_div, scale, (4, 3, 9, 9)),
        (relu_div, ReLU(), (4, 3, 9, 9)),
        (maxpool_div, MaxPool2d(), (4, 3, 10, 6)),
    ]


@pytest.mark.parametrize("divided, layer, shape", layers())
def test_layers_that_keep_everything_have_the_exact_gradient(divided, layer, shape):
    x = images(shape)
    expected = jax.grad(lambda layer, x: (layer(x) ** 3).sum(), (0, 1))(layer, x)
    found = jax.grad(lambda layer, x: (divided(Exact(), layer, x, KEY) ** 3).sum(), (0, 1))(layer, x)
    np.testing.assert_array_equal(divided(Codec(), layer, x, KEY), layer(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, expected)


def test_maxpool_is_that_of_torch():
    torch = pytest.importorskip("torch")
    x = np.asarray(jnp.round(images((2, 3, 8, 8))))  # with ties
    theirs = torch.tensor(x, requires_grad=True)
    torch.nn.functional.max_pool2d(theirs, 2).pow(3).sum().backward()
    found = jax.grad(lambda x: (jnp.asarray(maxpool_div(Codec(), MaxPool2d(), x, KEY)) ** 3).sum())(jnp.asarray(x))
    np.testing.assert_allclose(found, theirs.grad, atol=1e-5)


@pytest.mark.parametrize(
    "layer, shape, out",
    [
        (Conv2d(images((4, 3, 3, 3))), (4, 3, 16, 16), (4, 4, 16, 16)),
        (Linear(images((5, 40)), images((5,))), (16, 40), (16, 5)),
        (Linear(images((5, 6)), images((5,))), (4, 30, 6), (4, 30, 5)),
    ],
)
def test_linear_layers_have_an_exact_gradient_to_their_input_and_an_unbiased_one_to_their_weights(layer, shape, out):
    x, target = images(shape), images(out, 1)

    def loss(apply):
        return lambda layer, x: (apply(layer, x) * target).sum()

    exact = jax.grad(loss(lambda layer, x: layer(x)), (0, 1))(layer, x)

    @jax.jit
    @jax.vmap
    def drawn(key):
        return jax.grad(loss(lambda layer, x: linear_div(Codec(), layer, x, key)), (0, 1))(layer, x)

    layers, inputs = drawn(jax.random.split(KEY, 500))
    np.testing.assert_allclose(inputs[0], exact[1], rtol=1e-5, atol=1e-5)
    error = np.asarray(layers.weight.mean(0) - exact[0].weight)
    z = error / (np.asarray(layers.weight.std(0)) / np.sqrt(500))
    assert np.abs(z).max() < 4.5 and 0.7 < np.sqrt((z**2).mean()) < 1.3


def test_the_noise_of_a_network_averages_out():
    net, K = ResNet(6, (4, 8), key=KEY), 96
    batch = smooth((8, 1, 32, 32)), jnp.arange(8) % 10
    division, exact = Division(cross_entropy), Division(cross_entropy, Exact())
    drawn = eqx.filter_jit(division.value_and_grad)
    found = [drawn(net, batch, jax.random.PRNGKey(k)) for k in range(K)]
    loss, true = eqx.filter_jit(jax.value_and_grad(cross_entropy))(net, batch)
    np.testing.assert_allclose(found[0][0], loss, rtol=1e-5)
    assert jax.tree.structure(found[0][1]) == jax.tree.structure(true)
    ratios, falls = [], []
    for g, *draws in zip(jax.tree.leaves(true), *(jax.tree.leaves(grads) for _, grads in found), strict=True):
        draws, g = np.stack(draws).astype(np.float64), np.asarray(g, np.float64)
        variance = draws.var(0, ddof=1).sum()
        if variance < 1e-9 * (g**2).sum():  # the last layers, after the mean over pixels, are not compressed
            continue
        ratios.append(((draws.mean(0) - g) ** 2).sum() / (variance / K))
        fewer = draws.reshape(K // 16, 16, *g.shape).mean(1)
        falls.append(((fewer - g) ** 2).sum() / (K // 16) / variance * 16)
    # Without a bias, the mean of K draws misses by what chance says: variance / K, and variance / 16 for 16 of them.
    # The weights of a layer miss together, since they share the noise that comes from above: the bounds are wide.
    assert len(ratios) > 10 and max(ratios) < 6 and 0.4 < np.mean(ratios) < 2.5
    assert 0.7 < np.mean(falls) < 1.4
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
