"""semi-PD: two workers on one device by hand and as queues, Algorithm 1 beside a plain one, blocks by threads."""

import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.contract import check
from anabranch.schedule.baselines import FCFS, Chunked
from anabranch.schedule.cluster import DEVICES, MODELS, Fitted, Roofline, Work, side_by_side
from anabranch.schedule.distserve import ttft_md1
from anabranch.schedule.scheduler import DECODING, SWAP, WAITING, Batch, Engine, Scheduler
from anabranch.schedule.seats import Asked, Seats
from anabranch.schedule.semi_pd import (
    FixedShares,
    LatencyModel,
    SemiPD,
    TimeSlices,
    UnifiedBlocks,
    adjusted,
    example,
    fit_prefill,
)
from anabranch.schedule.serving import simulate_serving
from anabranch.schedule.workload import Workload

PLAIN = Fitted((100, 0.0, 0.0), (10, 0.0, 0.0), (0, 0, 0))
"""A prefill takes 100 ms, a decode 10."""
SMALL = Roofline(MODELS["llama-3-8b"], DEVICES["a100-40g"])


class Bus:
    """Iterations whose chunk says their milliseconds of arithmetic and whose context those of bandwidth."""

    def traffic(self, work):
        return work.before / 1e3

    def iteration(self, work):
        return max(work.tokens / 1e3 / work.share, self.traffic(work))


def beside(*iterations):
    return side_by_side(Bus(), [Work.of([c], [m], share=s) for c, m, s in iterations])


def test_two_iterations_slow_each_other_by_units_and_by_bandwidth():
    assert beside((60, 0, 0.6)) == pytest.approx([0.1])
    assert beside((60, 0, 0.6), (20, 0, 0.4)) == pytest.approx([0.1, 0.05])  # each on units of its own
    assert beside((60, 0, 1.0), (60, 0, 1.0)) == pytest.approx([0.12, 0.12])
    assert beside((60, 0, 0.9), (60, 0, 0.6)) == pytest.approx([0.1, 0.15])  # cut to 0.6 and 0.4
    assert beside((0, 50, 0.5), (0, 50, 0.5)) == pytest.approx([0.1, 0.1])
    assert beside((50, 30, 0.5), (1, 50, 0.5)) == pytest.approx([0.1, 0.05 / 0.7])  # 0.3 of the bandwidth is taken
    assert beside((50, 10, 0.5), (50, 90, 0.5)) == pytest.approx([0.1, 0.1])  # together just what there is
    assert beside((10, 70, 0.5), (10, 90, 0.5)) == pytest.approx([0.14, 0.18])


def test_few_units_draw_less_of_the_bandwidth():
    decode = lambda share: SMALL.iteration(Work.of(decode=[1000] * 4, share=share)) - 32 * SMALL.device.launch
    assert decode(0.4) == decode(1.0) and decode(0.2) == pytest.approx(2 * decode(1.0))
    prompt = Work.of([4000], [0])
    half, whole = side_by_side(SMALL, [prompt._replace(share=0.5)]), side_by_side(SMALL, [prompt])
    assert half[0] / whole[0] == pytest.approx(2, rel=0.01)
    slow, held = side_by_side(SMALL, [prompt._replace(share=0.5), Work.of(decode=[1000] * 4, share=0.5)])
    rest = 1 - SMALL.traffic(prompt) / slow  # of the bandwidth is left to the decode, which slows the prompt not at all
    assert slow == half[0] and held == pytest.approx(SMALL.traffic(Work.of(decode=[1000] * 4)) / rest)


@pytest.mark.parametrize(
    "shares, came, emitted",
    [
        # The second prompt comes half-way through a decode: 5 ms of it are left, which take twice as long; the next
        # takes 20 ms; then the prompt, of which 30 ms of 200 are done, is alone.
        ((100.0, 100.0), 0.105, [0.1, 0.115, 0.135, 0.135 + 0.85 * 0.1]),
        ((50.0, 50.0), 0.205, [0.2, 0.22, 0.24, 0.205 + 0.2]),  # as if each had a device of half the speed
        # Alone at 75 and 50 %, together at 60 and 40: two thirds of a decode are left, of 25 ms instead of 20; then
        # the prompt, of which 1/60 s of 1/6 s is done, is alone.
        ((75.0, 50.0), 0.18, [0.4 / 3, 0.46 / 3, 0.52 / 3, 0.59 / 3, 0.59 / 3 + 0.9 * 0.4 / 3]),
    ],
)
def test_two_workers_by_hand(shares, came, emitted):
    load = Workload(np.array([0, came]), np.array([10, 10]), np.array([len(emitted) - 1, 1]))
    result = simulate_serving(load, [Engine(PLAIN, workers=2)], FixedShares(shares))
    np.testing.assert_allclose(result.emitted, emitted)


def test_a_share_that_changes_holds_from_the_next_iteration_on():
    class Later(FixedShares):
        """Half of the units for prompts, and all of them once a decode has been."""

        def learn(self, state, x, decision, feedback):
            return state._replace(shares=(100.0, 50.0)) if x.worker == "decode" else state

    load = Workload(np.array([0, 0.205, 0.206]), np.array([10, 600, 600]), np.array([2, 1, 1]))
    result = simulate_serving(load, [Engine(PLAIN, workers=2)], Later((50.0, 50.0)))
    np.testing.assert_allclose(result.emitted, [0.2, 0.22, 0.405, 0.505])


def test_the_prefill_worker_alone_is_the_queue_of_the_formula():
    n, service = 8000, 0.1 / 0.5
    load = Workload(np.zeros(n), np.full(n, 10), np.full(n, 1)).poisson(0.6 / service, 1)
    result = simulate_serving(load, [Engine(PLAIN, workers=2)], FixedShares((50.0, 100.0), saturating=1))
    assert result.ttft.mean() == pytest.approx(ttft_md1(0.6 / service, service), rel=0.05)
    load = load.head(1000)
    result = simulate_serving(load, [Engine(PLAIN, workers=2)], FixedShares((50.0, 100.0), saturating=1))
    alone = simulate_serving(load, [Engine(Fitted((1e3 * service, 0, 0)), max_seqs=1)], FCFS())
    np.testing.assert_allclose(result.emitted, alone.emitted, rtol=1e-9)


def test_prompts_of_random_lengths_wait_as_the_model_says():
    """M/M/1: 1 / (μ - r) in the mean, of which the model of TTFT is made."""
    n, share = 8000, 0.8
    prompt = np.random.default_rng(0).exponential(1000, n).astype(int) + 1
    engine = Engine(Fitted((0, 0.1, 0)), workers=2, kv_tokens=200_000)
    load = Workload(np.zeros(n), prompt, np.full(n, 1)).poisson(4.0, 0)
    result = simulate_serving(load, [engine], FixedShares((100 * share, 100.0), saturating=1))
    assert result.ttft.mean() == pytest.approx(1 / (share * 10 - 4), rel=0.05)


@pytest.mark.parametrize("scheduler", [FixedShares((80.0, 100.0)), SemiPD(window=7)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("cost", [Fitted(), SMALL], ids=["fitted", "roofline"])
def test_every_request_gets_its_tokens_also_in_little_memory(scheduler, cost):
    rng = np.random.default_rng(0)
    load = Workload(np.zeros(80), rng.integers(1, 400, 80), rng.integers(1, 60, 80)).poisson(20.0, 0)
    for tokens in (512, 20_000):
        result = simulate_serving(load, [Engine(cost, kv_tokens=tokens, max_seqs=32, workers=2)], scheduler)
        assert np.array_equal(result.tokens, load.output) and not result.rejected
        assert (result.tbt > 0).all() and (result.ttft > 0).all()
        assert (result.preemptions > 0) == (tokens == 512)
        assert result.seconds < result.busy <= 2 * result.seconds + 1e-9  # both at once


def test_no_decode_stands_behind_a_prompt():
    rng = np.random.default_rng(0)
    load = Workload(np.zeros(100), rng.integers(2000, 6000, 100), rng.integers(2, 60, 100)).poisson(3.0, 0)
    ours, theirs = (
        simulate_serving(load, [Engine(SMALL, workers=workers)], scheduler)
        for workers, scheduler in ((2, FixedShares((60.0, 40.0))), (1, FCFS()))
    )
    assert ours.tbt.max() < 0.5 * theirs.tbt.max()


class Astray(Scheduler):
    """Gives a worker what is not its own."""

    what: str = ""

    def act(self, state, x):
        batch = Batch(x.decoding, {slot: int(x.prompt[slot]) for slot in np.flatnonzero(x.status == WAITING).tolist()})
        if self.what == "preempt" and x.worker == "prefill":
            return state, batch._replace(decode=(), preempt=dict.fromkeys(x.decoding, SWAP))
        if self.what != x.worker:
            batch = batch._replace(**{"decode": {"prefill": {}}, "prefill": {"decode": ()}}[x.worker])
        return state, batch


@pytest.mark.parametrize(
    "what, said",
    [
        ("decode", "Astray gives the decode worker what is not"), ("prefill", "Astray gives the prefill worker what"),
        ("preempt", "Astray preempts what the other worker is busy with"),
    ],
)  # fmt: skip
def test_a_worker_does_its_own_work(what, said):
    load = Workload(np.array([0, 0.105, 0.106]), np.array([10, 10, 10]), np.array([9, 9, 9]))
    with pytest.raises(RuntimeError, match=said):
        simulate_serving(load, [Engine(PLAIN, workers=2)], Astray(what))


def test_the_contract():
    report = check(*example())
    assert report.ok, report


def test_the_model_finds_what_the_latencies_are_made_of():
    x = np.array([0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7])
    model, learn = LatencyModel(), jax.jit(lambda *given: LatencyModel().learn(*given))
    state = model.init()
    for one in x:
        seen = [0.05 / (one - 0.25) + 0.1, 0.01 / (1 - one) + 0.005]
        state = learn(state, jnp.array([one, 1 - one]), jnp.array(seen))
    a1, _, queue, a2, b2 = np.asarray(state.params)
    assert queue == pytest.approx(0.25, abs=0.35 / 32) and a1 == pytest.approx(0.05, rel=0.15)
    np.testing.assert_allclose([a2, b2], [0.01, 0.005], rtol=1e-3)
    told = model.predict(state, jnp.array([0.8, 0.2]))
    np.testing.assert_allclose(told, [0.05 / 0.55 + 0.1, 0.055], rtol=0.02)
    assert np.isfinite(model.predict(state, jnp.array([0.1, 0.9]))).all()  # below λ
    unseen = learn(state, jnp.array([0.5, 0.5]), jnp.array([jnp.nan, 1.0]))
    np.testing.assert_array_equal(unseen.prefill, state.prefill)
    assert unseen.decode[0].tolist() == [0.5, 1.0, 1.0] and unseen.decode[1, 2] == pytest.approx(0.8)


def test_one_share_and_latencies_that_rise_with_it_give_the_mean():
    seen = jnp.array([[0.5, 1.0, 1.0], [0.5, 2.0, 1.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(jax.jit(fit_prefill)(seen), [0, 1.5, 0], atol=1e-6)
    rising = jnp.array([[0.5, 1.0, 1.0], [0.6, 2.0, 1.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(jax.jit(fit_prefill)(rising), [0, 1.5, 0], atol=1e-6)


def plainly(pairs, x, seen, goals, step, most):
    """Algorithm 1 once more, in NumPy, over the windows so far: [(shares, seen)], the latest first."""

    def line(z, y, w):
        z0, y0 = np.average(z, weights=w), np.average(y, weights=w)
        var = np.average((z - z0) ** 2, weights=w)
        a = max(0.0, np.average((z - z0) * (y - y0), weights=w) / var) if var > 1e-6 * z0**2 else 0.0
        return a, y0 - a * z0, (w * (y - a * z - y0 + a * z0) ** 2).sum()

    def model(phase):
        known = [(s[phase] / sum(s), v[phase]) for s, v in pairs if np.isfinite(v[phase])][:8]
        if not known:
            return lambda share: 0.0
        share, y = np.array(known).T
        w = 0.8 ** np.arange(len(y))
        fits = []
        for k in range(32 if phase == 0 else 1):
            queue = share.min() * k / 32
            fits.append((*line(1 / np.maximum(share - queue, 0.01), y, w), queue))
        spread = (w * (y - np.average(y, weights=w)) ** 2).sum()
        least = min(fit[2] for fit in fits)
        a, b, _, queue = next(fit for fit in fits if fit[2] <= least + 1e-5 * spread)
        return lambda share: max(0.0, a / max(share - queue, 0.01) + b)

    failed = [seen[i] > goals[i] for i in range(2)]
    if sum(failed) != 1 or not np.isfinite(seen).all():
        return x
    one = failed.index(True)
    told, x = model(one), list(x)
    for _ in range(most):
        if told(x[one] / sum(x)) <= goals[one]:
            break
        if x[one] + step > 100:
            x[1 - one] = max(x[1 - one] - step, min(x[1 - one], step))
        else:
            x[one] += step
    return x


def test_the_adjustment_is_that_of_a_plain_one():
    model, goals = LatencyModel(), np.array([0.5, 0.03], np.float32)
    moved = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        state, x, pairs = model.init(), [60.0, 60.0], []
        for _ in range(14):
            share = x[0] / sum(x)
            seen = np.array([0.1 / max(share - rng.uniform(0.1, 0.4), 0.05), 0.012 / (1 - share) + 0.004], np.float32)
            seen = np.where(rng.random(2) < 0.1, np.nan, seen * rng.uniform(0.8, 1.2, 2)).astype(np.float32)
            pairs.insert(0, (x, seen))
            expected = plainly(pairs, x, seen, goals, 5.0, 4)
            state, found = adjusted(model, state, np.array(x), seen, goals, 5.0, 4)
            np.testing.assert_allclose(found, expected, atol=1e-3)
            assert 5 <= min(expected) and max(expected) <= 100
            moved += expected != x
            x = expected
    assert moved > 30


@pytest.mark.parametrize(
    "shares, seen, after",
    [
        ((60, 60), (0.9, 0.05), (80, 60)), ((60, 60), (0.2, 0.3), (60, 80)),
        ((60, 60), (0.9, 0.3), (60, 60)), ((60, 60), (0.2, 0.05), (60, 60)),
        ((60, 60), (np.nan, 0.3), (60, 60)), ((60, 60), (0.9, np.nan), (60, 60)),
        ((90, 60), (0.9, 0.05), (100, 50)), ((100, 10), (0.9, 0.05), (100, 5)),
    ],
)  # fmt: skip
def test_algorithm_1_after_one_window(shares, seen, after):
    goals = np.array([0.5, 0.1])
    model = LatencyModel()
    _, found = adjusted(model, model.init(), np.array(shares, float), np.array(seen), goals, 5.0, 4)
    np.testing.assert_allclose(found, after)


def view(now, worker, arrival, first):
    """What a live loop might show: a request a slot, without a simulator."""
    seats = Seats(Engine(Fitted(), kv_tokens=3200, max_seqs=64), 0, False)
    seats.queue.extend(range(len(arrival)))
    seats.seat(lambda i: Asked(arrival[i], 10, 10, 1.0, 1.0))
    for slot, came in enumerate(first):
        if not np.isnan(came):
            seats.put(slot, DECODING)
            seats.first[slot] = came
    return seats.view(now, worker)


@pytest.mark.parametrize("age, x", [(5.0, 80.0), (0.1, 60.0)])
def test_who_waits_counts_even_if_all_that_were_served_were_in_time(age, x):
    scheduler = SemiPD(ttft=0.5, tpot=0.1, window=4)
    state = scheduler.init()
    for i in range(4):
        now = 10.0 + i
        worker = "prefill" if i == 0 else "decode"
        served = now - 0.1 if i else np.nan
        shown = view(now, worker, [now - 0.2, now - age, now - 1.0], [served, np.nan, now - 0.9])
        state, batch = scheduler.act(state, shown)
        assert batch.share == 0.6 and bool(batch.decode) == (worker == "decode") == (not batch.prefill)
        if worker == "prefill":
            batch = batch._replace(prefill={0: 10})
        before, state = state, scheduler.learn(state, shown, batch, 0.02)
        assert before.seen.shape == state.seen.shape
    assert state.shares == (x, 60.0) and state.iterations == 0
    assert state.model.prefill[0, 1] == pytest.approx(np.percentile([0.22, age + 0.02], 90), rel=1e-5)


def test_shares_follow_the_goals():
    rng = np.random.default_rng(0)
    load = Workload(np.zeros(150), rng.integers(500, 3000, 150), rng.integers(2, 80, 150)).poisson(5.0, 0)
    seen = {}

    class Watched(SemiPD):
        def act(self, state, x):
            seen[self.ttft].append(state.shares[0] / sum(state.shares))
            return super().act(state, x)

    results = {}
    for ttft, tpot in ((0.2, 1.0), (10.0, 0.011)):
        seen[ttft] = []
        results[ttft] = simulate_serving(load, [Engine(SMALL, workers=2)], Watched(ttft=ttft, tpot=tpot, window=20))
    assert seen[0.2][-1] > 0.6 and seen[10.0][-1] < 0.45
    assert results[0.2].percentile("ttft", 90) < results[10.0].percentile("ttft", 90)
    assert results[0.2].percentile("tpot", 90) > results[10.0].percentile("tpot", 90)


def at_every_line(frame, event, argument):
    """A trace that lets the other thread run between any two lines of `UnifiedBlocks`."""
    if event == "call":
        return at_every_line if frame.f_code.co_name in ("take", "give") else None
    time.sleep(1e-6)
    return at_every_line


@pytest.mark.parametrize("rounds, trace", [(50_000, None), (100, at_every_line)])
def test_two_threads_never_have_the_same_block(rounds, trace):
    blocks, wrong = UnifiedBlocks(40), []
    owner = [0] * 40

    def work(me):
        sys.settrace(trace)
        rng = np.random.default_rng(me)
        counts = rng.integers(0, 25, rounds).tolist()
        for count in counts:
            mine = blocks.take(count)
            if mine is None:
                continue
            if len(mine) != count:
                wrong.append(mine)
            wrong.extend(block for block in mine if owner[block])
            for block in mine:
                owner[block] = me
            wrong.extend(block for block in mine if owner[block] != me)
            for block in mine:
                owner[block] = 0
            blocks.give(mine)

    every = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(me,)) for me in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(every)
    assert not wrong and blocks.free == 40 and sorted(blocks.take(40) or []) == list(range(40))


@pytest.mark.parametrize(
    "bad, said",
    [
        (lambda: SemiPD(ttft=0.0), "ttft must be positive, got 0"),
        (lambda: SemiPD(tpot=-1.0), "tpot must be positive"),
        (lambda: SemiPD(window=0), "window must be positive"), (lambda: SemiPD(percentile=101.0), "got 101"),
        (lambda: SemiPD(shares=(0.0, 50.0)), r"at most 100 percent, got \(0.0, 50.0\)"),
        (lambda: FixedShares((50.0, 101.0)), "at most 100 percent"),
        (lambda: FixedShares(saturating=0), "saturating must be positive, got 0"),
        (lambda: Engine(PLAIN, workers=3), "workers must be 1 or 2, got 3"),
        (lambda: Engine(PLAIN, workers=2, role="decode"), "of two workers has the role 'both', got 'decode'"),
        (lambda: UnifiedBlocks(0), "blocks must be at least 1, got 0"),
        (lambda: UnifiedBlocks(3).take(-1), "count must not be negative, got -1"),
        (lambda: UnifiedBlocks(3).give([1]), r"blocks must each have been taken, got \[1\]"),
        (
            lambda: simulate_serving(Workload.synthetic(1, 10, 5), [Engine(PLAIN)], FixedShares()),
            "FixedShares is for engines with two workers, got the worker 'both'",
        ),
    ],
)  # fmt: skip
def test_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        bad()


def test_a_scheduler_of_one_worker_is_told():
    with pytest.raises(RuntimeError, match="Chunked gives the decode worker what is not its work"):
        simulate_serving(Workload.synthetic(1, 10, 5), [Engine(PLAIN, workers=2)], Chunked())


@pytest.mark.parametrize("shares", [(75.0, 25.0), (20.0, 80.0)])
def test_time_slices_give_each_phase_its_share_of_one_worker(shares):
    """Where both always have work, and for who begins late only from then on."""
    scheduler = TimeSlices(FixedShares(shares, saturating=1))
    load = Workload(np.zeros(60), np.full(60, 100), np.full(60, 400))
    engine = Engine(Fitted(kv_tokens=10**6), max_seqs=200)
    result = simulate_serving(load, [engine], scheduler, record=True)
    log = result.log
    ends = [line[1] for line in log[1:]]
    both = len(log) - 1 - next(i for i, line in enumerate(reversed(log)) if line[3])  # until the last prompt
    spent = np.zeros(2)
    for line, end in list(zip(log, ends))[1:both]:
        spent[0 if line[3] else 1] += end - line[1]
    assert spent[0] / spent.sum() == pytest.approx(shares[0] / 100, abs=0.05)
    assert result.tokens.tolist() == load.output.tolist()
