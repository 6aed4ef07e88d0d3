"""The arena, its worlds, its page and its command."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.decide.arena import PROBLEMS, Score, _game, chosen, play_all, ranked
from anabranch.decide.arena_report import record
from anabranch.decide.base import DynamicRegret, Static
from anabranch.decide.metrical import dynamic_optimum
from anabranch.decide.rates import mean
from anabranch.decide.virtual_plus import VirtualPlus, competitive_ratio, picks
from anabranch.decide.worlds import Items, Slots, followers
from anabranch.drive import play


def call(*args, code=0):
    result = CliRunner().invoke(app, ["arena", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_command_writes_a_page_and_prints_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "--problems", "stochastic,knapsack", "--policies", "UCB1,epsilon-greedy", "--seeds", 2, "--horizon", 500
    found = json.loads(call(*small, "--json").stdout)
    assert [(row["problem"], row["policy"]) for row in found["scores"][-1:]] == [("knapsack", "UCB1")]
    assert len(found["scores"]) == 3 and found["report"] == "arena.html"
    blind = found["scores"][-1]
    assert blind["over_budget"] > 100  # UCB1 knows of no budget, and spends more than the 50 that there are
    page = (tmp_path / "arena.html").read_text()
    assert page.count("<svg") == 2 and "epsilon-greedy" in page and "http" not in page.replace("http://www.w3.org", "")
    out = call(*small, "--out", tmp_path / "page.html").output
    assert "epsilon-greedy" in out and "fluid optimum" in out and (tmp_path / "page.html").exists()


def test_unknown_names_get_a_suggestion():
    assert "drifting" in call("--problems", "drifing", code=1).output
    assert "D-UCB" in call("--policies", "DUCB", code=1).output
    assert (
        "none of LinUCB plays any of knapsack" in call("--problems", "knapsack", "--policies", "LinUCB", code=1).output
    )
    assert "at least 100 rounds, got 10" in call("--horizon", 10, code=1).output
    with pytest.raises(ValueError, match="seeds must be positive, got 0"):
        play_all(seeds=0)


def test_every_policy_can_be_stepped_in_the_worlds_of_its_problem():
    for problem in PROBLEMS:
        keys = jax.random.split(jax.random.PRNGKey(0), problem.games)
        worlds = problem.worlds(200, range(1))
        for name, policy in problem.players(200).items():
            curve, _ = eqx.filter_eval_shape(_game.__wrapped__, policy, problem, worlds, keys, 200, 2)
            assert curve.shape == (problem.games, 2), name
    assert len(chosen()) == sum(len(problem.players(problem.rounds)) for problem in PROBLEMS)


def test_scores_are_those_of_a_plain_play():
    [score] = play_all(["stochastic"], ["epsilon-greedy"], seeds=2, rounds=500)
    problem = PROBLEMS[0]
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    for seed in range(2):
        world = jax.tree.map(lambda leaf, seed=seed: leaf[seed], problem.worlds(500, range(2)))
        policy = problem.players(500)["epsilon-greedy"]
        result = play(policy, world, 500, key=keys[seed], meters={"r": DynamicRegret(world)}, keep=False)
        np.testing.assert_allclose(score.score.values[seed], result.scores["r"], rtol=1e-5)
    assert score.at.tolist() == list(range(10, 501, 10)) and score.curve.shape == (2, 50)
    assert (np.diff(score.curve) >= 0).all()  # regret in expectation never falls


def test_ranks():
    def score(problem, policy, value, over=None):
        return Score(problem, policy, mean([value]), over, None, 1.0, np.array([1]), np.zeros((1, 1)))

    found = ranked([
        score("knapsack", "spent too much", 2.0, 1.0), score("knapsack", "b", 0.4, 0.0),
        score("knapsack", "a", 0.5, 0.0), score("stochastic", "y", 2.0), score("stochastic", "x", 1.0),
    ])  # fmt: skip
    assert {name: [s.policy for s in scores] for name, scores in found.items()} == {
        "stochastic": ["x", "y"], "knapsack": ["a", "b", "spent too much"],
    }  # fmt: skip
    assert [row["policy"] for row in record(found["knapsack"])] == ["a", "b", "spent too much"]


# The worlds


def test_rates_hold_and_the_oracle_knows_them():
    world = Slots(jnp.array([[0.1, 0.9], [0.8, 0.2]]), hold=500)
    meters = {"regret": DynamicRegret(world)}
    result = play(Static(jnp.array([0.0, 1.0])), world, 1000, key=jax.random.PRNGKey(0), meters=meters)
    np.testing.assert_allclose(result.scores["regret"], 500 * 0.6, rtol=1e-4)
    halves = np.asarray(result.ticks.feedback.reward).reshape(2, 500).mean(1)
    assert abs(halves - [0.9, 0.2]).max() < 0.06


def test_what_is_picked_is_counted_as_by_competitive_ratio():
    values = jax.random.uniform(jax.random.PRNGKey(1), (60,))
    policy = VirtualPlus(60, 5, 20)
    result = play(policy, Items(values, 5), 60, key=jax.random.PRNGKey(0))
    want = competitive_ratio(picks(policy, values), values, 5)
    assert want > 0
    np.testing.assert_allclose(result.ticks.feedback.reward.sum(), want, rtol=1e-6)


def test_another_forecast_is_good_in_each_block():
    world = followers(1600, seed=3, n=5, blocks=8)
    assert world.steps == 1600 and np.isfinite(np.asarray(world.astray)).all()
    alone = np.asarray(jax.vmap(lambda t: world.costs(t).following)(jnp.arange(1600))).sum(0).min()
    best = float(dynamic_optimum(world, 7))
    assert float(dynamic_optimum(world)) <= best < 0.9 * alone


def test_bad_worlds():
    with pytest.raises(ValueError, match=r"to 1\.5"):
        Slots(jnp.array([[0.5, 1.5]]))
    with pytest.raises(ValueError, match="rows, arms"):
        Slots(jnp.array([0.5]))
    with pytest.raises(ValueError, match="hold must be at least one round, got 0"):
        Slots(jnp.array([[0.5]]), hold=0)
