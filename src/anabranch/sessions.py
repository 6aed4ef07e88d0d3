"""Sessions with a language model: what is asked of whoever serves them, and of a vocabulary."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol


class Ask(NamedTuple):
    """What a session is to do."""

    prompt: list[int]
    limit: int
    """Tokens of the answer at most."""
    temperature: float = 0.0
    """0 is always the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that have so much probability together."""
    seed: int = 0
    ttft: float = 1.0
    """By when the first token is expected, seconds after this."""
    tds: float = 4.8
    """How fast the reader reads, tokens a second."""
    salt: bytes = b""
    """Only sessions with the same one share what is computed of prompts that begin alike."""


LIMIT = 512
"""Tokens of an answer where a session has no end and nobody says how many."""


class Full(Exception):
    """There is no room for more; come again after `after` seconds."""

    def __init__(self, what: str, after: float):
        super().__init__(f"{what} is full; come again in {after:g} s")
        self.after = after


class Engine(Protocol):
    """Serves sessions in a thread of its own, in which `emit` is called with each token, and at the end with None.

    Where prompts share what is computed of them, `found` is called before with how many tokens were there.
    """

    @property
    def room(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None where there is no end."""
        ...

    def submit(self, ask: Ask, emit: Callable[[int | None], None], found: Callable[[int], None]) -> int:
        """Begin a session.

        Raises:
            Full: if too many wait.
            ValueError: if the prompt is empty, or it and the answer have no room.
        """
        ...

    def cancel(self, number: int) -> None:
        """End a session, if it has not ended."""
        ...

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set."""
        ...


class Vocabulary(Protocol):
    """Text to tokens and back."""

    stop: set[int]
    """Tokens that end an answer."""

    def plain(self, text: str) -> list[int]: ...
    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]: ...
    def bytes(self, token: int) -> bytes: ...
