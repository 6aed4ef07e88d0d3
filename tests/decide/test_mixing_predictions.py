"""Mixtures of predictors: weights by hand, the tree of shortest paths, and the caches of the claim."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.decide.test_metrical import line

from anabranch.cell import Decision, Feedback, Maybe
from anabranch.claim import load
from anabranch.contract import check
from anabranch.decide.metrical import MTS, Move, Work, dynamic_optimum
from anabranch.decide.mixing_predictions import BanditShareMix, Cheapest, LayeredMix, ShareMix, _above, _couple, example
from anabranch.drive import play, play_seeds


def keys(n):
    return jax.vmap(jax.random.PRNGKey)(jnp.arange(n))


def test_weights_by_hand():
    mix = ShareMix(3, diameter=4.0, epsilon=0.5, share=0.3)
    w = np.array([0.5, 0.3, 0.2])
    lost = w * (1 - np.exp(-np.array([0.0, 1.0, 2.0])))
    kept = w - lost + 0.3 * lost.sum() / 3
    np.testing.assert_allclose(mix.reweigh(jnp.asarray(w), jnp.array([0.0, 1.0, 2.0])), kept / kept.sum(), rtol=1e-6)
    for r in (0.1, 1.0, 80.0):
        eta = mix.eta(0.5, r)
        np.testing.assert_allclose((1 + eta) * (1 + eta * r / 2), 1.5 * 0.95, rtol=1e-6)
    assert mix.alpha == 0.3 and ShareMix(3, 4.0, 0.5).alpha == 0.05


@pytest.mark.parametrize("by_transport", [False, True])
def test_follows_its_weights(by_transport):
    """Over many keys the shares of whom is followed are the weights, which do not depend on the key."""
    env = line(30, 4)
    env = MTS(env.service * jnp.array([0.1, 1.0, 0.5, 1.0]), env.move)
    mix = ShareMix(4, diameter=1.0, epsilon=1.0, by_transport=by_transport)
    result = play_seeds(mix, env, 30, keys(4000))
    w = np.asarray(result.state["policy"].w)
    assert (w == w[0]).all() and w[0].max() - w[0].min() > 0.1
    share = np.bincount(np.asarray(result.state["policy"].i), minlength=4) / 4000
    np.testing.assert_allclose(share, w[0], atol=4 * 0.5 / 4000**0.5)


def test_transport_moves_more_cheaply():
    """Predictors 0 and 1 are close to each other, and so are 2 and 3: when 1 gets worse, its weight goes to 0."""
    apart = np.array([[0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 1], [9, 9, 1, 0]], float)
    service = np.zeros((200, 4))
    service[:, 1], service[:, 3] = 1.0, 1.0
    move = np.broadcast_to(apart, (200, 4, 4)).copy()
    move[0] = 0.0
    env = MTS(service, move)

    def moves(by_transport):
        ticks = play_seeds(ShareMix(4, 9.0, by_transport=by_transport), env, 200, keys(200), keep=True).ticks
        return -float(ticks.feedback.reward.sum() + service[0][np.asarray(ticks.decision.action.to)].sum())

    assert moves(True) < 0.5 * moves(False)


def test_a_change_is_noticed_by_shares_and_not_by_hedge():
    service = np.zeros((3000, 2))
    service[:2000, 1] = service[2000:, 0] = 1.0
    env = MTS(service, np.broadcast_to(1.0 - np.eye(2), (3000, 2, 2)))
    shares, hedge = (
        play_seeds(ShareMix(2, 1.0, share=share), env, 3000, keys(20)).state["policy"].w[0] for share in (None, 0.0)
    )
    assert shares[1] > 0.9 and hedge[1] < 0.1


def test_one_query_learns_only_from_exploring():
    mix = BanditShareMix(3, diameter=1.0, epsilon=0.8)
    state, told = mix.init(), Feedback(jnp.array(-1.0), info=jnp.array(0.7))
    move = Move(state.i, (state.i + 1) % 3)
    same = mix.learn(state, (), Decision(Move(state.i, state.i), 0.0, jnp.array(False)), told)
    np.testing.assert_allclose(same.w, state.w, rtol=1e-6)
    new = mix.learn(state, (), Decision(move, 0.0, jnp.array(True)), told)
    eta = mix.eta(0.4, 15.0)
    other = np.delete(np.asarray(new.w), int(move.query))
    lost = 1 - np.exp(-eta * 0.7 * 3 / 0.2)
    np.testing.assert_allclose(
        new.w[move.query] / other, (1 - lost + 0.08 * lost / 3) / (1 + 0.08 * lost / 3), rtol=1e-5
    )


def test_one_query_finds_the_best():
    service = np.tile([1.0, 0.5, 1.0], (20_000, 1))
    env = MTS(service, np.broadcast_to(1.0 - np.eye(3), (20_000, 3, 3)), astray=service + 0.5)
    result = play_seeds(BanditShareMix(3, 1.0, epsilon=0.5), env.asked(), 20_000, keys(8))
    assert float(result.state["policy"].w[:, 1].mean()) > 0.9
    with pytest.raises(AssertionError):  # without `astray` there is no exploring
        blind = play(BanditShareMix(3, 1.0), MTS(service, env.move).asked(), 200, key=jax.random.PRNGKey(0))
        np.testing.assert_array_less(-np.inf, blind.ticks.feedback.reward)


def test_min_operator_by_hand():
    service = np.array([[1.0, 1.0], [1.0, 0.0], [0.5, 0.0], [0.0, 5.1], [0.0, 0.0]])
    env = MTS(service, np.zeros((5, 2, 2)))
    actions = play(Cheapest(2), env, 5, key=jax.random.PRNGKey(0)).ticks.decision.action.to
    assert actions.tolist() == [0, 0, 1, 0, 0]  # 2.5 is more than twice 1; then 6.1 more than twice 2.5


def test_tree_is_that_of_the_work_function():
    n, steps = 4, 60
    env = line(steps, n, seed=3)
    policy, work = LayeredMix(n), Work(n)
    state, ways = policy.init(key=jax.random.PRNGKey(0)), work.init()
    act = jax.jit(policy.act)
    branchings = 0
    for t in range(steps):
        costs = env.costs(t)
        state, decision = act(state, costs)
        ways, _ = work.step(ways, costs)
        leaves = np.asarray(state.work[:n])
        np.testing.assert_allclose(leaves - leaves.min(), np.asarray(ways[0] - ways.min()), atol=1e-4)
        parent, q, picked = (np.asarray(v) for v in (state.parent, state.q, state.picked))
        used = np.asarray(_above(state.parent))[:n].any(0)
        used[-1] = False
        for node in set(parent[used].tolist()):
            children = used & (parent == node)
            assert children.sum() > 1 or node == 2 * n - 1  # what does not branch is contracted
            np.testing.assert_allclose(q[children].sum(), 1, atol=1e-5)
            assert picked[children].sum() == 1
            branchings += node != 2 * n - 1
        v = int(decision.action.to)
        while v != 2 * n - 1:
            assert picked[v]
            v = parent[v]
        assert (state.work[:-1] >= state.work[state.parent[:-1]] - 1e-5).all()
    assert branchings > steps / 2


def test_picks_change_as_rarely_as_can_be():
    """Two parents, 6 and 7, of three children each."""
    parent = jnp.array([6, 6, 6, 7, 7, 7, 7, 7])
    old, new = jnp.array([[0.5, 0.3, 0.2, 1.0, 0.0, 0.0, 0, 0], [0.2, 0.4, 0.4, 0.0, 0.3, 0.7, 0, 0]])
    n = 20_000
    first = jax.random.categorical(jax.random.PRNGKey(0), jnp.log(old[:3]), shape=(n,))
    picked = (jnp.arange(8) == first[:, None]) | (jnp.arange(8) == 3)
    after = jax.vmap(lambda p, key: _couple(old, new, p, parent, key))(
        picked, jax.random.split(jax.random.PRNGKey(1), n)
    )
    assert (after[:, :3].sum(1) == 1).all() and (after[:, 3:6].sum(1) == 1).all() and not after[:, 6:].any()
    np.testing.assert_allclose(after.mean(0), new, atol=3 * 0.5 / n**0.5)
    assert abs(float((after & picked)[:, :3].any(1).mean()) - 0.7) < 3 * 0.5 / n**0.5


def test_tree_is_followed_by_its_probabilities_and_close_to_the_best_sequence():
    n, steps, many = 4, 37, 2000
    env = line(200, n)
    env = MTS(env.service[:steps], env.move[:steps])
    result = play_seeds(LayeredMix(n), env, steps, keys(many), keep=True)
    paid, best = -float(result.ticks.feedback.reward.sum(1).mean()), float(dynamic_optimum(env))
    assert best <= paid < 1.4 * best and paid < 0.9 * float(dynamic_optimum(env, 0))
    tree = jax.tree.map(lambda leaf: np.asarray(leaf)[0], result.state["policy"])
    up = np.asarray(_above(jnp.asarray(tree.parent)))[:n] & (np.arange(2 * n) < 2 * n - 1)
    p = np.where(up, tree.q, 1.0).prod(1)
    assert p.max() < 0.9  # not a matter of course: mostly one leaf has nearly all
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    share = np.bincount(np.asarray(result.ticks.decision.action.to)[:, -1], minlength=n) / many
    np.testing.assert_allclose(share, p, atol=4 * 0.5 / many**0.5)


def test_caches_equal_plain_ones():
    """Misses and distances of the caches in the claim, against sets."""
    _, claim = load("mixing_predictions")
    requests, k = np.random.default_rng(0).zipf(1.3, 400) % 60, 8
    miss, move = claim.paging(jnp.asarray(requests), k, 60)
    caches = [OrderedDict((-1 - i, None) for i in range(k)) for _ in range(2)]
    before = [set(c) for c in caches]
    for t, page in enumerate(requests.tolist()):
        for rule, cache in enumerate(caches):
            assert bool(miss[t, rule]) == (page not in cache)
            if page not in cache:
                cache.popitem(last=False)
                cache[page] = None
            elif rule == 0:
                cache.move_to_end(page)
        after = [set(c) for c in caches]
        expected = [[len(b - a) for b in after] for a in before]
        np.testing.assert_array_equal(move[t, :2, :2], expected)
        before = after
    assert (np.diagonal(move, axis1=1, axis2=2) == miss).all()


@pytest.mark.parametrize("policy", [ShareMix(3, 1.0), BanditShareMix(3, 1.0), LayeredMix(3)])
def test_contract(policy):
    costs, (outcome, _) = example()[1]
    decision = outcome[1]._replace(aux=np.arange(64) % 3 == 0) if isinstance(policy, BanditShareMix) else outcome[1]
    xs = costs, Maybe((outcome[0], decision, outcome[2]), np.arange(64) > 0)
    report = check(policy, xs, key=jax.random.PRNGKey(0))
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ShareMix(0, 1.0), "n = 0"),
        (lambda: ShareMix(2, 0.0), "diameter.*0.0"),
        (lambda: ShareMix(2, 1.0, 0.0), "epsilon.*0.0"),
        (lambda: BanditShareMix(2, 1.0, most=-1.0), "most.*-1.0"),
        (lambda: ShareMix(2, 1.0, share=1.0), "share.*1.0"),
        (lambda: LayeredMix(1), "n = 1"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
