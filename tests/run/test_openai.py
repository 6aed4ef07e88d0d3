"""The API of OpenAI, asked by its own client, in front of the real SmolLM2."""

import contextlib
import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch.run.config import ServeConfig

from .test_chat import Bytes, tiny

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
SURROGATE = rb'{"model": "smollm2", "prompt": "\ud800"}'
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@contextlib.contextmanager
def serving(*args, **options):
    """Where a language server of these is."""
    from anabranch.run.openai import LanguageServer

    app = LanguageServer(*args, **options).app
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def served(smollm2, tmp_path_factory):
    """Where a server is that knows one token, and its engine."""
    from anabranch.schedule.baselines import Chunked
    from anabranch.schedule.live import Live

    model, text = smollm2
    tokens = tmp_path_factory.mktemp("openai") / "tokens"
    digest = lambda token: hashlib.sha256(token).hexdigest()
    tokens.write_text(f"ann {digest(b'secret')}\nbob {digest(b'watch')} operator\n")
    live = Live(model, Chunked(chunk=64), sessions=2, stop=text.stop, waiting=3, prefixes=True)
    with serving("smollm2", live, text, ServeConfig(tokens=tokens)) as where:
        yield where, live


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=served[0] + "/v1", api_key="secret", max_retries=0)


def test_a_chat_at_once_and_as_it_comes(client):
    answer = client.chat.completions.create(model="smollm2", messages=CAPITAL, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)
    stream = client.chat.completions.create(
        model="smollm2", messages=CAPITAL, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "The capital of France is Paris."
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) == 7
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.total_tokens == 45


def test_what_is_shared_is_counted_and_other_tenants_have_no_part_in_it(served, client):
    said = [{"role": "system", "content": "You are a geographer who is asked about capitals, rivers and mountains."}]
    ask = lambda who, about: who.chat.completions.create(
        model="smollm2", messages=[*said, {"role": "user", "content": about}], temperature=0, max_tokens=4
    )
    alone, first = ask(client, "What is the Nile?"), ask(client, "Where are the Alps?")
    assert alone.usage.prompt_tokens_details.cached_tokens < 16  # at most what all chats begin with
    shared = first.usage.prompt_tokens_details.cached_tokens
    assert shared >= 16 and shared % 16 == 0
    again = ask(client, "What is the Nile?")
    assert again.choices[0].message.content == alone.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens == (again.usage.prompt_tokens - 1) // 16 * 16
    bob = openai.OpenAI(base_url=served[0] + "/v1", api_key="watch", max_retries=0)
    assert ask(bob, "What is the Nile?").usage.prompt_tokens_details.cached_tokens == 0
    stream = client.chat.completions.create(
        model="smollm2", messages=[*said, {"role": "user", "content": "What is the Nile?"}], max_tokens=2, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert list(stream)[-1].usage.prompt_tokens_details.cached_tokens >= 32


def test_a_completion_ends_at_its_limit_or_at_a_stop(client):
    said = dict(model="smollm2", prompt="1, 2, 3, 4, 5,", temperature=0)
    plain = client.completions.create(**said, max_tokens=8)
    assert plain.choices[0].text == " 6, 7" + plain.choices[0].text[5:] and plain.choices[0].finish_reason == "length"
    stopped = client.completions.create(**said, max_tokens=64, stop=["8, 9", " 7,"])
    assert stopped.choices[0].text == " 6," and stopped.choices[0].finish_reason == "stop"
    parts = list(client.completions.create(**said, max_tokens=64, stop=" 7,", stream=True))
    assert "".join(part.choices[0].text for part in parts) == " 6,"


def test_a_seed_says_the_same_again(client):
    said = [
        client.completions.create(model="smollm2", prompt="Once", max_tokens=6, seed=seed).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert said[0] == said[1] != said[2]


def test_parts_of_text_are_one_message(client):
    parts = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": " of France?"}]
    messages = [{"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_completion_tokens=3)
    assert answer.choices[0].message.content == "The capital of"


def test_what_is_not_there_is_refused_by_name(served, client):
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=CAPITAL)
    for said, text in (
        ({"n": 2}, "n: "),
        ({"logprobs": True}, "logprobs: "),
        ({"temperature": 3}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is understood"),
        ({"max_tokens": 1000}, "have no room in 256"),
    ):
        with pytest.raises(openai.BadRequestError, match=text):
            client.chat.completions.create(**{"model": "smollm2", "messages": CAPITAL} | said)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served[0] + "/v1", api_key="other").models.list()
    assert [model.id for model in client.models.list()] == ["smollm2"]
    head = {"Authorization": "Bearer secret"}
    for body in (b"", b"[", b"null", b'{"model": "smollm2", "prompt": [99999999]}', b'"\xff"', b"[" * 5000, SURROGATE):
        answer = httpx.post(served[0] + "/v1/completions", content=body, headers=head)
        assert answer.status_code == 400 and answer.json()["error"]["message"], body


def emptied(live):
    """Waits until nobody has a place, or waits for one."""
    until = time.monotonic() + 20
    while live.busy and time.monotonic() < until:
        time.sleep(0.01)
    return not live.busy


def test_who_goes_away_gives_his_place_up(served):
    where, live = served
    head = {"Authorization": "Bearer secret"}
    said = {"model": "smollm2", "prompt": "Tell me", "max_tokens": 200, "stream": True, "temperature": 0}
    with httpx.stream("POST", where + "/v1/completions", json=said, headers=head, timeout=60) as answer:
        next(answer.iter_lines())
        assert live.seats.requests == 1
    assert emptied(live)


def test_too_many_are_told_to_come_again(served):
    where, live = served
    head = {"Authorization": "Bearer secret"}
    said = {"model": "smollm2", "prompt": "Tell me", "max_tokens": 150, "stream": True, "temperature": 0}
    refused, open_ones = [], []
    with httpx.Client(timeout=60) as client:
        for _ in range(9):  # four have places, three may wait
            request = client.build_request("POST", where + "/v1/completions", json=said, headers=head)
            answer = client.send(request, stream=True)
            (refused if answer.status_code == 429 else open_ones).append(answer)
        assert refused and refused[0].headers["Retry-After"] == "1"
        assert json.loads(refused[0].read())["error"]["type"] == "rate_limit_error"
        for answer in open_ones:
            answer.close()
    assert emptied(live)


def test_sessions_without_end_answer_as_chats_of_their_own(monkeypatch):
    """Three at once, with prompts five times as long as what is kept and longer than the model's texts were."""
    import numpy as np

    from anabranch.keep.memory import Sinks
    from anabranch.models.llama import Decoder
    from anabranch.run.chat import Chat
    from anabranch.schedule.baselines import Chunked
    from anabranch.schedule.live import Live

    model, words = Decoder(tiny(context=100), keep=Sinks(24, 2, room=8)), Bytes()
    live = Live(model, Chunked(chunk=16), sessions=2, stop=words.stop)

    def alone(prompt, limit):
        chat, said = Chat(model, words), []
        logits = chat._take(prompt)
        while len(said) < limit and not (said and said[-1] in words.stop):
            said.append(int(np.argmax(logits)))
            logits = chat._take(said[-1:])
        return b"".join(map(words.bytes, said)).decode(errors="replace"), len(said)

    prompts = [f"{name} went down to the river. " * 5 for name in ("Ann", "Bob", "A heron")]
    with serving("tiny", live, words, ServeConfig()) as where:
        client = openai.OpenAI(base_url=where + "/v1", api_key="none", max_retries=0)
        ask = lambda text: client.completions.create(model="tiny", prompt=text, max_tokens=40, temperature=0)
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(ask, prompts))
        monkeypatch.setattr("anabranch.run.openai.LIMIT", 9)
        said = [{"role": "user", "content": prompts[0]}]
        endless = client.chat.completions.create(model="tiny", messages=said, temperature=0)
    for text, answer in zip(prompts, answers, strict=True):
        assert (answer.choices[0].text, answer.usage.completion_tokens) == alone(words.plain(text), 40)
        assert answer.usage.prompt_tokens == len(text.encode()) > 120
    asked = words.chat(said)
    assert (endless.choices[0].message.content, endless.usage.completion_tokens) == alone(asked, 9)
    assert endless.usage.prompt_tokens == len(asked)


def test_who_waits_is_told_when_the_engine_ends(smollm2):
    from starlette.testclient import TestClient

    from anabranch.run.openai import LanguageServer
    from anabranch.sessions import Engine

    class Broken:
        """Says one token, and fails."""

        room, asked = 100, threading.Event()

        def submit(self, ask, emit, found):
            self.emit = emit
            self.asked.set()
            return 0

        def cancel(self, number):
            pass

        def run(self, stop):
            self.asked.wait()
            try:
                self.emit(5)
                raise RuntimeError("broken")
            finally:
                self.emit(None)

    said = {"model": "m", "prompt": "Hi", "max_tokens": 5}
    for stream in (False, True):
        engine: Engine = Broken()
        engine.asked = threading.Event()
        app = LanguageServer("m", engine, smollm2[1], ServeConfig()).app
        with TestClient(app, base_url="http://127.0.0.1") as client:
            answer = client.post("/v1/completions", json=said | {"stream": stream})
            if stream:
                assert "answers no more" in answer.text and "[DONE]" not in answer.text
            else:
                assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error"
            assert client.get("/readyz").status_code == 503
            assert client.post("/v1/completions", json=said).status_code == 503


def test_metrics_count_tokens(served, client):
    client.completions.create(model="smollm2", prompt="Once", max_tokens=3)
    assert httpx.get(served[0] + "/metrics", headers={"Authorization": "Bearer secret"}).status_code == 403
    page = httpx.get(served[0] + "/metrics", headers={"Authorization": "Bearer watch"}).text
    counts = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(counts["anabranch_answer_tokens_total"]) >= 3 and float(counts["anabranch_prompt_tokens_total"]) >= 1
    assert float(counts["anabranch_first_token_seconds_count"]) >= 1
    assert "anabranch_cached_tokens_total" in counts


class Letters:
    """A vocabulary whose tokens are bytes."""

    stop: set[int] = set()

    def bytes(self, token):
        return bytes([token])


@pytest.mark.parametrize("stops", [[], ["end"], ["né"], ["🙂"]])
def test_words_are_whole_characters_and_never_part_of_a_stop(stops):
    from anabranch.run.openai import Words

    text = "Ünï 日本 🙂 not enough né the end."
    words, said = Words(Letters(), stops), []
    for byte in text.encode():
        said.append(words.add(byte))
        if words.stopped:
            break
    said.append(words.end())
    assert "".join(said) == (text[: text.index(stops[0])] if stops else text)
    assert not any("\ufffd" in part for part in said)
