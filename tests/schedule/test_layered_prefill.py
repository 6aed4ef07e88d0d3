"""Layered prefill: its groups, what each iteration does by hand, and that nobody's decode waits for a prompt."""

import numpy as np
import pytest

from anabranch.schedule.baselines import Chunked
from anabranch.schedule.cluster import DEVICES, MODELS, Fitted, Roofline
from anabranch.schedule.layered_prefill import LayeredPrefill, expert_traffic, groups_for
from anabranch.schedule.scheduler import Engine
from anabranch.schedule.serving import simulate_serving
from anabranch.schedule.workload import Workload


def test_groups():
    assert [groups_for(n) for n in (1, 512, 513, 1024, 2048, 4096, 4097)] == [1, 1, 2, 2, 4, 8, 16]
    assert groups_for(10_000, most=4) == 4
    assert [groups_for(n, unit=8) for n in (8, 9, 17, 64, 65)] == [1, 2, 4, 8, 16]


def test_by_hand():
    cost = Fitted((0, 1.0, 0.0), (0, 0.0, 1.0), (0, 0, 0))  # a token of a prompt takes 1 ms, a decode 1 ms
    load = Workload(np.array([0.0, 0.001, 0.002]), np.array([600, 500, 40]), np.array([2, 4, 3]))
    result = simulate_serving(load, [Engine(cost)], LayeredPrefill(), record=True)
    # The first alone in two halves; then those that came meanwhile, together, in two halves beside its decode.
    steps = [(decoded, prefilled) for _, _, decoded, prefilled, _ in result.log]
    assert steps[:4] == [([], [0]), ([], [0]), ([0], [1, 2]), ([], [1, 2])]
    np.testing.assert_allclose([start for _, start, *_ in result.log[:4]], [0, 0.3, 0.6, 0.6 + 0.271])
    np.testing.assert_allclose(result.ttft + load.arrival, [0.6, 0.6 + 0.271 + 0.27, 0.6 + 0.271 + 0.27])
    assert np.array_equal(result.tokens, load.output)


@pytest.mark.parametrize("tokens", [800, 20_000])
def test_every_decode_goes_on_in_every_iteration(tokens):
    rng = np.random.default_rng(0)
    load = Workload(np.zeros(60), rng.integers(1, 700, 60), rng.integers(1, 40, 60)).poisson(10.0, 0)
    result = simulate_serving(load, [Engine(Fitted(), kv_tokens=tokens)], LayeredPrefill(most=256), record=True)
    assert np.array_equal(result.tokens, load.output)
    if not result.preemptions:
        for i in range(60):
            turns = [n for n, (_, _, decoded, _, _) in enumerate(result.log) if i in decoded]
            assert turns == list(range(turns[0], turns[0] + len(turns))) if turns else load.output[i] == 1


def test_a_prompt_of_a_mixture_reads_less():
    cost = Roofline(MODELS["qwen3-30b-a3b"], DEVICES["h100"])
    layered, chunked = expert_traffic(cost, decode=4, tokens=4096, groups=8, chunk=512)
    assert layered < 0.5 * chunked
    layered, chunked = expert_traffic(cost, decode=256, tokens=4096, groups=8, chunk=512)
    assert 0.9 < layered / chunked <= 1.01  # the decodes read nearly all experts anyway


def test_the_same_goal_with_less_waiting_than_chunks():
    rng = np.random.default_rng(1)
    load = Workload(np.zeros(300), rng.integers(1000, 4000, 300), rng.integers(5, 60, 300)).poisson(8.0, 0)
    engine = Engine(Roofline(MODELS["qwen3-30b-a3b"], DEVICES["h100"], 2))
    ours, chunks = (simulate_serving(load, [engine], s) for s in (LayeredPrefill(layers=48), Chunked(chunk=512)))
    assert ours.ttft.mean() < 0.85 * chunks.ttft.mean() and ours.weight_bytes < 0.85 * chunks.weight_bytes


@pytest.mark.parametrize("bad", [{"layers": 0}, {"most": 0}])
def test_refused(bad):
    with pytest.raises(ValueError, match="must be positive, got 0"):
        LayeredPrefill(**bad)
