"""Conversations that grow beyond what is kept, on a server whose memory forgets and on one that keeps everything.

    anabranch fetch smollm2 && anabranch bench endless_served [--turns 24] [--budget 512] [--size 1536] [--smoke]

Two servers of SmolLM2 in int8 in this process, one with `Sinks(--budget)` and one with room for `--size` tokens a
session, are asked in turns by four clients at a time, through the `openai` client. Each goes on with its own
conversation: it sends all that was said and a question more, and gets up to 32 tokens. The second server refuses a
conversation once it has no room; the first must never. Reported for each turn: tokens of the conversations, and
tokens read and said a second, with the ratio of the two servers as long as both answer; and the bytes that a session
takes, and by how much the process grew between the first turn and the last.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import openai

from anabranch.keep.memory import Sinks
from anabranch.models.llama import Config, Decoder, Llama, int8
from anabranch.models.tokens import Tokens
from anabranch.models.weights import smollm2, smollm2_file
from common import ratio, resident, spread, write
from prefix import QUESTIONS, RULES, Served

CLIENTS = 4


class Turn(NamedTuple):
    """What a turn of all clients was."""

    asked: int
    """Tokens of the prompts."""
    said: int
    seconds: float


def turn(server: Served, talks: list[list[dict[str, Any]]], number: int) -> Turn | None:
    """All clients ask once more; None if a conversation has no room any more."""

    def one(i: int) -> Any:
        country = QUESTIONS[(CLIENTS * number + i) % len(QUESTIONS)]
        talks[i].append({"role": "user", "content": f"What should I know about {country}? {''.join(RULES)}"})
        messages: Any = talks[i]
        answer = server.client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=32)
        talks[i].append({"role": "assistant", "content": answer.choices[0].message.content})
        return answer.usage

    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        try:
            usages = list(pool.map(one, range(CLIENTS)))
        except openai.BadRequestError as error:
            print(f"turn {number}: {error}")
            return None
    seconds = time.perf_counter() - start
    return Turn(sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--size", type=int, default=1536)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few tokens; nothing is written")
    args = parser.parse_args()
    text = Tokens.of(smollm2_file())
    if args.smoke:
        args.turns, args.budget, args.size = 4, 64, 384
        sizes = Config(width=16, layers=1, heads=2, kv_heads=1, hidden=16)
        llama = Llama(sizes, key=jax.random.PRNGKey(0))
    else:
        llama = smollm2()
    models = {"forgets": Decoder(llama, keep=Sinks(args.budget)), "keeps": Decoder(llama, args.size)}
    served = {name: Served.of(int8(model), text) for name, model in models.items()}
    talks: dict[str, list[list[dict[str, Any]]]] = {name: [[] for _ in range(CLIENTS)] for name in served}
    turns: dict[str, list[Turn]] = {name: [] for name in served}
    held, full = [], False
    try:
        for number in range(args.turns):
            for name, server in served.items():
                if name == "keeps" and full:
                    continue
                found = turn(server, talks[name], number)
                if found is not None:
                    turns[name].append(found)
                    print(f"turn {number}, {name}: {found}", flush=True)
                elif name == "forgets":
                    raise RuntimeError(f"a session without an end has ended in turn {number}")
                else:
                    full = True
            held.append(resident())
    finally:
        for server in served.values():
            server.end()
    both = len(turns["keeps"])
    speed = {name: [(t.asked + t.said) / t.seconds for t in found] for name, found in turns.items()}
    of_one = lambda server: sum(x.nbytes for x in jax.tree.leaves(server.live.places.memory)) / (2 * CLIENTS)
    record = {
        "turns": {name: [t._asdict() for t in found] for name, found in turns.items()},
        "longest conversation, tokens": {name: round(found[-1].asked / CLIENTS) for name, found in turns.items()},
        "tokens a second": {name: spread(values) for name, values in speed.items()},
        "forgets / keeps, while both answer": ratio(speed["forgets"][:both], speed["keeps"]),
        "MB a session": {name: round(of_one(server) / 1e6, 1) for name, server in served.items()},
        "process grew, MB": round((held[-1] - held[0]) / 1e6, 1),
        "budget": args.budget,
        "size": args.size,
        "full after turns": both if full else None,
    }
    print(record)
    if not args.smoke:
        print(write("endless_served", record, "anabranch", "jax", "openai"))


if __name__ == "__main__":
    main()
