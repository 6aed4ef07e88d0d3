"""Plans that really run: the gradients of the model that is not cut, in the memory that the plan says."""

import dataclasses

import jax.numpy as jnp
import pytest

from anabranch.plan import Op, PlanBuilder, PlanError, simulate
from anabranch.schedule.base import one_f_one_b
from anabranch.schedule.controllable_memory import v_half
from anabranch.schedule.execute import Model, execute
from anabranch.schedule.zero_bubble import zb_h1

MODEL = Model(lambda outer, x: x, lambda w, x: x * w, lambda outer, x, y: ((x - y) ** 2).sum())


def test_gradients_and_memory(executed):
    made = {
        "zb_h1(4, 8)": zb_h1(4, 8), "v_half(2, 4)": v_half(2, 4), "two_stage(interleaved(2, 2, 2))": None,
    }  # fmt: skip
    found = executed(*made)
    for name, schedule in made.items():
        assert found[name]["error"] < 1e-5, name
        if schedule is not None:
            peak = simulate(schedule.plan()).peak.tolist()
            slots = found[name]["slots"]
            # A slot of input lives from its arrival until the B, one for the weights from then until the W.
            assert max(slots["activation"]) <= max(peak) + 1 and max(slots["weights"]) <= max(peak)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": jnp.ones((3, 2))}, r"weights: the plan has 1, found \[3\]"),
        ({"inputs": jnp.ones((5, 2))}, r"inputs: the plan has 2, found \[5\]"),
        ({"devices": []}, "the plan has 1 devices, there are 0"),
        ({"devices": [0, 1], "group": 2}, "group is 2, but the plan gathers no weights"),
    ],
)
def test_refused(change, message):
    args = {"weights": jnp.ones((1, 2)), "outer": (), "inputs": jnp.ones((2, 2)), "targets": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=message):
        execute(one_f_one_b(1, 2).plan(), MODEL, **(args | change))


def test_one_device_is_enough():
    x, w = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[2.0, 0.5]])
    ran = execute(one_f_one_b(1, 2).plan(), MODEL, w, (), x, jnp.zeros((2, 2)))
    assert float(ran.loss) == float(((x * w) ** 2).sum(1).mean())
    assert ran.grads[0].tolist() == (2 * x * w * x).mean(0, keepdims=True).tolist()


def test_what_cannot_be_executed():
    b = PlanBuilder()
    b.add(Op.OPT, b.lane(0), 1.0, stage=0, micro=0)
    with pytest.raises(PlanError, match="only F, B, W, BW, D2H, H2D, AG and RS can be executed, the plan has OPT"):
        execute(b.build(), MODEL, jnp.ones((1, 2)), (), jnp.ones((1, 2)), jnp.ones((1, 2)))
    far = dataclasses.replace(one_f_one_b(4, 1), placement=(0, 2, 1, 3))
    orders = [far.orders[i] for i in (0, 2, 1, 3)]
    with pytest.raises(PlanError, match="stage 0 on device 0 sends to device 2, which is no neighbour"):
        plan = dataclasses.replace(far, orders=orders).plan()
        execute(plan, MODEL, jnp.ones((4, 2)), (), jnp.ones((1, 2)), jnp.ones((1, 2)), devices=range(4))


@pytest.mark.parametrize("less, text", [(Op.AG, "F of stage 0, .* has no AG"), (Op.RS, "BW of stage 0, .* has no RS")])
def test_a_stage_needs_its_weights_and_its_gradients_scattered(less, text):
    b = PlanBuilder()
    lane, net = b.lane(0), b.lane(0, "net")
    before: list[int] = []
    for kind in (Op.AG, Op.F, Op.BW, Op.RS):
        if kind is not less:
            before = [b.add(kind, net if kind in (Op.AG, Op.RS) else lane, 1.0, stage=0, micro=0, after=before)]
    with pytest.raises(PlanError, match=text):
        execute(b.build(), MODEL, jnp.ones((1, 2)), (), jnp.ones((1, 2)), jnp.ones((1, 2)))
