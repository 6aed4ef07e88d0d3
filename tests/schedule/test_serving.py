"""The serving simulator: queueing theory, conservation of tokens, hand cases, and what is refused."""

import numpy as np
import pytest

from anabranch.schedule.baselines import FCFS, SRPT, Chunked, Orca, running
from anabranch.schedule.cluster import DEVICES, MODELS, Fitted, Roofline, Work
from anabranch.schedule.scheduler import DECODING, RECOMPUTE, SWAP, SWAPPED, Batch, Engine, Scheduler
from anabranch.schedule.seats import Seats
from anabranch.schedule.serving import goodput, simulate_serving
from anabranch.schedule.workload import Workload

ALL = [FCFS(), Orca(), Chunked(chunk=64), SRPT()]


def mixed(n, seed=0, rate=3.0):
    rng = np.random.default_rng(seed)
    load = Workload(np.zeros(n), rng.integers(1, 400, n), rng.integers(1, 60, n))
    return load.poisson(rate, seed)


@pytest.mark.parametrize("scheduler", ALL, ids=lambda s: type(s).__name__)
def test_every_request_gets_its_tokens_in_order_also_in_little_memory(scheduler):
    load = mixed(80, rate=20.0)
    for tokens in (512, 20_000):
        result = simulate_serving(load, [Engine(Fitted(), kv_tokens=tokens, max_seqs=32)], scheduler)
        assert np.array_equal(result.tokens, load.output) and not result.rejected
        assert (result.tbt > 0).all() and (result.ttft > 0).all()
        assert (result.preemptions > 0) == (tokens == 512)
        assert result.busy <= result.seconds + 1e-9


@pytest.mark.parametrize("scheduler", ALL, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("tokens", [700, 20_000])
def test_iterations_run_at_once_are_those_one_by_one(scheduler, tokens):
    load = mixed(60, seed=1, rate=8.0)
    for cost in (Fitted(), Roofline(MODELS["llama-3-8b"], DEVICES["a100-40g"])):
        engine = Engine(cost, kv_tokens=tokens)
        fast, slow = (simulate_serving(load, [engine], scheduler, fast_forward=f) for f in (True, False))
        np.testing.assert_allclose(fast.emitted, slow.emitted, rtol=1e-9)
        assert (fast.iterations, fast.preemptions) == (slow.iterations, slow.preemptions)
        assert fast.weight_bytes == pytest.approx(slow.weight_bytes)


def test_an_engine_runs_on_while_others_are_busy():
    asked = []

    class Counted(FCFS):
        def act(self, state, x):
            asked.append(x.now)
            return FCFS.act(self, state, x)

    load, engines = mixed(150, seed=2, rate=8.0), [Engine(Fitted())] * 3
    fast = simulate_serving(load, engines, Counted())
    assert len(asked) < 6 * len(load) < fast.iterations
    slow = simulate_serving(load, engines, FCFS(), fast_forward=False)
    np.testing.assert_allclose(fast.emitted, slow.emitted, rtol=1e-9)
    assert (fast.iterations, fast.peak) == (slow.iterations, slow.peak)


@pytest.mark.parametrize(
    "max_seqs, tokens, said", [(3, 96, ([0, 1, 2], [], 0)), (2, 96, ([1, 2], [], 1)), (3, 64, ([1, 2], [0], 0))]
)
def test_the_last_to_come_are_preempted_wherever_they_sit(max_seqs, tokens, said):
    seats = Seats(Engine(Fitted(), kv_tokens=tokens, max_seqs=max_seqs), 0, False)
    seats.id[:3] = 5, 1, 3
    for slot in range(3):
        seats.put(slot, DECODING)
    seats.done[:3], seats.blocks[:3] = 16, 1
    seats.free -= 3
    assert running(seats.view(0.0)) == said


def test_one_request_by_hand():
    cost = Fitted((10, 0.1, 0.0), (20, 0.01, 1.0), (0, 0, 0))
    result = simulate_serving(Workload.synthetic(1, prompt=100, output=3), [Engine(cost)], FCFS())
    np.testing.assert_allclose(result.emitted, [0.020, 0.020 + 0.022, 0.042 + 0.02201])
    assert result.ttft[0] == pytest.approx(0.02) and result.tpot[0] == pytest.approx((0.022 + 0.02201) / 2)


def test_waiting_is_that_of_a_queue_with_equal_service():
    """M/D/1: a mean wait of ρD / 2(1 - ρ), and by Little's law λ times as many that wait."""
    n, service, load = 12_000, 0.1, 0.6
    cost = Fitted((100.0, 0.0, 0.0))
    requests = Workload(np.zeros(n), np.full(n, 10), np.full(n, 1)).poisson(load / service, 3)
    result = simulate_serving(requests, [Engine(cost, max_seqs=1)], FCFS())
    wait = result.ttft.mean() - service
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.1)
    starts, ends = np.sort(requests.arrival), np.sort(requests.arrival + result.e2e)
    times = np.linspace(0, starts[-1], 20_000)
    inside = np.searchsorted(starts, times) - np.searchsorted(ends, times)
    assert inside.mean() == pytest.approx(load / service * result.e2e.mean(), rel=0.05)


def test_what_a_chunk_costs():
    cost = Fitted((10, 0.1, 0.001), (20, 0.01, 1.0), (0, 0, 0))
    whole = cost.iteration(Work.of([100], [0]))
    parts = [cost.iteration(Work.of([50], [done])) for done in (0, 50)]
    assert sum(parts) - whole == pytest.approx(0.010)  # the constant once more
    both = cost.iteration(Work.of([100], [0], [50, 50]))
    assert both == pytest.approx(whole + 0.020 - 0.010 + 0.001 + 0.002)


def test_the_roofline_knows_its_limits():
    spec, device = MODELS["llama-3-8b"], DEVICES["a100-80g"]
    assert spec.params == pytest.approx(8.03e9, rel=0.01) and spec.kv_bytes == 131_072
    assert MODELS["llama-3-70b"].params == pytest.approx(70.6e9, rel=0.01)
    assert MODELS["qwen3-30b-a3b"].params == pytest.approx(30.5e9, rel=0.02)
    cost = Roofline(spec, device)
    decode = cost.iteration(Work.of(decode=[1000]))
    assert decode > spec.params * 2 * 0.9 / device.bandwidth  # the weights must be read
    long = cost.iteration(Work.of([8192], [0]))
    assert long > 2 * spec.active * 8192 / device.flops
    np.testing.assert_allclose(
        cost.decode_steps(Work.of(decode=[10, 20]), 5),
        [cost.iteration(Work.of(decode=[10 + k, 20 + k])) for k in range(5)],
    )
    after, first = (cost.iteration(Work.of([4096], [done])) for done in (8192, 0))
    assert after - first == pytest.approx(4 * 32 * 128 * spec.layers * 4096 * 8192 / (0.6 * device.flops))
    moe = Roofline(MODELS["qwen3-30b-a3b"], device)
    assert moe.loaded(1) == pytest.approx(8) and moe.loaded(1e6) == pytest.approx(128)
    half = Work.of([512], [0], [100], layers=0.5)
    assert moe.weight_bytes(half) < moe.weight_bytes(half._replace(layers=1.0))


def test_prefill_and_decode_on_engines_of_their_own():
    load = mixed(60, seed=2)
    engines = [Engine(Fitted(), role="prefill"), Engine(Fitted(), role="decode", link=1e9)]
    result = simulate_serving(load, engines, FCFS())
    assert np.array_equal(result.tokens, load.output)
    moved = load.prompt[load.output > 1].sum() * Fitted().kv_bytes / 1e9
    assert result.transfer == pytest.approx(moved)
    quick = [Engine(Fitted(), role="prefill"), Engine(Fitted(), role="decode")]
    result, together = (simulate_serving(load, some, FCFS()) for some in (quick, [Engine(Fitted())] * 2))
    assert result.percentile("tbt", 99) < together.percentile("tbt", 99)  # no prompt comes between two tokens


class Hold(Scheduler):
    """Sends whoever decodes away after each token, by a way that is given."""

    how: int = SWAP

    def act(self, state, x):
        swapped = np.flatnonzero(x.status == SWAPPED).tolist()
        if x.decoding and (others := x.prompts + swapped):
            first = min(others, key=lambda slot: x.done[slot] + x.id[slot] / 10)
            preempt = dict.fromkeys(x.decoding, self.how)
            if first in swapped:
                return state, Batch([first], preempt=preempt)
            return state, Batch(prefill={first: int(x.prompt[first])}, preempt=preempt)
        if x.decoding or not x.prompts:
            return state, Batch(x.decoding or swapped)
        return state, Batch(prefill={x.prompts[0]: int(x.prompt[x.prompts[0]])})


def test_a_swap_costs_its_bytes_twice_and_a_new_prefill_its_tokens():
    load = Workload(np.zeros(2), np.array([100, 50]), np.array([4, 4]))
    again, swapped = (
        simulate_serving(load, [Engine(Fitted(), host=1e9)], Hold(how), record=True) for how in (RECOMPUTE, SWAP)
    )
    tokens = lambda result: sum(sum(chunks) for *_, chunks in result.log)
    for result in (again, swapped):
        assert np.array_equal(result.tokens, load.output) and result.preemptions > 0
    assert tokens(swapped) == 150 < tokens(again)
    work = [(Work.of(chunks, [0] * len(chunks)) if chunks else None) for *_, chunks in swapped.log]
    assert swapped.busy > sum(Fitted().iteration(one) for one in work if one)

    away = []

    class Told(Hold):
        def act(self, state, x):
            state, batch = Hold.act(self, state, x)
            away.append(sum(int(x.done[slot]) for slot in batch.preempt))
            return state, batch

    quick = simulate_serving(load, [Engine(Fitted(), host=1e15)], Told(SWAP))
    assert swapped.busy - quick.busy == pytest.approx(2 * sum(away) * Fitted().kv_bytes / 1e9, rel=1e-5)


class Wrong(Scheduler):
    what: str = ""

    def act(self, state, x):
        if self.what == "twice":
            return state, Batch([*x.decoding, *x.decoding], {slot: int(x.prompt[slot]) for slot in x.prompts})
        decode, prefill = [0] if self.what == "decode" else [], {0: 10**6} if self.what == "prefill" else {}
        return state, Batch(decode, prefill, {5: SWAP} if self.what == "preempt" else {})


@pytest.mark.parametrize(
    "what, said",
    [
        ("prefill", "Wrong prefills what is not there"), ("decode", "Wrong decodes what is not prefilled"),
        ("twice", "Wrong decodes a request twice"), ("preempt", "preempts slot 5 of engine 0, which holds none"),
        ("", "Wrong leaves 2 requests"),
    ],
)  # fmt: skip
def test_a_scheduler_that_errs_is_told(what, said):
    with pytest.raises(RuntimeError, match=said):
        simulate_serving(Workload.synthetic(2, 10, 5), [Engine(Fitted())], Wrong(what))


def test_what_is_too_large_is_rejected_and_the_rest_served():
    load = Workload(np.zeros(3), np.array([10, 5000, 10]), np.array([5, 5, 5]))
    result = simulate_serving(load, [Engine(Fitted(), kv_tokens=1600)], Chunked())
    assert result.rejected == [1] and result.tokens.tolist() == [5, 0, 5] and np.isinf(result.ttft[1])
    assert result.attainment(10, 10, warm=0) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "bad, said",
    [
        (lambda: Workload(np.array([0.0, -1.0]), np.ones(2), np.ones(2)), "row 1: arrival must be finite"),
        (lambda: Workload(np.array([1.0, 0.5]), np.ones(2), np.ones(2)), "row 1: arrival comes before"),
        (lambda: Workload(np.zeros(2), np.array([1, 0]), np.ones(2)), "row 1: prompt must be at least 1, got 0"),
        (lambda: Workload(np.zeros(2), np.ones(2), np.ones(3)), "output has 3 rows, arrival 2"),
        (lambda: Workload(np.zeros(1), np.ones(1), np.ones(1), tds=0.0), "row 0: tds must be positive"),
        (lambda: Workload.azure("chat"), 'name must be "conv" or "code"'),
        (lambda: Engine(Fitted(), role="both ways"), "role must be"),
        (lambda: Engine(Fitted(), kv_tokens=3), "kv_tokens must hold a block of 16, got 3"),
        (lambda: Chunked(chunk=0), "chunk must be positive"),
    ],
)
def test_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        bad()


def test_goodput_is_where_goals_begin_to_be_missed():
    load = mixed(300, seed=5)
    engine = Engine(Fitted())
    found = goodput(
        lambda rate: load.poisson(rate, 1),
        lambda l: simulate_serving(l, [engine], Chunked()),
        ttft=0.5,
        tpot=0.1,
        high=32,
    )
    reached = lambda rate: simulate_serving(load.poisson(rate, 1), [engine], Chunked()).attainment(0.5, 0.1)
    assert 1 < found < 31 and reached(found) >= 0.9 > reached(1.1 * found)


def test_a_real_trace(data):
    load = Workload.azure("conv")
    assert len(load) == 19_366 and 5.4 < len(load) / load.arrival[-1] < 5.6
    assert np.percentile(load.prompt, 50) == 1020 and np.percentile(load.output, 90) == 424
    assert Workload.azure("code").scale(5.0).arrival[-1] == pytest.approx(8819 / 5)


def test_devices_that_share_a_layer_add_up_twice_in_each():
    spec, device = MODELS["llama-3-70b"], DEVICES["h100"]
    one, four = Roofline(spec, device), Roofline(spec, device, devices=4)
    work = Work.of(decode=[1000] * 16)
    by_hand = 2 * 80 * (10e-6 + 2 * 3 / 4 * 16 * 8192 * 2 / 450e9)
    assert four.summing(work) == pytest.approx(by_hand) and one.summing(work) == 0
    fixed = device.launch * spec.layers
    assert four.iteration(work) == pytest.approx((one.iteration(work) - fixed) / 4 + fixed + by_hand)
    half = Work.of([512], [0], layers=0.5)
    assert four.summing(half) == pytest.approx(2 * 80 * (5e-6 + 2 * 3 / 4 * 256 * 8192 * 2 / 450e9))
