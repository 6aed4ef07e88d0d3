"""The time to the first token where all chats begin with the same system prompt, with and without sharing it.

    anabranch fetch smollm2 && anabranch bench prefix

Two servers of SmolLM2 in this process, which differ in `prefixes` alone, are asked in turns by the `openai`
client: a system prompt of about 500 tokens and one of many short questions, as a stream. Then four clients at a time.
Answers must be the same. Reported: seconds to the first token, with the ratio turn by turn.
"""

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import openai
import uvicorn

from anabranch.models.llama import Decoder
from anabranch.models.tokens import Tokens
from anabranch.models.weights import smollm2, smollm2_file
from anabranch.run.config import ServeConfig
from anabranch.run.openai import LanguageServer
from anabranch.schedule.baselines import Chunked
from anabranch.schedule.live import Live
from common import in_turn, ratio, spread, write

RULES = (
    "Answer in one short sentence. ", "Be polite, and never guess what you do not know. ",
    "Give numbers with their units, and years with four digits. ", "Do not give medical or legal advice. ",
    "If a question has several parts, answer the most important one first. ",
)  # fmt: skip
QUESTIONS = (
    "France Spain Italy Austria Norway Poland Greece Egypt Kenya Japan China India Peru Chile Cuba Canada".split()
)


class Served(NamedTuple):
    live: Live
    server: Any
    thread: threading.Thread
    client: openai.OpenAI

    @classmethod
    def of(cls, model: Decoder, text: Tokens, **options: Any) -> "Served":
        live = Live(model, Chunked(chunk=256), sessions=4, stop=text.stop, **options)
        live.warm()
        app = LanguageServer("smollm2", live, text, ServeConfig()).app
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        where = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        return cls(live, server, thread, openai.OpenAI(base_url=where, api_key="none", max_retries=0))

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)


class Answer(NamedTuple):
    first: float
    """Seconds to the first token."""
    text: str
    prompt: int
    cached: int


def ask(client: openai.OpenAI, system: str, question: str) -> Answer:
    messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    start, first, parts, usage = time.perf_counter(), None, [], None
    for chunk in client.chat.completions.create(
        model="smollm2", messages=messages, temperature=0, max_tokens=8, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - start
            parts.append(chunk.choices[0].delta.content)
        usage = chunk.usage or usage
    assert first is not None and usage is not None
    return Answer(first, "".join(parts), usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few requests; nothing is written")
    args = parser.parse_args()
    text, model = Tokens.of(smollm2_file()), Decoder(smollm2(), 768)
    system = "You help travellers. "
    while len(text.encode(system)) < 490:
        system += RULES[len(system) % len(RULES)]
    served = {name: Served.of(model, text, prefixes=name == "shared") for name in ("shared", "alone")}
    said: dict[str, list[Answer]] = {name: [] for name in served}

    def one(name: str) -> float:
        country = QUESTIONS[len(said[name]) % len(QUESTIONS)]
        said[name].append(ask(served[name].client, system, f"What is the capital of {country}?"))
        return said[name][-1].first

    def four(name: str) -> float:
        with ThreadPoolExecutor(4) as pool:
            work = [pool.submit(ask, served[name].client, system, f"Where is {country}?") for country in QUESTIONS[:4]]
            return sum(answer.result().first for answer in work) / 4

    try:
        for name in served:
            one(name)  # the first chat of all computes what the others share
        repeats = 3 if args.smoke else 15
        runs = lambda run: in_turn({name: lambda name=name: run(name) for name in served}, repeats)
        times, together = runs(one), runs(four)
    finally:
        for each in served.values():
            each.end()
    assert [answer.text for answer in said["shared"]] == [answer.text for answer in said["alone"]]
    counts = said["shared"][-1]
    record = {
        "prompt tokens": counts.prompt,
        "cached tokens": counts.cached,
        "seconds to the first token": {
            name: {arm: spread(values) for arm, values in found.items()}
            | {"shared / alone": ratio(found["shared"], found["alone"])}
            for name, found in (("one at a time", times), ("four at a time, mean", together))
        },
        "turns": repeats,
        "answers": "the same",
    }
    print(record)
    if not args.smoke:
        print(write("prefix", record, "anabranch", "jax", "openai"))


if __name__ == "__main__":
    main()
