"""Real sessions under the schedulers of the simulator."""

import threading
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.decode.base import Draw
from anabranch.keep.d2o import D2O
from anabranch.keep.memory import H2O, Sinks, Window
from anabranch.models.llama import Config, Decoder, Llama
from anabranch.run.chat import Chat
from anabranch.schedule.andes import Andes
from anabranch.schedule.baselines import FCFS, Chunked, Orca
from anabranch.schedule.cluster import Fitted, Work
from anabranch.schedule.layered_prefill import LayeredPrefill
from anabranch.schedule.live import Live, Session
from anabranch.schedule.places import Forgetful
from anabranch.schedule.replay import play, replay, result, workload
from anabranch.schedule.scheduler import RECOMPUTE, SWAP, SWAPPED, Batch
from anabranch.schedule.semi_pd import FixedShares, TimeSlices
from anabranch.schedule.workload import Workload
from anabranch.sessions import Ask, Full

CONFIG = Config(vocab=37, width=24, layers=4, heads=6, kv_heads=2, hidden=40, rope_base=1000.0)
SLOW = Fitted((1.0, 0.1, 0.0), (30.0, 0.0, 0.1), (30.0, 0.0, 0.1))
"""A cost by which time is always scarce: Andes has to choose."""


@pytest.fixture(scope="module")
def model():
    llama = jax.tree.map(lambda x: 4 * x, eqx.filter_jit(Llama)(CONFIG, key=jax.random.PRNGKey(0)))
    return Decoder(llama, size=64)


@pytest.fixture(scope="module")
def requests(model):
    """Prompts, lengths of answers, and the answers of the model alone."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 37, n).tolist() for n in (3, 30, 17, 9, 22, 5)]
    limits = [12, 6, 9, 15, 4, 8]
    step = jax.jit(lambda model, state, x: model.step(state, x))
    answers = []
    for prompt, limit in zip(prompts, limits, strict=True):
        state, answer = model.init(), []
        for token in prompt[:-1]:
            state, _ = step(model, state, jnp.int32(token))
        token = prompt[-1]
        for _ in range(limit):
            state, logits = step(model, state, jnp.int32(token))
            token = int(jnp.argmax(logits))
            answer.append(token)
        answers.append(answer)
    load = Workload(np.linspace(0, 0.02, 6), np.array([len(p) for p in prompts]), np.array(limits))
    return load, prompts, answers


class Juggler(FCFS):
    """Sends whoever has decoded last away, after every third iteration."""

    how: int = SWAP

    def init(self, *, key=None):
        return 0

    def act(self, state, x):
        swapped, decoding = np.flatnonzero(x.status == SWAPPED).tolist(), sorted(x.decoding)
        if state % 3 == 2 and len(decoding) > 1 and x.free_blocks >= len(decoding):
            return state + 1, Batch(decoding[:-1], preempt={decoding[-1]: self.how})
        if swapped and x.free_blocks > 4:
            return state + 1, Batch(swapped[:1])
        return state + 1, super().act((), x)[1]


SCHEDULERS = {
    "juggler, to the host": Juggler(),
    "juggler, made again": Juggler(how=RECOMPUTE),
    "fcfs": FCFS(),
    "orca": Orca(),
    "chunked": Chunked(chunk=16),
    "layered": LayeredPrefill(layers=4, most=40, unit=8),
    "time slices": TimeSlices(FixedShares((75.0, 25.0))),
    "andes": Andes(SLOW),
    "andes, made again": Andes(SLOW, swap=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_answers_are_those_of_the_model_alone_and_a_replay_decides_the_same(model, requests, name):
    load, prompts, answers = requests
    live = Live(model, SCHEDULERS[name], sessions=3, kv_tokens=128, record=True)
    result = play(live, load, prompts)
    assert [session.tokens for session in live.record.sessions] == answers
    assert result.tokens.tolist() == load.output.tolist()
    assert live.seats.free == live.engine.blocks and not live._sessions
    again = replay(live, SCHEDULERS[name])
    assert [(ids, some, chunk) for _, _, ids, some, chunk in again.log] == [
        (ids, some, chunk) for _, _, ids, some, chunk in result.log
    ]
    np.testing.assert_allclose(again.ttft, result.ttft, atol=1e-9)
    assert again.preemptions == result.preemptions
    if name.startswith("juggler"):
        assert result.preemptions > 3


@pytest.fixture(scope="module")
def alike(model):
    """Prompts that begin alike, of which two are the same, and the answers of the model alone."""
    rng = np.random.default_rng(1)
    head = rng.integers(0, 37, 21).tolist()
    prompts = [head + rng.integers(0, 37, n).tolist() for n in (4, 9, 1, 7, 15)]
    prompts += [prompts[1], rng.integers(0, 37, 24).tolist()]
    live, answers = Live(model, FCFS(), sessions=1), []
    for prompt in prompts:
        answers.append([])
        live.submit(Ask(prompt, 6), answers[-1].append)
    drain(live)
    load = Workload(np.linspace(0, 0.02, 7), np.array([len(p) for p in prompts]), np.full(7, 6), tokens=prompts)
    return load, prompts, [answer[:-1] for answer in answers]


@pytest.mark.parametrize("name", ["juggler, to the host", "juggler, made again", "fcfs", "chunked", "layered"])
def test_what_prompts_share_changes_nothing(model, alike, name):
    load, prompts, answers = alike
    live = Live(model, SCHEDULERS[name], sessions=3, kv_tokens=160, block=4, record=True, prefixes=True)
    served = play(live, load, prompts)
    assert [session.tokens for session in live.record.sessions] == answers
    again = replay(live, SCHEDULERS[name])
    assert [line[2:] for line in again.log] == [line[2:] for line in served.log]
    assert again.cached >= 40 and live.seats.index.available == live.engine.blocks


def test_a_prompt_finds_what_was_computed_before_if_it_has_the_same_salt(model, alike):
    _, prompts, answers = alike
    live = Live(model, Chunked(chunk=16), sessions=2, block=4, prefixes=True)

    def ask(i, salt=b""):
        said, found = [], []
        live.submit(Ask(prompts[i], 6, salt=salt), said.append, found.append)
        drain(live)
        assert said == [*answers[i], None] and len(found) == 1
        return found[0]

    # All but the last token in full blocks: of 22 and 30 the first 20 are shared, of 30 themselves 28.
    assert [ask(2), ask(1), ask(1), ask(6), ask(4)] == [0, 20, 28, 0, 20]
    assert [ask(1, b"ann"), ask(1, b"ann"), ask(1)] == [0, 28, 28]
    with pytest.raises(ValueError, match="sessions must have one salt, got 2"):
        workload([Session(i, Ask([1], 1, salt=salt), 0.0, print, print) for i, salt in enumerate((b"a", b"b"))])


def test_what_is_shared_is_given_up_when_others_need_the_room(model, alike):
    _, prompts, answers = alike
    live, found = Live(model, FCFS(), sessions=1, block=4, kv_tokens=44, prefixes=True), []
    for i in (1, 6, 1):  # 30 and 6 tokens take nine of eleven blocks
        said = []
        live.submit(Ask(prompts[i], 6), said.append, found.append)
        drain(live)
        assert said[:-1] == answers[i]
    assert found[:2] == [0, 0] and 0 < found[2] < 28


MEMORIES = {"sinks": Sinks(24, 2, room=8), "attention": H2O(24, last=6, room=8)}
TINY = Config(vocab=258, width=16, layers=1, heads=2, kv_heads=1, hidden=16)  # as in test_chat: compiled once for both


@pytest.fixture(scope="module")
def tiny():
    return jax.tree.map(lambda x: 4 * x, Llama(TINY, key=jax.random.PRNGKey(0)))


@pytest.fixture(scope="module")
def endless(tiny):
    """Prompts much longer than what is kept, and for each memory a model, and what it says to them in chats of one."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 258, n).tolist() for n in (3, 125, 47, 9, 22, 8)]
    limits = [12, 50, 9, 40, 25, 8]
    load = Workload(np.linspace(0, 0.02, 6), np.array([len(p) for p in prompts]), np.array(limits))

    @cache
    def of(memory):
        model, answers = Decoder(tiny, keep=MEMORIES[memory]), []
        for prompt, limit in zip(prompts, limits, strict=True):
            chat, said = Chat(model, None), list(prompt)
            logits = chat._take(prompt)
            for _ in range(limit):
                said.append(int(jnp.argmax(logits)))
                logits = chat._take(said[-1:])
            answers.append(said[len(prompt) :])
        return model, answers

    return of, load, prompts


@pytest.mark.parametrize("name", ["chunked", "juggler, to the host", "juggler, made again"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_sessions_that_forget_have_no_end_and_answer_as_they_would_alone(endless, memory, name):
    of, load, prompts = endless
    model, answers = of(memory)
    live = Live(model, SCHEDULERS[name], sessions=2, kv_tokens=96, record=True)
    size = lambda: sum(x.nbytes for x in jax.tree.leaves(live.places.memory))
    most, before = live.places.most, size()
    served = play(live, load, prompts)
    assert [session.tokens for session in live.record.sessions] == answers
    assert size() == before and before // (4 * most) == live.engine.cost.kv_bytes and live.room is None
    assert live.seats.free == live.engine.blocks and live.engine.need(most) == live.engine.need(1000) == 2
    again = replay(live, SCHEDULERS[name])
    assert [line[2:] for line in again.log] == [line[2:] for line in served.log]
    assert again.preemptions == served.preemptions and (served.preemptions > 3 or name == "chunked")


def test_who_has_no_token_is_left_alone(endless):
    of, *_ = endless
    places = Forgetful(of("sinks")[0], 4)
    before, draw = [places.get(slot) for slot in range(4)], Draw(*np.zeros((2, 2), np.float32), *np.zeros((2, 2), int))
    places.step(np.ones(2, int), np.zeros(2, int), np.array([1, 1 << 30]), draw, "likeliest")
    same = [eqx.tree_equal(places.get(slot), before[slot]) for slot in range(4)]
    assert same == [True, False, True, True]


class Uneven(Window):
    """Once the last layer holds more than four tokens, the first one keeps two."""

    def settle(self, memory):
        first, *others, last = memory
        budget = jnp.where((last.live > 4).any(), 2, first.budget)
        return eqx.tree_at(lambda held: held.budget, first, budget), *others, last


def test_layers_are_filled_in_parts_or_settled_together(tiny):
    one = Decoder(tiny, keep=MEMORIES["sinks"])
    two = eqx.tree_at(lambda model: model.layers, one, one.layers * 2)
    text, places = list(range(30)), []
    for parts in ([range(2)], [range(1), range(1, 2)]):
        places.append(Forgetful(two, 4))
        for done, count, sizes in ((0, 13, [8]), (13, 8, [8, 1, 1, 1, 1, 1]), (21, 9, [1] * 9)):  # 21, and 9 said
            h = None
            for layers in parts:
                h = places[-1].fill(1, text, 21, done, count, layers, h)
            assert [len(piece) for piece in h] == sizes
    whole, parts = (jax.tree.leaves(x.memory) for x in places)
    assert all((x == y).all() for x, y in zip(whole, parts, strict=True))
    keep = Uneven(6, room=2)
    memory = tuple(keep.rows(3, 1, 2) for _ in range(2))
    memory = eqx.tree_at(lambda m: m[1].held.position, memory, memory[1].held.position.at[1:, :, :5].set(7))
    settled = keep.settle_rows(memory, jnp.array([0, 1, 1 << 30]))  # the last one was not extended
    assert settled[0].held.budget.tolist() == [6, 2, 6] and settled[1].held.budget.tolist() == [6, 6, 6]


def test_what_a_memory_that_forgets_cannot_do_is_refused(tiny):
    for keep, scheduler, said, text in (
        (
            MEMORIES["sinks"],
            FCFS(),
            {"prefixes": True},
            "prefixes: what prompts share is kept whole, and Sinks forgets parts",
        ),
        (MEMORIES["sinks"], FCFS(), {"sessions": 0}, "sessions must be at least 1, got 0"),
        (MEMORIES["sinks"], FCFS(), {"kv_tokens": 31}, "kv_tokens must hold the 32 that a session .* got 31"),
        (D2O(24), LayeredPrefill(layers=2), {}, "LayeredPrefill sends .* D2O decides across them"),
    ):
        with pytest.raises(ValueError, match=text):
            Live(Decoder(tiny, keep=keep), scheduler, **said)


def test_another_scheduler_decides_otherwise(model, requests):
    load, prompts, _ = requests
    live = Live(model, FCFS(), sessions=3, record=True)
    result = play(live, load, prompts)
    assert [line[2:] for line in replay(live, Chunked(chunk=8)).log] != [line[2:] for line in result.log]


def drain(live):
    while live.turn():
        pass


def test_an_answer_ends_at_a_stop_at_its_limit_and_when_it_is_cancelled(model, requests):
    _, prompts, answers = requests
    said = [[], [], [], []]
    live = Live(model, FCFS(), sessions=3, stop={answers[0][3]})
    live.submit(Ask(prompts[0], 12), said[0].append)
    live.submit(Ask(prompts[1], 1), said[1].append)
    numbers = [live.submit(Ask(prompts[2], 40), said[2].append), live.submit(Ask(prompts[3], 40), said[3].append)]
    live.cancel(numbers[1])  # before it begins
    for _ in range(4):
        live.turn()
    live.cancel(numbers[0])
    drain(live)
    first = answers[0].index(answers[0][3]) + 1
    assert said[0] == [*answers[0][:first], None]
    assert said[1] == [answers[1][0], None]
    assert said[3] == [None]
    assert said[2][-1] is None and 1 <= len(said[2]) < 20
    assert live.seats.requests == 0 and live.seats.free == live.engine.blocks


def test_a_prompt_on_its_way_through_the_layers_ends_with_its_first_token(model, requests):
    _, prompts, _ = requests
    said = []
    live = Live(model, LayeredPrefill(layers=4, unit=8), sessions=2)
    number = live.submit(Ask((prompts[1] * 2)[:50], 8), said.append)
    live.submit(Ask(prompts[0], 2))
    live.turn()
    live.cancel(number)  # a quarter of the way
    live.turn()
    assert not said
    drain(live)
    assert said[-1] is None and len(said) == 2 and live.seats.requests == 0


def test_what_is_drawn_depends_on_the_seed_alone(model, requests):
    _, prompts, _ = requests

    def drawn(together):
        live, said = Live(model, Chunked(chunk=16), sessions=4), []
        live.submit(Ask(prompts[0], 10, temperature=1.0, seed=7), said.append)
        for i in range(together):
            live.submit(Ask(prompts[i + 1], 10, temperature=1.0, top_p=0.5, seed=7))
        drain(live)
        return said

    assert drawn(0) == drawn(2)


def test_it_serves_in_a_thread(model, requests):
    _, prompts, answers = requests
    live, stop, done, said = Live(model, Orca(), sessions=2), threading.Event(), threading.Event(), []
    thread = threading.Thread(target=live.run, args=(stop,))
    thread.start()
    live.submit(Ask(prompts[2], 9), lambda token: (said.append(token), token is None and done.set()))
    assert done.wait(60)
    stop.set()
    thread.join(10)
    assert said == [*answers[2], None]


def test_nothing_is_compiled_once_it_is_warm(model, requests):
    from anabranch.schedule import places as module

    _, prompts, answers = requests
    live, said, compiled = Live(model, Chunked(chunk=16), sessions=3, prefixes=True), [], []
    live.warm(compiled.append)
    shares = "shared beginnings of prompts"
    assert compiled == ["prompts of 16 tokens", "steps of 2 sessions", "steps of 4 sessions", shares]
    functions = module._step, module._layer, module._first, module._save, module._load
    before = [f._cache_size() for f in functions]
    live.submit(Ask(prompts[1], 6), said.append)
    for seed in (1, 2):
        live.submit(Ask(prompts[0], 6, temperature=1.0, seed=seed))
    live.submit(Ask(prompts[1], 2))
    drain(live)
    assert said == [*answers[1], None] and [f._cache_size() for f in functions] == before


def test_bad_requests_are_refused(model):
    live = Live(model, FCFS(), sessions=1, waiting=1)
    for ask, text in (
        (Ask([], 3), "prompt and limit must be at least one token, got 0 and 3"),
        (Ask([1], 0), "got 1 and 0"),
        (Ask([1, 37], 3), "a token must be from 0 to 36, got 37"),
        (Ask([1] * 60, 5), "60 tokens and an answer of 5 have no room in 64"),
    ):
        with pytest.raises(ValueError, match=text):
            live.submit(ask)
    live.submit(Ask([1], 1))
    with pytest.raises(Full, match="the queue of sessions is full"):
        live.submit(Ask([1], 1))
    with pytest.raises(ValueError, match="prompt 0 has 1 tokens, the workload says 2"):
        play(live, Workload.synthetic(1, 2, 2), [[1]])
    with pytest.raises(ValueError, match="nothing was recorded"):
        result(live)


def test_a_measured_cost_has_the_time_of_prompts_and_of_steps(model):
    from anabranch.schedule.replay import measure

    cost = measure(model, sessions=2, repeats=1)
    assert cost.kv_bytes == 8 * 4 * 2 * 4 and cost.spec.layers == 4
    assert sum(cost.prefill) > 0 and sum(cost.decode) > 0


def test_a_cost_is_fitted_to_what_was_measured():
    wanted = Fitted((5.0, 0.2, 1e-4), (3.0, 1e-3, 0.5), (3.0, 1e-3, 0.5))
    prefills = [(n, wanted.iteration(Work.of([n], [0]))) for n in (10, 100, 300, 1000)]
    decodes = [(n, n * c, wanted.iteration(Work.of(decode=[c] * n))) for n in (1, 4, 8) for c in (50, 500)]
    found = Fitted.to(prefills, decodes)
    np.testing.assert_allclose(found.prefill, wanted.prefill, rtol=1e-6)
    np.testing.assert_allclose(found.decode, wanted.decode, rtol=1e-6)
    with pytest.raises(ValueError, match="three of each are needed, got 4 prefills and 0 decodes"):
        Fitted.to(prefills, [])
