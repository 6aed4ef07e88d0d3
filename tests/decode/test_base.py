import jax
import jax.numpy as jnp
import numpy as np

from anabranch.decode.base import Draw, sample

P = np.array([0.5, 0.25, 0.15, 0.1])


def shares(temperature, top_p, how, n=4000):
    column = lambda value, kind: jnp.full(n, value, kind)
    draw = Draw(
        column(temperature, jnp.float32),
        column(top_p, jnp.float32),
        jnp.arange(n, dtype=jnp.int32),
        column(3, jnp.int32),
    )
    drawn = jax.jit(sample, static_argnames="how")(jnp.broadcast_to(jnp.log(P), (n, 4)), draw, how=how)
    return np.bincount(drawn, minlength=4) / n


def test_tokens_are_drawn_by_their_probabilities():
    np.testing.assert_allclose(shares(1.0, 1.0, "all"), P, atol=0.03)
    sharper = P**2 / (P**2).sum()
    np.testing.assert_allclose(shares(0.5, 1.0, "all"), sharper, atol=0.03)
    np.testing.assert_allclose(shares(0.5, 1.0, "top_p"), sharper, atol=0.03)


def test_top_p_keeps_the_fewest_tokens_that_have_so_much_together():
    kept = np.array([0.5, 0.25, 0.0, 0.0]) / 0.75
    np.testing.assert_allclose(shares(1.0, 0.7, "top_p"), kept, atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.4, "top_p"), [1, 0, 0, 0])


def test_a_cold_row_takes_the_likeliest():
    assert shares(0.0, 1.0, "all")[0] == 1 and shares(0.0, 1.0, "likeliest")[0] == 1
