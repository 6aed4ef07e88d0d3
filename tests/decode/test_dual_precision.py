from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.decode import dual_precision
from anabranch.decode.dual_precision import (
    DPQ,
    FP8,
    MATRICES,
    PROTECTED,
    Stats,
    example,
    gar_permutation,
    observe,
    power_of_two,
    round8,
)
from anabranch.layers.linear import Linear
from anabranch.models.llama import Config, Decoder, Llama

IN, OUT, GROUP = 48, 10, 8


def case(seed):
    """A matrix with outputs of many sizes, and inputs that go together; one of them is never there."""
    draw = np.random.default_rng(seed)
    w = 0.05 * draw.normal(size=(IN, OUT)) * np.exp(draw.normal(size=OUT))
    x = draw.normal(size=(400, IN)) @ draw.normal(size=(IN, IN)) * np.exp(draw.normal(size=IN))
    x[:, 5] = 0
    H = 2 / len(x) * x.T @ x
    return Linear(jnp.asarray(w, jnp.float32)), Stats(jnp.asarray(H, jnp.float32), jnp.float32(np.abs(x).max()))


def as_they_come(matrix):
    """What stands for the matrix, inputs in their own order, read from its bits one by one."""
    q, s4, z = np.asarray(matrix.q), np.asarray(matrix.s4), np.asarray(matrix.z)
    out = np.empty((2 * len(q), q.shape[1]), np.float32)
    order = range(len(out)) if matrix.order is None else matrix.order.tolist()
    for i, at in enumerate(order):
        level = (q[i // 2] >> (4 * (i % 2))) & 15
        g = i // (len(out) // len(s4))
        out[at] = float(matrix.s8) * round8(s4[g] * (level.astype(np.float32) - z[g]), matrix.fp8, PROTECTED)
    return out


def slow(w, H, how):
    """The algorithm without blocks and factors: inputs to come make up for each by the inverse of their H."""
    largest, dtype = FP8[how.fp8]
    limit = largest - largest / 15
    H, w = H.copy(), w.copy()
    for i in np.flatnonzero(np.diag(H) == 0):
        H[i, i], w[i] = 1, 0
    groups = [list(range(g, g + how.group)) for g in range(0, len(w), how.group)]
    if how.order == "gar":
        groups = [sorted(group, key=lambda i: -H[i, i]) for group in groups]
        groups.sort(key=lambda group: -H[group[0], group[0]])
    if how.order == "act":
        every = sorted(range(len(w)), key=lambda i: -H[i, i])
        groups = [every[g : g + how.group] for g in range(0, len(w), how.group)]
    H += how.damp * np.diag(H).mean() * np.eye(len(H))
    s8 = 2.0 ** int(np.ceil(np.log2(np.abs(w).max() / limit)))
    eight = np.clip(w / s8, -limit, limit).astype(np.float32).astype(dtype).astype(np.float32)
    out, rest = np.empty_like(w), [i for group in groups for i in group]
    for group in groups:
        low, high = np.minimum(eight[group].min(0), 0), np.maximum(eight[group].max(0), 0)
        if how.sym:
            high = np.maximum(high, -low)
            low = -high
        low, high = np.where(high == low, -1, low), np.where(high == low, 1, high)
        step = ((high - low) / 15).astype(np.float32)  # half of a step of FP8 is common, so that precision tells
        zero = np.full(len(step), np.float32(8)) if how.sym else np.rint(-low / step).astype(np.float32)
        for i in group:
            near = step * (np.clip(np.rint(w[i] / s8 / step) + zero, 0, 15) - zero).astype(np.float32)
            out[i] = s8 * np.clip(near, -limit, limit).astype(dtype).astype(float)
            inverse = np.linalg.inv(H[np.ix_(rest, rest)])
            w[rest] -= np.outer(inverse[:, 0] / inverse[0, 0], w[i] - out[i])
            rest = rest[1:]
    return out


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("order", ["gar", "none", "act"])
@pytest.mark.parametrize("sym", [False, True])
def test_weights_are_those_of_the_algorithm_without_blocks(monkeypatch, fp8, order, sym):
    monkeypatch.setattr(dual_precision, "BLOCK", 20)  # the last block is shorter, and groups are cut by blocks
    linear, stats = case(1)
    how = DPQ(GROUP, fp8, order, sym=sym)
    matrix = how.linear(linear, stats)
    wanted = slow(np.asarray(linear.w, float), np.asarray(stats.H, float), how)
    np.testing.assert_allclose(as_they_come(matrix), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fp8", FP8)
def test_rounding_is_that_of_torch_for_every_bf16(fp8):
    torch = pytest.importorskip("torch")
    x = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    x = x[np.isfinite(x)]
    largest, dtype = FP8[fp8]
    kind = getattr(torch, f"float8_{np.dtype(dtype).name.removeprefix('float8_')}")
    wanted = torch.tensor(x).clamp(-largest, largest).to(kind).float().numpy()
    np.testing.assert_array_equal(round8(x, fp8), wanted)
    np.testing.assert_array_equal(jax.jit(lambda x: round8(x, fp8))(x), wanted)  # XLA does not leave the casts out


def test_rounding_saturates_and_keeps_nan():
    x = np.array([1e9, -1e9, 449, np.nan, 0.3], np.float32)
    np.testing.assert_array_equal(round8(x, "e4m3fn"), np.array([448, -448, 448, np.nan, 0.3125], np.float32))


def test_scales_are_powers_of_two_that_bring_all_into_range():
    assert power_of_two(448, "e4m3fn") == 1 and power_of_two(448.1, "e4m3fn") == 2
    assert power_of_two(0.9, "e4m3fnuz", PROTECTED) == 2**-7  # 0.9 / 224 is above 2^-8
    assert 0 < power_of_two(0, "e4m3fn") <= 2 / (512 * 448)


@pytest.mark.parametrize("group", [1, 4, 12])
def test_no_input_leaves_its_group(group):
    importance = np.random.default_rng(group).uniform(size=24)
    perm = gar_permutation(importance, group)
    assert sorted(perm) == list(range(24))
    blocks = perm.reshape(-1, group)
    assert (blocks // group == blocks[:, :1] // group).all()
    assert (np.diff(importance[blocks], axis=1) <= 0).all() and (np.diff(importance[blocks[:, 0]]) <= 0).all()


def test_weights_are_numbers_of_fp8():
    for order in ("gar", "act"):
        matrix = DPQ(GROUP, order=order).linear(*case(2))
        w = np.asarray(matrix.weights())
        np.testing.assert_array_equal(w, w.astype(jnp.float8_e4m3fn).astype(np.float32))
        there = as_they_come(matrix)
        there = there if matrix.order is None else there[np.asarray(matrix.order)]
        np.testing.assert_array_equal(w * float(matrix.s8), there)


@pytest.mark.parametrize("order", ["gar", "act"])
def test_a_product_is_of_numbers_of_fp8_and_given_in_bf16(order):
    linear, stats = case(3)
    matrix = DPQ(GROUP, order=order).linear(eqx.tree_at(lambda l: l.b, linear, jnp.arange(10.0), is_leaf=_none), stats)
    x = np.random.default_rng(0).normal(size=(5, IN)).astype(np.float32) * 3
    eight = round8(x / np.float32(matrix.sx), "e4m3fn").astype(float) * float(matrix.sx)
    wanted = (eight @ as_they_come(matrix) + np.arange(10)).astype(np.float32)
    found = np.asarray(matrix(jnp.asarray(x)))
    np.testing.assert_array_equal(found, found.astype(jnp.bfloat16).astype(np.float32))
    np.testing.assert_allclose(found, wanted, rtol=2**-8, atol=1e-5)


def _none(x):
    return x is None


def loss(linear, stats, matrix):
    """How far outputs are off, squared, on what was seen."""
    off = np.asarray(linear.w, float) - as_they_come(matrix)
    return np.einsum("io,ij,jo", off, np.asarray(stats.H, float), off)


def test_it_loses_less_than_rounding_and_than_gptq_rounded_afterwards():
    ratios = []
    for seed in range(12):
        linear, stats = case(seed)
        plain = Stats(jnp.eye(IN), stats.largest)
        after = DPQ(GROUP, None).linear(linear, stats).in_fp8("e4m3fn", float(stats.largest))
        ours = loss(linear, stats, DPQ(GROUP).linear(linear, stats))
        nearest = loss(linear, stats, DPQ(GROUP).linear(linear, plain))
        ratios.append((ours / nearest, ours / loss(linear, stats, after)))
    first, second = np.exp(np.log(ratios).mean(0))
    assert first < 0.7 and second < 1


def test_with_the_identity_each_weight_is_rounded_to_the_nearest():
    linear, stats = case(4)
    matrix = DPQ(GROUP).linear(linear, Stats(jnp.eye(IN), stats.largest))
    w, s4 = np.asarray(linear.w) / float(matrix.s8), np.asarray(matrix.s4)
    levels = np.clip(np.rint(w.reshape(-1, GROUP, OUT) / s4[:, None]) + np.asarray(matrix.z)[:, None], 0, 15)
    packed = np.asarray(matrix.q)
    q = np.stack([packed & 15, packed >> 4], 1).reshape(-1, GROUP, OUT)
    np.testing.assert_array_equal(q, levels)


@pytest.fixture(scope="module")
def model():
    config = Config(vocab=11, width=16, layers=2, heads=2, kv_heads=1, hidden=32, rope_base=100.0, bias=True)
    cell = Decoder(jax.tree.map(lambda x: 3 * x, Llama(config, key=jax.random.PRNGKey(3))), 12)
    return cell, jax.random.randint(jax.random.PRNGKey(4), (16, 12), 0, 11)


def test_what_comes_into_the_matrices_of_a_layer(model):
    cell, tokens = model
    h = cell.embedding[tokens]
    after, stats = observe(cell.layers[0], h)
    wanted = jax.vmap(lambda h: cell.run_layers(h, cell.init().memory, jnp.arange(12), 0, 1)[0])(h)
    np.testing.assert_allclose(after, wanted, rtol=1e-4, atol=1e-5)
    x = np.asarray(h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5) * cell.layers[0].attention_norm)
    x = x.reshape(-1, 16)
    np.testing.assert_allclose(stats["qkv"].H, 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5)
    assert float(stats["qkv"].largest) == pytest.approx(np.abs(x).max(), rel=1e-5)
    assert [stats[name].H.shape for name in MATRICES] == [(16, 16), (16, 16), (16, 16), (32, 32)]


def test_layers_are_calibrated_on_what_those_before_them_quantised_give(model):
    cell, tokens = model
    how = DPQ(group=8)
    small = how.quantise(cell, tokens)
    h = cell.embedding[tokens]
    first = how.layer(cell.layers[0], observe(cell.layers[0], h)[1])
    second = how.layer(cell.layers[1], observe(cell.layers[1], observe(first, h)[0])[1])
    assert eqx.tree_equal(small.layers, (first, second))
    unlike = how.layer(cell.layers[1], observe(cell.layers[1], observe(cell.layers[0], h)[0])[1])
    assert not eqx.tree_equal(second, unlike)


def test_the_model_goes_on_as_before(model):
    cell, tokens = model
    small = DPQ(group=8).quantise(cell, tokens)
    exact, near = (eqx.filter_jit(lambda c, x: c.advance(c.init(), x)[1])(c, tokens[0]) for c in (cell, small))
    assert 0 < float(jnp.abs(near - exact).mean()) < 0.2 * float(jnp.abs(exact).mean())
    assert small.embedding is cell.embedding and small.head is cell.head


def test_contract():
    report = contract.check(*example(), key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


def test_bad_input_is_named():
    linear, stats = case(0)
    for bad, named in (
        ({"group": 0}, "group must be at least 1, got 0"),
        ({"fp8": "e5m2"}, "fp8 must be one of .*, got 'e5m2'"),
        ({"order": "random"}, "order must be gar, none or act, got 'random'"),
        ({"damp": 0.0}, "damp must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=named):
            replace(DPQ(), **bad)
    with pytest.raises(ValueError, match="group: the inputs must be even and whole groups of 7, got 48"):
        DPQ(group=7).linear(linear, stats)
    with pytest.raises(ValueError, match="w must be finite, got nan"):
        DPQ(group=8).linear(Linear(linear.w.at[3, 2].set(jnp.nan)), stats)
    with pytest.raises(ValueError, match="H must be finite, got inf"):
        DPQ(group=8).linear(linear, Stats(stats.H.at[0, 1].set(jnp.inf), stats.largest))
    with pytest.raises(ValueError, match=r"H must have shape \(48, 48\), got \(2, 2\)"):
        DPQ(group=8).linear(linear, Stats(jnp.eye(2), stats.largest))
    with pytest.raises(ValueError, match="H is not positive definite, even with damp=10"):
        DPQ(group=8).linear(linear, Stats(-stats.H, stats.largest))
    with pytest.raises(ValueError, match=r"tokens must have two axes, .* got shape \(3,\)"):
        DPQ(group=8).quantise(example()[0], jnp.zeros(3, jnp.int32))
