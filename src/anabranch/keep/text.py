"""One protocol for memories of text: how well real text is predicted, and what is still known of facts told long ago.

A passage is real text in which facts are told at given places, each in a line of its own. A model reads it through a
memory that does not know what will be asked, and is then asked for each fact: of eight numbers, the right one must be
the likeliest.

    >>> words = tell(list(b"once upon a time " * 9), lambda text: list(text.encode()), places=[20, 90], length=140)
    >>> bytes(words.tokens[20:64].tolist())
    b'\\nThe password of the black river is 57364.\\ne'
    >>> words.facts.candidates.shape, bytes(words.facts.candidates[0, 0].tolist())
    ((2, 8, 6), b' 57364')

`read` gives the loss of every token and the session at the end, `rank` asks that session for a fact without changing
it, and `retention` says how much of the line that told it is still in the memory.
"""

import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from anabranch import data
from anabranch.models.llama import Decoder, Session

KINDS = "red blue green white black old new small large cold warm open deep dark".split()
THINGS = "house river garden bridge station market school tower forest island village castle".split()
LINE, QUESTION = "\nThe password of the {} is {}.\n", "\nThe password of the {} is"


def shakespeare() -> str:
    """The verse of tinyshakespeare, 1.1 million characters.

    Raises:
        FileNotFoundError: if it is not in the folder of data sets.
    """
    path = data.root() / "text" / "tinyshakespeare.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it is input.txt of tinyshakespeare in karpathy/char-rnn")
    return path.read_text(encoding="utf-8")


def library() -> str:
    """The sources of Python's standard library, as installed: several million characters of code and prose."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def domains(*, held_out: bool) -> dict[str, np.ndarray]:
    """Bytes u8[n] of three kinds: verse, Python, and rows of the table of flights from New York.

    The last tenth of each is held out: of the library, modules late in the alphabet.

    Raises:
        FileNotFoundError: if the verse or the flights are not there.
    """
    flights = data.flights()
    rows = zip(*(flights[name][::20].to_pylist() for name in flights.column_names))
    table = "\n".join(",".join("NA" if value is None else str(value) for value in row) for row in rows)
    texts = {"shakespeare": shakespeare(), "library": library(), "flights": table}
    whole = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
    return {name: x[len(x) * 9 // 10 :] if held_out else x[: len(x) * 9 // 10] for name, x in whole.items()}


class Fact(NamedTuple):
    """Something that is told once and asked for later."""

    start: Int[np.ndarray, "..."]
    """Where the line begins that tells it."""
    stop: Int[np.ndarray, "..."]
    question: Int[np.ndarray, "... Q"]
    candidates: Int[np.ndarray, "... 8 A"]
    """Answers, the right one first."""


class Told(NamedTuple):
    """A passage."""

    tokens: Int[np.ndarray, " N"]
    facts: Fact
    """With a leading axis, the fact."""


def tell(
    text: Sequence[int], encode: Callable[[str], list[int]], places: Sequence[int], length: int, seed: int = 0
) -> Told:
    """The first tokens of a text, with a fact told from each of these places on: `length` tokens in all.

    Names are drawn, none twice, and so are numbers of five digits.

    Raises:
        ValueError: if places lie too close, there are more than names for them, or the text is too short.
    """
    rng = np.random.default_rng(seed)
    names = [f"{kind} {thing}" for kind in KINDS for thing in THINGS]
    usual = Counter(len(encode(LINE.format(name, 0))) for name in names).most_common(1)[0][0]
    names = [name for name in names if len(encode(LINE.format(name, 0))) == usual]  # so that all facts have one shape
    if len(places) > len(names):
        raise ValueError(f"places: there are names for {len(names)} facts, got {len(places)}")
    out, rest, facts = [], list(text), []
    for place, name in zip(sorted(places), rng.permutation(names).tolist(), strict=False):
        if place < len(out):
            raise ValueError(f"places: a fact at {place} would begin before the one at {facts[-1].start} has ended")
        taken = place - len(out)
        out, rest = out + rest[:taken], rest[taken:]
        numbers = [f"{n:05d}" for n in rng.choice(100_000, 8, replace=False).tolist()]
        line, question = encode(LINE.format(name, numbers[0])), encode(QUESTION.format(name))
        answers = [encode(QUESTION.format(name) + " " + number)[len(question) :] for number in numbers]
        facts.append(Fact(np.array(place), np.array(place + len(line)), np.array(question), np.array(answers)))
        out = out + line
    out += rest[: max(0, length - len(out))]
    if len(out) != length:
        raise ValueError(f"length: the text and the facts must make {length} tokens, got {len(out)}")
    return Told(np.array(out, np.int32), Fact(*(np.stack(part) for part in zip(*facts))))


@eqx.filter_jit
def read(cell: Decoder, tokens: Int[Array, " N"], chunk: int) -> tuple[Session, Float[Array, " N-1"]]:
    """The session after a passage whose tokens come `chunk` at a time, and each token's loss but the first's, in nats.

    Raises:
        ValueError: if the passage is no whole number of chunks.
    """
    if len(tokens) % chunk:
        raise ValueError(f"tokens must come in whole chunks of {chunk}, got {len(tokens)}")

    def step(state: Session, pair: tuple[Array, Array]) -> tuple[Session, Array]:
        xs, ys = pair
        state, logits = cell.advance(state, xs)
        return state, jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, ys[:, None], 1)[:, 0]

    pairs = tokens.reshape(-1, chunk), jnp.roll(tokens, -1).reshape(-1, chunk)
    state, losses = jax.lax.scan(step, cell.init(), pairs)
    return state, losses.reshape(-1)[:-1]


@eqx.filter_jit
def rank(cell: Decoder, session: Session, facts: Fact) -> Int[Array, " F"]:
    """How many wrong answers are likelier than the right one, for each fact: 0 is known, 3.5 is a guess."""

    def ask(fact: Fact) -> Array:
        state, logits = cell.advance(session, jnp.asarray(fact.question))
        last = jax.nn.log_softmax(logits[-1])

        def says(answer: Array) -> Array:
            """The log-probability of an answer."""
            after = jax.nn.log_softmax(cell.advance(state, answer[:-1])[1])
            return last[answer[0]] + jnp.take_along_axis(after, answer[1:, None], 1).sum()

        said = jax.vmap(says)(jnp.asarray(fact.candidates))
        return (said[1:] >= said[0]).sum()

    return jax.lax.map(ask, facts)


def retention(session: Session, facts: Fact) -> Float[np.ndarray, "F L"]:
    """Which part of the line that told each fact is in the memory of each layer, in the mean over its heads."""
    positions = [np.asarray(held.position) for held in session.memory]
    there = lambda position, start, stop: ((position >= start) & (position < stop)).sum(1).mean() / (stop - start)
    spans = zip(facts.start.tolist(), facts.stop.tolist(), strict=True)
    return np.array([[there(position, *span) for position in positions] for span in spans])
