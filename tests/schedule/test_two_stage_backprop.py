"""2BP: closed forms, rewriting any schedule, and real backward passes in two halves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.plan import check, simulate
from anabranch.schedule.base import Costs, Op, gpipe, interleaved, one_f_one_b
from anabranch.schedule.two_stage_backprop import halve, naive, split_vjp, two_stage
from anabranch.schedule.zero_bubble import zb_h1


@pytest.mark.parametrize("p", [2, 3, 4, 6, 8])
def test_closed_forms(p):
    for given, work, makespan in (
        (naive(p), 3, 2 * p + 1),
        (gpipe(p, 2 * p), 6 * p, 6 * p + 2 * (p - 1)),
        (one_f_one_b(p, p), 3 * p, 4 * p - 1),
        (one_f_one_b(p, 2 * p), 6 * p, 7 * p - 1),
    ):
        trace = simulate(check(two_stage(given).plan()))
        assert trace.makespan == makespan
        assert set(trace.busy.tolist()) == {work}
        late = simulate(check(two_stage(given, fill="end").plan()))
        assert late.makespan >= makespan
    trace = simulate(two_stage(one_f_one_b(p, 2 * p), fill="end").plan())
    assert trace.makespan == 6 * p + 2 * (p - 1) and trace.peak.tolist() == [2 * p] * p


def test_costs_say_where_a_device_would_wait():
    costs = Costs(forward=1, backward=[2, 3, 2, 4], weight=[1, 2, 1, 0.5], message=0.2)
    for given in (gpipe(4, 6), one_f_one_b(4, 6), interleaved(2, 4, 2)):
        before = simulate(given.plan(costs)).makespan
        assert simulate(check(two_stage(given, costs).plan(costs))).makespan <= before


def test_refused():
    with pytest.raises(ValueError, match='fill must be "gap" or "end"'):
        two_stage(gpipe(2, 2), fill="middle")
    with pytest.raises(ValueError, match="ZB-H1 has no BW that could be split"):
        two_stage(zb_h1(2, 2))


@pytest.fixture(scope="module")
def layer():
    net = eqx.nn.MLP(6, 6, 16, 2, key=jax.random.PRNGKey(0))
    params, static = eqx.partition(net, eqx.is_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x), jnp.ones((5, 6)) * 0.3


def test_the_two_halves_are_the_gradient(layer):
    params, stage, x = layer
    passes = split_vjp(stage, params, x)
    g = jax.random.normal(jax.random.PRNGKey(1), (5, 6))
    y, kept = jax.jit(passes.forward)(params, x)
    gx, left = jax.jit(passes.backward)(kept, g)
    gw = jax.jit(passes.weight)(left)
    expected, pull = jax.vjp(stage, params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves((gw, gx)), jax.tree.leaves(pull(g)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_no_work_is_done_twice(layer):
    params, stage, x = layer
    passes = split_vjp(stage, params, x)
    kept = jax.eval_shape(passes.forward, params, x)[1]
    left = jax.eval_shape(passes.backward, kept, x)[1]
    count = lambda f, *args: str(jax.make_jaxpr(f)(*args)).count("dot_general")
    whole = count(lambda p, x: jax.vjp(stage, p, x)[1](x), params, x)
    halves = count(passes.backward, kept, x), count(passes.weight, left)
    assert halves == (3, 3) and count(passes.forward, params, x) + sum(halves) == whole


def test_halves_of_any_function():
    def function(a, b):
        product = a * b
        return product.sum(), {"d": jnp.cos(product), "c": jnp.float32(2)}

    halves = halve(function, 3.0, jnp.arange(3.0))
    now, kept = halves.first(3.0, jnp.arange(3.0))
    later = halves.second(kept)
    assert float(now) == 9 and len(kept) == 1 and float(later["c"]) == 2
    np.testing.assert_allclose(later["d"], np.cos([0, 3, 6]), rtol=1e-6)


def test_a_schedule_rewritten_keeps_its_order():
    given, made = one_f_one_b(4, 8), two_stage(one_f_one_b(4, 8))
    for before, after in zip(given.orders, made.orders, strict=True):
        kinds = [("B" if one.kind is Op.BW else one.kind.name, one.micro) for one in before]
        assert [(one.kind.name, one.micro) for one in after if one.kind is not Op.W] == kinds
