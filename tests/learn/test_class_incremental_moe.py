import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.learn.class_incremental_moe import DEE, LIMIT, example, soft_topk


def sinkhorn(distance, k, epsilon, steps=3000):
    """The plan in float64, by alternating projections in the log domain."""
    s, N = np.asarray(distance, np.float64), len(distance)
    cost = np.stack([s**2, (s - 1) ** 2])
    near, far = -cost / cost.max() / epsilon
    g = h = 0.0
    for _ in range(steps):
        f = -np.log(N) - np.logaddexp(near + g, far + h)
        g, h = np.log(k / N) - np.logaddexp.reduce(near + f), np.log(1 - k / N) - np.logaddexp.reduce(far + f)
    return N * np.exp(f + g + near)


@pytest.mark.parametrize(("N", "k"), [(16, 4), (128, 16)])
def test_soft_topk_is_the_limit_of_sinkhorn(N, k):
    distance = 1 - 0.3 * np.random.default_rng(N).normal(size=N).astype(np.float32)
    share = np.asarray(soft_topk(jnp.asarray(distance), k, 0.02))  # at a smaller entropy Sinkhorn is slow
    np.testing.assert_allclose(share, sinkhorn(distance, k, 0.02), atol=1e-4)


def test_soft_topk_sums_to_k_and_chooses_the_nearest_at_the_paper_s_entropy():
    distance = jnp.asarray(1 - 0.3 * np.random.default_rng(0).normal(size=128), jnp.float32)
    share = soft_topk(distance, 16)
    assert float(share.sum()) == pytest.approx(16, abs=0.02)
    assert set(np.argsort(-share)[:16].tolist()) == set(np.argsort(distance)[:16].tolist())


def test_gradient_of_soft_topk_is_that_of_the_plan():
    distance = np.random.default_rng(1).uniform(0.5, 1.5, 12).astype(np.float32)
    far = int(np.argmax(np.maximum(distance**2, (distance - 1) ** 2)))  # its cost is the scale, held constant
    jacobian = np.asarray(jax.jacobian(lambda d: soft_topk(d, 3, 0.05))(jnp.asarray(distance)))
    for n in range(12):
        if n == far:
            continue
        up, down = np.float64(distance), np.float64(distance)
        up[n] += 1e-5
        down[n] -= 1e-5
        slope = (sinkhorn(up, 3, 0.05) - sinkhorn(down, 3, 0.05)) / 2e-5
        np.testing.assert_allclose(jacobian[:, n], slope, atol=1e-3)
    np.testing.assert_allclose(jacobian.sum(0), 0, atol=1e-4)


@pytest.fixture(scope="module")
def cell():
    return DEE(5, 3, N=8, k=3, learning_rate=0.01, key_rate=0.0, epsilon=0.01)


def learned(cell, x, y):
    state = cell.init(key=jax.random.PRNGKey(0))
    return state, eqx.filter_jit(type(cell).learn)(cell, state, x, y)


def test_vote_is_by_the_paper(cell):
    state = cell.init(key=jax.random.PRNGKey(0))
    x = np.random.default_rng(2).normal(size=5).astype(np.float32)
    share, cosine = (np.asarray(a, np.float64) for a in cell.gate(state.keys, x))
    scores = LIMIT * np.tanh((np.asarray(state.weight, np.float64) @ x + np.asarray(state.bias)) / LIMIT)
    by_hand = sum(share[n] * cosine[n] * share[n] * scores[n] for n in range(8)) / sum(share * cosine)
    np.testing.assert_allclose(cell.predict(state, x), by_hand, atol=1e-5)


def test_only_the_true_class_of_the_chosen_moves_and_by_its_sign(cell):
    x = np.random.default_rng(2).normal(size=5).astype(np.float32)
    before, after = learned(cell, x, 1)
    share, cosine = cell.gate(before.keys, x)
    assert 0 < int((share > 0).sum()) < 8
    w = np.asarray(before.weight)
    sign = np.asarray(jnp.sign(share * cosine * share / (share @ cosine)))  # of each expert's part in the vote
    expected = w.copy()
    for n in np.flatnonzero(share):
        expected[n, 1] += 0.01 * (sign[n] * np.sign(x) - 1e-4 * w[n, 1])
    np.testing.assert_allclose(after.weight, expected, atol=1e-7)
    still = np.ones_like(w, bool)
    still[np.flatnonzero(share), 1] = False
    assert (np.asarray(after.weight)[still] == w[still]).all()


def test_one_step_is_that_of_torch(cell):
    torch = pytest.importorskip("torch")
    xs = np.random.default_rng(4).normal(size=(6, 5)).astype(np.float32)
    state = cell.init(key=jax.random.PRNGKey(0))
    for i, x in enumerate(xs):
        share, cosine = (torch.tensor(np.array(a)) for a in cell.gate(state.keys, x))
        weight = torch.tensor(np.array(state.weight), requires_grad=True)
        bias = torch.tensor(np.array(state.bias), requires_grad=True)
        outputs = torch.tanh((weight @ torch.tensor(x) + bias) / LIMIT) * LIMIT
        similar = cosine * share
        ensemble = (outputs * share[:, None] * similar[:, None]).sum(0) / similar.sum()
        np.testing.assert_allclose(cell.predict(state, x), ensemble.detach(), atol=1e-5)
        (-ensemble[i % 3]).backward()
        expected = []
        for p in (weight, bias):
            assert p.grad is not None
            update = 0.01 * (-p.grad.sign() - 1e-4 * p.detach())  # the official code adds the decay
            expected.append(torch.where(p.grad == 0, p, p + update).detach())
        state = eqx.filter_jit(type(cell).learn)(cell, state, x, i % 3)
        np.testing.assert_allclose(state.weight, expected[0], atol=1e-7)
        np.testing.assert_allclose(state.bias, expected[1], atol=1e-7)


@pytest.mark.parametrize(("x", "y"), [(np.full(5, np.nan), 0), (np.ones(5), 3), (np.ones(5), -1)])
def test_bad_events_are_counted_and_not_learned(cell, x, y):
    before, after = learned(cell, x.astype(np.float32), y)
    assert int(after.rejected) == 1
    assert all(np.array_equal(a, b) for a, b in zip(before[:5], after[:5]) if not isinstance(a, tuple))


def test_zeros_select_nobody(cell):
    before, after = learned(cell, np.zeros(5, np.float32), 0)
    assert np.array_equal(before.weight, after.weight) and int(after.seen.sum()) == 0
    assert np.asarray(cell.predict(before, jnp.zeros(5))).tolist() == [0, 0, 0]


def test_keys_stay_of_unit_length():
    moving = DEE(5, 3, N=8, k=3, key_rate=0.1, epsilon=0.05)
    before, after = learned(moving, np.random.default_rng(3).normal(size=5).astype(np.float32), 1)
    assert not np.array_equal(before.keys, after.keys)
    np.testing.assert_allclose(np.linalg.norm(after.keys, axis=1), 1, atol=1e-6)


def test_contract():
    report = contract.check(*example())
    assert report.ok, report


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"k must lie in .* got 8"):
        DEE(5, 3, N=8, k=8)
