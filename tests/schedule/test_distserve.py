"""DistServe: queueing theory, hand-over between engines, and placements that keep what they promise."""

import numpy as np
import pytest

from anabranch.schedule.baselines import Chunked
from anabranch.schedule.cluster import DEVICES, MODELS, Fitted, Roofline
from anabranch.schedule.distserve import DistServe, Goals, best_split, phase, place, splits, ttft_md1
from anabranch.schedule.scheduler import Engine
from anabranch.schedule.serving import goodput, simulate_serving
from anabranch.schedule.workload import Workload


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    return Workload(np.zeros(150), rng.integers(100, 1500, 150), rng.integers(1, 60, 150))


def test_waiting_for_equal_prompts_is_that_of_the_formula():
    cost = Fitted((100.0, 0.0, 0.0))
    load = Workload(np.zeros(12_000), np.full(12_000, 600), np.full(12_000, 1)).poisson(6.0, 1)
    engines = [Engine(cost, role="prefill"), Engine(cost, role="decode")]
    result = simulate_serving(load, engines, DistServe())
    assert result.ttft.mean() == pytest.approx(ttft_md1(6.0, 0.1), rel=0.05)
    with pytest.raises(ValueError, match=r"rate \* duration must be below 1, got 1"):
        ttft_md1(10.0, 0.1)


def test_short_prompts_go_together_and_long_ones_alone():
    load = Workload(np.zeros(5), np.array([200, 200, 200, 700, 100]), np.full(5, 2))
    engines = [Engine(Fitted(), role="prefill"), Engine(Fitted(), role="decode")]
    log = simulate_serving(load, engines, DistServe(saturating=512), record=True).log
    assert [prompts for engine, _, _, prompts, _ in log if engine == 0 and prompts] == [[0], [1, 2], [3], [4]]


def test_a_request_goes_to_the_shortest_queue_and_its_cache_to_the_least_busy_engine(requests):
    load = requests.poisson(30.0, 0)  # more than they keep up with
    engines = splits(Engine(Fitted()), 4)[1]
    assert [engine.role for engine in engines] == ["prefill", "prefill", "decode", "decode"]
    result = simulate_serving(load, engines, DistServe(), record=True)
    assert np.array_equal(result.tokens, load.output)
    work = {i: sum(sum(chunks) for engine, *_, chunks in result.log if engine == i) for i in range(4)}
    assert work[2] == work[3] == 0 and 0.7 < work[0] / work[1] < 1.4
    decoded = {i: sum(len(ids) for engine, _, ids, *_ in result.log if engine == i) for i in range(4)}
    assert decoded[0] == decoded[1] == 0 and 0.7 < decoded[2] / decoded[3] < 1.4
    assert decoded[2] + decoded[3] == (load.output - 1).sum()  # the first token comes from the prefill


def test_a_cache_waits_where_it_is_until_there_is_room(requests):
    load = requests.poisson(6.0, 0)
    engines = [Engine(Fitted(), role="prefill"), Engine(Fitted(), role="decode", kv_tokens=2400)]
    result = simulate_serving(load, engines, DistServe())
    assert np.array_equal(result.tokens, load.output)
    wide = simulate_serving(load, [engines[0], Engine(Fitted(), role="decode")], DistServe())
    assert result.ttft.mean() >= wide.ttft.mean() and result.tpot.mean() > wide.tpot.mean()


def test_tight_gaps_between_tokens_are_what_it_is_for(requests):
    load, engine = requests.poisson(8.0, 0), Engine(Fitted())
    ours = simulate_serving(load, splits(engine, 2)[0], DistServe())
    theirs = simulate_serving(load, [engine] * 2, Chunked())
    assert ours.percentile("tpot", 90) < theirs.percentile("tpot", 90)


def test_a_placement_keeps_what_it_promises(requests):
    make = lambda rate: requests.poisson(rate, 0)
    goals = Goals(ttft=1.0, tpot=0.06)
    engines = [Engine(Roofline(MODELS["llama-3-8b"], DEVICES["a100-40g"], n), devices=n) for n in (1, 2)]
    found = place(make, engines, goals, rate=12.0)
    assert found.prefill.role == "prefill" and found.decode.role == "decode" and len(found.engines) >= 2
    for engine in (found.prefill, found.decode):
        others = [phase(Engine(one.cost, devices=one.devices, role=engine.role), make, goals) for one in engines]
        assert phase(engine, make, goals) == max(others)
    result = simulate_serving(make(12.0), found.engines, DistServe())
    assert result.attainment(goals.ttft, goals.tpot) >= 0.8  # 0.9 of each phase alone
    with pytest.raises(ValueError, match="no engine meets the goal for prefill"):
        place(make, engines[:1], Goals(ttft=1e-4, tpot=0.06), rate=1.0)


def test_the_best_split_is_the_best(requests):
    make, goals = lambda rate: requests.poisson(rate, 0), Goals(ttft=1.0, tpot=0.05)
    found = best_split(make, Engine(Fitted()), 3, goals, high=32)

    def value(some):
        serve = lambda load: simulate_serving(load, some, DistServe())
        return goodput(make, serve, ttft=goals.ttft, tpot=goals.tpot, high=32, close=0.04)

    assert value(found) == max(map(value, splits(Engine(Fitted()), 3))) > 0


def test_refused():
    with pytest.raises(ValueError, match="saturating must be positive"):
        DistServe(saturating=0)
