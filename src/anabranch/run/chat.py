"""A conversation with a language model that may last for ever, in a memory of fixed size.

    >>> chat = Chat(Decoder(smollm2(), keep=Sinks(1024)), Tokens.of(smollm2_file()))  # doctest: +SKIP
    >>> print("".join(chat.say("What is the capital of France?")))  # doctest: +SKIP
    The capital of France is Paris.

Only what is new is read: what was said before is in the memory, as far as it has been kept.
"""

import codecs
from collections.abc import Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from anabranch.decode.base import Draw, sample
from anabranch.keep.memory import pieces
from anabranch.models.llama import Decoder, Session
from anabranch.sessions import LIMIT, Vocabulary


class Chat:
    """One conversation.

    Args:
        model: with a memory that forgets, of `anabranch.keep`.
        temperature: 0 is always the likeliest token.
        limit: tokens of an answer at most.

    Raises:
        ValueError: if the memory does not forget, or a number is out of range.
    """

    def __init__(
        self, model: Decoder, vocabulary: Vocabulary, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        limit: int = LIMIT,
    ):  # fmt: skip
        room = getattr(model.keep, "room", None)
        if room is None:
            raise ValueError(f"a conversation without end needs a memory that forgets, got {type(model.keep).__name__}")
        if temperature < 0 or not 0 < top_p <= 1 or limit < 1:
            said = f"got temperature={temperature}, top_p={top_p}, limit={limit}"
            raise ValueError(f"temperature must be at least 0, top_p in 0..1 and limit at least 1, {said}")
        self.model, self.vocabulary, self.limit = model, vocabulary, limit
        self.state, self.room = model.init(), room
        self.how = "likeliest" if temperature == 0 else "all" if top_p == 1 else "top_p"
        row: Any = lambda x, kind: np.array([x], kind)
        self.draw = Draw(*(row(x, np.float32) for x in (temperature, top_p)), *(row(x, np.int32) for x in (seed, 0)))

    @property
    def read(self) -> int:
        """Tokens of the conversation so far."""
        return int(self.state.length)

    @property
    def kept(self) -> int:
        """Tokens that are in memory, in the mean over layers and heads."""
        return round(float(np.mean([held.live for held in self.state.memory])))

    def say(self, text: str) -> Iterator[str]:
        """The answer to a message, in parts as they come. A message that is given up half-way stays unfinished.

        Raises:
            ValueError: if the model has no chat template, or one that shows earlier messages otherwise later on.
        """
        logits, characters = self._take(self._asked(text)), codecs.getincrementaldecoder("utf-8")(errors="replace")
        for _ in range(self.limit):
            self.draw = self.draw._replace(step=self.draw.step + 1)
            token = int(_sample(logits, self.draw, how=self.how))
            if token in self.vocabulary.stop:
                break
            yield characters.decode(self.vocabulary.bytes(token))
            logits = self._take([token])
        yield characters.decode(b"", final=True)

    def _asked(self, text: str) -> list[int]:
        """The tokens from where the conversation is up to the answer."""
        message = {"role": "user", "content": text}
        if not self.read:
            return self.vocabulary.chat([message])
        # What the template writes between an answer and the next message is the same in any conversation.
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        first, both = self.vocabulary.chat(before[:1]), self.vocabulary.chat([*before, message])
        answered = first + self.vocabulary.plain(".")
        if both[: len(answered)] != answered:
            raise ValueError("the chat template shows earlier messages otherwise once there are more")
        return both[len(answered) :]

    def _take(self, tokens: list[int]) -> jax.Array:
        """Read tokens, in `pieces`; the logits of the next one."""
        logits = None
        for n in pieces(len(tokens), self.room):
            self.state, logits = _advance(self.model, (self.state, jnp.asarray(tokens[:n], jnp.int32)))
            tokens = tokens[n:]
        assert logits is not None, "a template writes something"
        return logits


@partial(eqx.filter_jit, donate="all-except-first")
def _advance(model: Decoder, given: tuple[Session, jax.Array]) -> tuple[Session, jax.Array]:
    state, logits = model.advance(*given)
    return state, logits[-1:]


@partial(jax.jit, static_argnames="how")
def _sample(logits: jax.Array, draw: Draw, how: str) -> jax.Array:
    return sample(logits, draw, how)[0]
