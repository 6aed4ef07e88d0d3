"""The trainer against loops written by hand, and recorded training."""

import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import anabranch.train as training
from anabranch import noise, state
from anabranch.fit import Part, fit

KEY = jax.random.PRNGKey(3)
X = np.linspace(-1, 1, 40, dtype=np.float32)[:, None] * np.array([1.0, -0.5], np.float32)
Y = np.tanh(X @ np.array([2.0, 1.0], np.float32)) + 0.3


class Net(eqx.Module):
    inner: eqx.nn.Linear
    outer: eqx.nn.Linear
    table: np.ndarray
    activation: object = eqx.field(default=jnp.tanh)

    def __init__(self, width=4):
        a, b = jax.random.split(KEY)
        self.inner, self.outer = eqx.nn.Linear(2, width, key=a), eqx.nn.Linear(width, 1, key=b)
        self.table = np.arange(width, dtype=np.int32)
        self.activation = jnp.tanh

    def __call__(self, x):
        return self.outer(self.activation(self.inner(x)) + 0.01 * self.table)[0]


def mse(model, batch, key):
    x, y = batch
    return jnp.mean((jax.vmap(model)(x + 0.01 * jax.random.normal(key, x.shape)) - y) ** 2)


def rows(i, n=8):
    return np.asarray(jax.random.randint(noise(KEY, i, "batch"), (n,), 0, len(X)))


def by_hand(model, optimizer, steps, name="loss"):
    """The textbook loop: filter, gradient, update; every set of weights on the way."""
    opt = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    step = eqx.filter_jit(eqx.filter_value_and_grad(mse))
    models, losses = [], []
    for i in range(steps):
        loss, grads = step(model, (X[rows(i)], Y[rows(i)]), noise(KEY, i, name))
        updates, opt = optimizer.update(grads, opt, eqx.filter(model, eqx.is_inexact_array))
        model = eqx.apply_updates(model, updates)
        models.append(model)
        losses.append(float(loss))
    return models, losses


def close(a, b, **kw):
    for x, y in zip(jax.tree.leaves(eqx.filter(a, eqx.is_array)), jax.tree.leaves(eqx.filter(b, eqx.is_array))):
        np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 1e-6} | kw))


@pytest.fixture(scope="module")
def adam():
    return optax.adam(1e-2)


@pytest.fixture(scope="module")
def hand(adam):
    return by_hand(Net(), adam, 25)


def test_equals_the_textbook_loop(adam, hand):
    models, losses = hand
    model, history = fit(mse, Net(), (X, Y), adam, 25, key=KEY, batch_size=8, check=10)
    close(model, models[-1])
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    assert isinstance(model, Net) and model.activation is jnp.tanh
    assert model.table.dtype == jnp.int32 and model.table.tolist() == [0, 1, 2, 3]


def test_chunks_do_not_matter_and_compile_once(adam):
    traces = []

    def counted(model, batch, key):
        traces.append(1)
        return mse(model, batch, key)

    a, _ = fit(counted, Net(), (X, Y), adam, 25, key=KEY, batch_size=8, check=10)
    assert len(traces) == 1, "a last, shorter chunk and a second call use the same program"
    fit(counted, Net(), (X, Y), adam, 24, key=jax.random.PRNGKey(9), batch_size=8, check=10)
    assert len(traces) == 1
    b, _ = fit(mse, Net(), (X, Y), adam, 25, key=KEY, batch_size=8, check=25)
    for x, y in zip(jax.tree.leaves(eqx.filter(a, eqx.is_array)), jax.tree.leaves(eqx.filter(b, eqx.is_array))):
        assert jnp.array_equal(x, y)


def test_a_function_gives_the_batches(adam, hand):
    def batch(key, i):
        picked = jax.random.randint(key, (8,), 0, len(X))
        return jnp.asarray(X)[picked], jnp.asarray(Y)[picked]

    close(fit(mse, Net(), batch, adam, 25, key=KEY)[0], hand[0][-1])


def test_freezing(adam):
    decay = optax.adamw(1e-2, weight_decay=0.1)
    before = Net()
    after, _ = fit(mse, before, (X, Y), decay, 5, key=KEY, where=lambda m: m.outer)
    close(after.inner, before.inner, rtol=0, atol=0)
    assert not jnp.array_equal(after.outer.weight, before.outer.weight)
    both, _ = fit(mse, before, (X, Y), decay, 5, key=KEY, where=lambda m: (m.inner.bias, m.outer.bias))
    assert jnp.array_equal(both.inner.weight, before.inner.weight)
    assert not jnp.array_equal(both.inner.bias, before.inner.bias)


def test_ema_is_the_normalised_average(adam, hand):
    models, _ = hand
    model, _ = fit(mse, Net(), (X, Y), adam, 25, key=KEY, batch_size=8, ema=0.9)
    weights = 0.9 ** np.arange(24, -1, -1)
    expected = np.einsum("t,tij->ij", weights / weights.sum(), np.stack([m.inner.weight for m in models]))
    np.testing.assert_allclose(model.inner.weight, expected, rtol=1e-4, atol=1e-6)


def test_the_best_model_is_kept(adam, hand):
    models, _ = hand
    target = models[11].outer.weight  # passed after 12 steps, then left behind

    def distance(model):
        return jnp.sum(jnp.abs(model.outer.weight - target))

    model, history = fit(mse, Net(), (X, Y), adam, 25, key=KEY, batch_size=8, check=4, validate=distance, patience=2)
    close(model, models[11])
    assert history["step"].tolist() == [0, 4, 8, 12, 16, 20], "two checks without improvement end it"
    assert history["validation"].argmin() == 3 and len(history["loss"]) == 20
    untouched, _ = fit(mse, Net(), (X, Y), adam, 4, key=KEY, validate=lambda m: -distance(m) * 0 + 1.0)
    close(untouched, Net(), rtol=0, atol=0)


def test_parts_in_the_order_given_at_their_ratios():
    """Two numbers that chase each other, against the same game played by hand."""
    model = {"a": jnp.float32(1.0), "b": jnp.float32(0.0)}
    parts = {  # not alphabetical
        "z": Part(lambda m, batch, key: (m["a"] - m["b"]) ** 2, optax.sgd(0.1), lambda m: m["b"]),
        "g": Part(lambda m, batch, key: (m["a"] + m["b"] - 3) ** 2, optax.sgd(0.2), lambda m: m["a"], every=3),
    }
    out, history = fit(parts, model, lambda key, i: (), steps=10, key=KEY)
    a, b = 1.0, 0.0
    g_losses = []
    for i in range(10):
        b -= 0.1 * 2 * (b - a)
        if i % 3 == 0:
            g_losses.append((a + b - 3) ** 2)
            a -= 0.2 * 2 * (a + b - 3)
    assert float(out["a"]) == pytest.approx(a, rel=1e-5) and float(out["b"]) == pytest.approx(b, rel=1e-5)
    assert np.flatnonzero(~np.isnan(history["g"])).tolist() == [0, 3, 6, 9]
    np.testing.assert_allclose(history["g"][::3], g_losses, rtol=1e-5)
    assert not np.isnan(history["z"]).any()


def test_a_loss_that_is_not_finite_is_named(adam):
    def bad(model, batch, key):
        return jnp.sum(model) * jnp.where(batch == 7, jnp.nan, 1.0)

    with pytest.raises(FloatingPointError, match="loss is nan at step 7"):
        fit(bad, jnp.ones(2), lambda key, i: i, adam, 10, key=KEY, check=3)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(optimizer=None), "needs an optimizer"),
        (dict(steps=0), "steps=0"),
        (dict(check=0), "check=0"),
        (dict(ema=1.0), "ema must lie between 0 and 1, got 1.0"),
        (dict(patience=3), "patience"),
        (dict(data=lambda key, i: 0, batch_size=2), "batch_size"),
        (dict(where=lambda m: m["n"]), "'loss' trains nothing"),
        (dict(loss={"step": Part(lambda m, b, k: 0.0, optax.sgd(1.0))}, optimizer=None), "'step'"),
        (dict(loss={}, optimizer=None), "no parts"),
        (dict(loss={"p": Part(lambda m, b, k: 0.0, optax.sgd(1.0))}), "their own"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    arguments = dict(
        loss=lambda m, b, k: m["w"] ** 2,
        model={"w": jnp.float32(1.0), "n": jnp.int32(1)},
        data=jnp.zeros(3),
        optimizer=optax.sgd(0.1),
        steps=3,
        key=KEY,
    )
    with pytest.raises(ValueError, match=words):
        fit(**(arguments | options))


SCRIPT = """
import equinox as eqx, jax, jax.numpy as jnp, optax
from anabranch.fit import fit

def train(key, name="whole"):
    x = jnp.linspace(-1, 1, 32)[:, None]
    loss = lambda m, batch, key: jnp.mean((jax.vmap(m)(batch) - 2 * batch) ** 2)
    model, history = fit(loss, eqx.nn.MLP(1, 1, 4, 0, key=key), x, optax.sgd(0.5), 50, key=key)
    return model, {"final": float(history["loss"][-1]), "data": ["numbers.csv"], "name": name}
"""


def test_recorded_training(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "claims").mkdir()
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "line.py").write_text(SCRIPT)
    (tmp_path / "numbers.csv").write_text("1,2,3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "WEIGHTS", tmp_path / "weights")
    path, meta = training.train("line")
    assert path == tmp_path / "weights" / "line.safetensors"
    assert meta["script"] == hashlib.sha256(SCRIPT.encode()).hexdigest()
    assert meta["data"] == {"numbers.csv": hashlib.sha256(b"1,2,3").hexdigest()}
    assert meta["final"] < 1e-3 and state.read_meta(path) == meta
    model = training.load("line", eqx.nn.MLP(1, 1, 4, 0, key=KEY))
    assert float(model(jnp.ones(1))[0]) == pytest.approx(2.0, abs=0.05)
    with pytest.raises(state.StateError):
        training.load("line", eqx.nn.MLP(1, 2, 4, 0, key=KEY))
    with pytest.raises(ValueError, match="always trains from the beginning"):
        training.train("line", start=path)
    (tmp_path / "training" / "line.py").write_text(SCRIPT.replace('"whole")', '"whole", start=None)'))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert training.train("line", start=path)[1]["start"] == meta | {"sha256": sha256}
    path, named = training.train("line:steep")
    assert path.name == "line_steep.safetensors" and named["slug"] == "line:steep"
    assert (meta["name"], named["name"]) == ("whole", "steep")
    jax.tree.map(np.testing.assert_array_equal, training.load("line:steep", model), model)
    with pytest.raises(LookupError, match="did you mean line"):
        training.train("lines")
    with pytest.raises(FileNotFoundError, match="anabranch train lines"):
        training.load("lines", model)
