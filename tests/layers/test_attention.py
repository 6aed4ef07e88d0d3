"""Attention in parts against attention over all keys at once."""

import jax
import jax.numpy as jnp
import numpy as np

from anabranch.cell import noise
from anabranch.layers.attention import attend, grouped_attention, merge_attention, partial_attention
from anabranch.models.llama import Block, Config

KEY = jax.random.PRNGKey(0)


def normal(use, *shape):
    return jax.random.normal(noise(KEY, 0, use), shape)


def plain(q, k, v, mask):
    """Softmax over all keys, each query head with its own keys."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    score = jnp.einsum("thd,shd->ths", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("ths,shd->thd", jax.nn.softmax(jnp.where(mask[:, None], score, -jnp.inf)), v)


def test_parts_are_the_whole_however_they_are_cut_and_put_together():
    q, k, v = normal("q", 3, 4, 8), normal("k", 9, 2, 8), 5 * normal("v", 9, 2, 8)
    k = k.at[0].mul(40.0)  # a score that is far above all others
    mask = jax.random.bernoulli(noise(KEY, 0, "mask"), 0.6, (3, 9)).at[:, 0].set(True)

    @jax.jit
    def run(q, k, v, mask):
        parts = [partial_attention(q, k[a:b], v[a:b], mask[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 9))]
        left = merge_attention(*merge_attention(*parts[0], *parts[1]), *parts[2])
        right = merge_attention(*parts[2], *merge_attention(*parts[1], *parts[0]))
        return left, right, partial_attention(q, k, v, mask), plain(q, k, v, mask)

    left, right, once, whole = run(q, k, v, mask)
    for one in (left, right, once):
        np.testing.assert_allclose(one[0], whole, atol=1e-5)
    np.testing.assert_allclose(left[1], right[1], rtol=1e-6)


def test_a_part_without_keys_changes_nothing_and_has_a_gradient():
    q, k, v = normal("q", 3, 4, 8), normal("k", 9, 2, 8), normal("v", 9, 2, 8)
    none = jnp.zeros((3, 9), bool)

    def both(q):
        empty = partial_attention(q, k, v, none)
        return merge_attention(*merge_attention(*empty, *empty), *partial_attention(q, k, v))

    run = jax.jit(lambda q: (*both(q), plain(q, k, v, ~none), jax.grad(lambda q: both(q)[0].sum())(q)))
    out, total, whole, gradient = run(q)
    np.testing.assert_allclose(out, whole, atol=1e-5)
    assert jnp.isfinite(total).all() and jnp.isfinite(gradient).all()


def test_a_group_of_requests_through_a_layer():
    """One step of five requests with one prefix gives what each gives alone, through the whole text."""
    config = Config(vocab=11, width=24, layers=1, heads=6, kv_heads=2, hidden=32)
    block = Block.random(config, KEY)
    prefix, longest, lengths = 7, 4, np.array([1, 4, 2, 3, 4])
    texts = normal("texts", 5, prefix + longest, 24).at[:, :prefix].set(normal("prefix", prefix, 24))
    last = jnp.arange(5), prefix + lengths - 1

    @jax.jit
    def run(block, texts):
        alone = jax.vmap(block)(texts)[last]  # what comes after a text does not change it
        q, k, v = jax.vmap(lambda h: block.qkv(h, jnp.arange(len(h))))(texts)
        shared = k[0, :prefix], v[0, :prefix]
        own, mask = (k[:, prefix:], v[:, prefix:]), jnp.arange(longest) < lengths[:, None]
        attended = grouped_attention(q[last], shared, own, mask)
        return alone, block.close(texts[last], attended.reshape(5, -1))

    alone, together = run(block, texts)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_key_that_counts_several_times_is_as_if_it_were_there_so_often():
    q, k, v, times = normal("q", 3, 4, 8), normal("k", 2, 5, 8), normal("v", 2, 5, 8), np.array([1, 3, 1, 2, 4])
    visible = np.arange(5) < np.array([[5], [4], [2]])
    often = [np.repeat(x, times, 1) for x in (k, v, visible)]

    @jax.jit
    def both(q):
        n = len(q)
        counted = attend(q, k, v, visible[:n], jnp.tile(jnp.asarray(times, jnp.float32), (n, 1)))
        return counted, attend(q, *often[:2], often[2][:n])

    for n in (3, 1):  # one query alone goes another way
        np.testing.assert_allclose(*both(q[:n]), atol=1e-5)
