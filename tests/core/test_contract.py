import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap

from anabranch.cell import Cell, Decision, Event, Feedback, Learner, Maybe, Policy, noise
from anabranch.contract import ROWS, check

XS = jnp.asarray(np.random.default_rng(1).normal(size=(24, 3)), jnp.float32)


class Ema(Cell):
    """A good cell, with a parallel form and blocks of its own. The broken cells below each change one thing."""

    rate_of_change: jax.Array = eqx.field(default_factory=lambda: jnp.float32(0.3))

    def init(self, *, key=None):
        return {"mean": jnp.zeros(3), "n": jnp.int32(0)}

    def step(self, state, x):
        mean = state["mean"] + self.rate_of_change * (x - state["mean"])
        return {"mean": mean, "n": state["n"] + 1}, mean

    def offline(self, xs):
        t = jnp.arange(xs.shape[0])
        lag = t[:, None] - t[None, :]
        weights = jnp.where(lag >= 0, self.rate_of_change * (1 - self.rate_of_change) ** jnp.maximum(lag, 0), 0.0)
        return weights @ xs

    def advance(self, state, xs):
        length = xs.shape[0]
        decayed = (1 - self.rate_of_change) ** jnp.arange(1, length + 1)
        ys = Ema.offline(self, xs) + decayed[:, None] * state["mean"]
        return {"mean": ys[-1], "n": state["n"] + length}, ys


class Grows(Ema):
    def step(self, state, x):
        state, y = Ema.step(self, {"mean": state["mean"], "n": state["n"]}, x)
        return {**state, "seen": x}, y


class Writes(Ema):
    """Keeps a record of its own in Python."""

    record: list = eqx.field(static=True, default_factory=list)

    def step(self, state, x):
        self.record.append(len(self.record))
        return Ema.step(self, state, x)


class Draws(Ema):
    """Draws in Python when it is traced: pure to the eye of each trace, but no two traces agree."""

    def step(self, state, x):
        state, y = Ema.step(self, state, x)
        return state, y + 1e-6 * np.random.default_rng().normal()


@custom_vmap
def _double(x):
    return 2 * x


@_double.def_vmap
def _double_batch(axis_size, in_batched, x):
    return 3 * x, True


class MixesRows(Ema):
    def step(self, state, x):
        state, y = Ema.step(self, state, x)
        return {**state, "n": _double(state["n"])}, y


class Coupled(MixesRows):
    coupled = True


class Opaque(Cell):
    """Its state holds what no file can."""

    host = True

    def init(self, *, key=None):
        return {"mean": np.zeros(3, np.float32), "sample": object}

    def step(self, state, x):
        mean = state["mean"] + np.float32(0.3) * (x - state["mean"])
        return {"mean": mean, "sample": state["sample"]}, mean


class WrongOffline(Ema):
    def offline(self, xs):
        return 1.01 * Ema.offline(self, xs)


class WrongBlocks(Ema):
    """Right in the first block, but does not hand the state on."""

    def advance(self, state, xs):
        after, ys = Ema.advance(self, state, xs)
        return {**after, "mean": 0.9 * after["mean"]}, ys


class Peeks(Ema):
    """Centres by the mean of the block: a leak too small for a tolerance to see, but not for bits."""

    def advance(self, state, xs):
        state, ys = Ema.advance(self, state, xs)
        return state, ys + 1e-6 * xs.mean(0)


class PeeksOffline(Ema):
    def offline(self, xs):
        return Ema.offline(self, xs) + 1e-6 * xs.mean(0)


@jax.custom_jvp
def _square(x):
    return x * x


@_square.defjvp
def _square_jvp(primals, tangents):
    return _square(primals[0]), primals[0] * tangents[0]


class WrongGradient(Cell):
    def init(self, *, key=None):
        return jnp.zeros(3)

    def step(self, state, x):
        return state + 1, _square(x) + 0 * state


@jax.custom_jvp
def _softmax(x):
    return jax.nn.softmax(x)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    return jax.jvp(jax.nn.softmax, primals, (2 * tangents[0],))


class WrongSoftmaxGradient(WrongGradient):
    """The sum of its outputs is constant, so that a plain sum would see nothing."""

    def step(self, state, x):
        return state + 1, _softmax(x)


class NoGradient(WrongGradient):
    def step(self, state, x):
        return state + 1, jax.lax.stop_gradient(x * x)


class InfiniteGradient(WrongGradient):
    def step(self, state, x):
        return state + 1, jnp.sqrt(0 * x)


class CallsBack(Cell):
    """Asks Python for an integer: no other runtime can."""

    def init(self, *, key=None):
        return jnp.int32(0)

    def step(self, state, x):
        shape = jax.ShapeDtypeStruct((), jnp.int32)
        sign = jax.pure_callback(lambda x: np.int32(x[0] > 0), shape, x, vmap_method="sequential")
        return state + sign, state + sign


BROKEN = {
    Grows: "bounded",
    Writes: "pure",
    MixesRows: "batchable",
    Opaque: "resumable",
    WrongOffline: "offline-equal",
    WrongBlocks: "offline-equal",
    Peeks: "no-peek",
    PeeksOffline: "no-peek",
    WrongGradient: "differentiable",
    WrongSoftmaxGradient: "differentiable",
    NoGradient: "differentiable",
    InfiniteGradient: "differentiable",
    CallsBack: "exportable",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cell: cell.__name__)
def test_a_broken_property_breaks_its_row_and_no_other(broken):
    report = check(broken(), XS)
    assert [row.name for row in report.rows if row.verdict == "breaks"] == [BROKEN[broken]], report
    assert report[BROKEN[broken]].reason and not report.ok


def test_a_good_cell_holds_in_every_row():
    report = check(Ema(), XS)
    assert [row.name for row in report.rows] == list(ROWS)
    assert {row.verdict for row in report.rows} == {"holds"}, report
    assert report["no-peek"].difference == 0 and 0 < report["offline-equal"].difference < 1e-5


def test_what_is_drawn_while_tracing_is_found():
    assert check(Draws(), XS)["pure"].verdict == "breaks"


def test_resumed_state_that_behaves_otherwise_is_found(monkeypatch):
    import anabranch.contract as contract

    load = contract.load
    monkeypatch.setattr(
        contract, "load", lambda path, like: jax.tree.map(lambda leaf: leaf * (1 + 1e-6), load(path, like))
    )
    report = check(Ema(), XS)
    assert [row.name for row in report.rows if row.verdict == "breaks"] == ["resumable"], report


def test_an_exception_breaks_the_row_with_its_message():
    class Raises(Ema):
        def offline(self, xs):
            raise RuntimeError("no parallel form today\nsecond line")

    report = check(Raises(), XS)
    assert report["offline-equal"].verdict == "breaks"
    assert report["offline-equal"].reason == "RuntimeError: no parallel form today"
    assert report["differentiable"].verdict == "holds"


def test_coupled_rows_are_not_batched():
    row = check(Coupled(), XS)["batchable"]
    assert (row.verdict, row.reason.split(":")[0]) == ("n/a", "coupled by design")


def test_rate_delay_and_maybe():
    class Pairs(Cell):
        """Two inputs, three outputs a step, two outputs late, the first outputs not there yet."""

        rate = (2, 3)
        delay = 2

        def init(self, *, key=None):
            return {"late": jnp.full((2, 3), jnp.nan), "n": jnp.int32(0)}

        def step(self, state, x):
            now = jnp.stack([x[0], x[0] + x[1], x[1]])
            line = jnp.concatenate([state["late"], now])
            valid = state["n"] * 3 + jnp.arange(3) >= 2
            return {"late": line[3:], "n": state["n"] + 1}, Maybe(line[:3], valid)

        def offline(self, xs):
            pairs = xs.reshape(-1, 2, 3)
            ys = jnp.stack([pairs[:, 0], pairs[:, 0] + pairs[:, 1], pairs[:, 1]], 1).reshape(-1, 3)
            return Maybe(ys, jnp.ones(ys.shape[0], bool))

    report = check(Pairs(), XS)
    assert {row.verdict for row in report.rows} == {"holds"}, report

    class Late(Pairs):
        delay = 1

    report = check(Late(), XS)
    assert [row.name for row in report.rows if row.verdict == "breaks"] == ["offline-equal"], report


class LooksAhead(Cell):
    """x[t] + x[t + 1], one output late: `offline` may look one input ahead, and no more."""

    delay = 1

    def init(self, *, key=None):
        return jnp.zeros(3)

    def step(self, state, x):
        return x, state + x

    def offline(self, xs):
        return xs + jnp.roll(xs, -1, 0).at[-1].set(0.0)


class LooksTooFar(LooksAhead):
    def offline(self, xs):
        return LooksAhead.offline(self, xs) + 1e-6 * jnp.roll(xs, -2, 0)


def test_a_delay_allows_as_much_look_ahead():
    report = check(LooksAhead(), XS)
    assert {row.verdict for row in report.rows} == {"holds"}, report
    report = check(LooksTooFar(), XS)
    assert [row.name for row in report.rows if row.verdict == "breaks"] == ["no-peek"], report


class Regression(Learner):
    def init(self, *, key=None):
        return {"w": jnp.zeros(3), "n": jnp.int32(0)}

    def predict(self, state, x):
        return state["w"] @ x

    def learn(self, state, x, target, weight=1.0):
        error = target - state["w"] @ x
        return {"w": state["w"] + 0.1 * weight * error * x, "n": state["n"] + 1}


def test_learners_take_events():
    target = Maybe(XS @ jnp.array([1.0, -2.0, 0.5]), jnp.arange(24) % 3 > 0)
    report = check(Regression(), Event(XS, target, jnp.ones(24)))
    assert {row.verdict for row in report.rows} == {"holds"}, report


class Greedy(Policy):
    """An explorer with a key in its state."""

    def init(self, *, key=None):
        return {"key": key, "n": jnp.int32(0), "value": jnp.zeros(4), "count": jnp.zeros(4)}

    def act(self, state, x):
        key = noise(state["key"], state["n"])
        arm = jnp.where(jax.random.bernoulli(key, 0.3), jax.random.randint(key, (), 0, 4), jnp.argmax(state["value"]))
        return {**state, "n": state["n"] + 1}, Decision(arm, jnp.float32(0.0))

    def learn(self, state, x, decision, feedback):
        count = state["count"].at[decision.action].add(1.0)
        error = feedback.reward - state["value"][decision.action]
        return {
            **state,
            "count": count,
            "value": state["value"].at[decision.action].add(error / count[decision.action]),
        }


@pytest.mark.parametrize("key", [jax.random.PRNGKey(3), jax.random.key(3)], ids=["raw", "typed"])
def test_policies_with_a_key(key):
    decision = Decision(jnp.arange(24) % 4, jnp.zeros(24))
    feedback = Feedback(XS[:, 0], terminal=jnp.zeros(24, bool), truncated=jnp.zeros(24, bool))
    report = check(Greedy(), (XS, Maybe((XS, decision, feedback), jnp.arange(24) > 2)), key=key)
    assert report.ok, report
    assert report["differentiable"].verdict == "n/a"
    assert report["exportable"].compared.startswith("StableHLO") and "ONNX" in report["exportable"].reason


def test_host_cells():
    class Counter(Cell):
        host = True

        def init(self, *, key=None):
            return {"seen": 0, "mean": np.zeros(3, np.float32)}

        def step(self, state, x):
            n = state["seen"] + 1
            return {"seen": n, "mean": state["mean"] + (x - state["mean"]) / np.float32(n)}, state["mean"].copy()

    report = check(Counter(), XS)
    assert report.ok, report
    assert {row.name for row in report.rows if row.verdict == "n/a"} == {
        "batchable",
        "offline-equal",
        "differentiable",
        "exportable",
    }

    class InPlace(Counter):
        def step(self, state, x):
            state["mean"] += x
            return state, state["mean"].copy()

    assert check(InPlace(), XS)["pure"].verdict == "breaks"


def test_the_gradient_is_judged_honestly():
    class Softmax(WrongGradient):
        def step(self, state, x):
            return state + 1, jax.nn.softmax(x)

    class Rounds(WrongGradient):
        def step(self, state, x):
            return state + 1, jnp.round(x)

    class Counts(WrongGradient):
        def init(self, *, key=None):
            return jnp.int32(0)

        def step(self, state, x):
            return state + 1, state

    class Loops(WrongGradient):
        def step(self, state, x):
            y, _ = jax.lax.while_loop(lambda c: jnp.abs(c[0]).max() > 1, lambda c: (c[0] / 2, c[1] + 1), (x, 0))
            return state + 1, y

    rows = {cell.__name__: check(cell(), XS)["differentiable"] for cell in (Softmax, Rounds, Counts, Loops)}
    assert rows["Softmax"].verdict == "holds"
    assert rows["Rounds"].verdict == "n/a" and "smoothly" in rows["Rounds"].reason
    assert rows["Counts"].verdict == "n/a" and "no float outputs" in rows["Counts"].reason
    assert rows["Loops"].verdict == "holds" and rows["Loops"].compared.startswith("forward mode")


def test_python_numbers_are_no_state():
    class Number(Ema):
        def init(self, *, key=None):
            return {"mean": jnp.zeros(3), "n": 0}

    row = check(Number(), XS)["bounded"]
    assert row.verdict == "breaks" and "state['n']" in row.reason


def test_the_report_prints_and_turns_into_json():
    report = check(WrongOffline(), XS)
    assert "offline-equal" in str(report) and "breaks" in str(report)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["cell"] == "WrongOffline" and not again["ok"] and len(again["rows"]) == len(ROWS)
    assert again == check(WrongOffline(), XS).to_dict()  # deterministic
    assert dataclasses.asdict(report["pure"]) == again["rows"][1]


def test_inputs_without_a_time_axis_are_refused():
    with pytest.raises(ValueError, match="time axis"):
        check(Ema(), (XS, 1.0))
    with pytest.raises(ValueError, match="at least two steps"):
        check(Ema(), XS[:1])
