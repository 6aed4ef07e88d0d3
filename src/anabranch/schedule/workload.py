"""What arrives at a server of language models: prompts, lengths of answers, and when.

>>> load = Workload.synthetic(1000, prompt=500, output=100).poisson(rate=2.0, seed=0)
>>> len(load), bool(1.8 < len(load) / load.arrival[-1] < 2.2)
(1000, True)
"""

import csv
from collections.abc import Hashable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64

from anabranch.data import root
from anabranch.keep.blocks import block_keys


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they arrive.

    Raises:
        ValueError: if columns differ in length, times are not sorted, negative or not finite, or a request has no
            prompt or no output, or other tokens than its prompt is long; the message names the row.
    """

    arrival: Float64[np.ndarray, " n"]
    """Seconds."""
    prompt: Int64[np.ndarray, " n"]
    """Tokens."""
    output: Int64[np.ndarray, " n"]
    """Tokens of the answer, which a server does not know."""
    ttft: Float64[np.ndarray, " n"] = 1.0  # pyright: ignore[reportAssignmentType]
    """By when a reader expects the first token, seconds after arrival. One number stands for all."""
    tds: Float64[np.ndarray, " n"] = 4.8  # pyright: ignore[reportAssignmentType]
    """How fast a reader reads, tokens a second."""
    group: Int64[np.ndarray, " n"] = -1  # pyright: ignore[reportAssignmentType]
    """Requests of one group share their first `shared` tokens; -1 is alone."""
    shared: Int64[np.ndarray, " n"] = 0  # pyright: ignore[reportAssignmentType]
    tokens: np.ndarray | None = None
    """The tokens of each prompt, an array of arrays: requests of no group share what their prompts have in common."""

    def __post_init__(self):
        n = len(self.arrival)
        for name, value in self._columns().items():
            if name == "tokens":  # NumPy would make rows of equal length a matrix
                value, texts = np.empty(len(value), object), value
                for i, text in enumerate(texts):
                    value[i] = np.asarray(text, np.int64)
            kind = np.float64 if name in ("arrival", "ttft", "tds") else object if name == "tokens" else np.int64
            column = np.asarray(value, kind)
            column = np.full(n, column) if column.ndim == 0 else column
            if column.shape != (n,):
                raise ValueError(f"{name} has {len(column)} rows, arrival {n}")
            object.__setattr__(self, name, column)
        rules = (
            ("arrival", ~(np.isfinite(self.arrival) & (self.arrival >= 0)), "must be finite and not negative"),
            ("arrival", np.diff(self.arrival, prepend=0.0) < 0, "comes before the one in the row above"),
            ("prompt", self.prompt < 1, "must be at least 1"),
            ("output", self.output < 1, "must be at least 1"),
            ("ttft", ~(self.ttft >= 0), "must not be negative"),
            ("tds", ~(self.tds > 0), "must be positive"),
        )
        for name, bad, said in rules:
            if bad.any():
                row = int(bad.argmax())
                raise ValueError(f"row {row}: {name} {said}, got {getattr(self, name)[row]}")
        for row, text in enumerate(() if self.tokens is None else self.tokens):
            if len(text) != self.prompt[row]:
                raise ValueError(
                    f"row {row}: tokens must be as many as prompt says, {self.prompt[row]}, got {len(text)}"
                )

    def __len__(self) -> int:
        return len(self.arrival)

    def _columns(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def keys(self, row: int, block: int) -> list[Hashable]:
        """What a request can share: a key for each full block, equal where all up to it is the same."""
        if self.group[row] >= 0:
            return [(int(self.group[row]), i) for i in range(int(self.shared[row]) // block)]
        return [] if self.tokens is None else [*block_keys(self.tokens[row], block)]

    @classmethod
    def azure(cls, name: Literal["conv", "code"]) -> "Workload":
        """An hour of Azure's language model service (Patel et al. 2024): conversations, or code completion.

        Raises:
            FileNotFoundError: without the data.
            ValueError: if there is no such trace.
        """
        if name not in ("conv", "code"):
            raise ValueError(f'name must be "conv" or "code", got {name!r}')
        with open(root() / "azure_llm" / f"{name}.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        times = np.array([datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows])
        prompt, output = (
            np.maximum(1, [int(row[key]) for row in rows]) for key in ("ContextTokens", "GeneratedTokens")
        )
        order = np.argsort(times, kind="stable")
        return cls((times - times.min())[order], prompt[order], output[order])

    @classmethod
    def synthetic(cls, n: int, prompt: int, output: int, every: float = 1.0) -> "Workload":
        """Equal requests at equal intervals."""
        return cls(np.arange(n) * every, np.full(n, prompt), np.full(n, output))

    def take(self, rows: slice | Int64[np.ndarray, " k"]) -> "Workload":
        """Some of the requests; times begin with the first."""
        columns = {name: value[rows] for name, value in self._columns().items()}
        columns["arrival"] = columns["arrival"] - columns["arrival"][:1].sum()
        return Workload(**columns)

    def head(self, n: int) -> "Workload":
        """The first n."""
        return self.take(slice(0, n))

    def poisson(self, rate: float, seed: int) -> "Workload":
        """The same requests in random order, arriving independently, `rate` a second."""
        return self.gamma(rate, 1.0, seed)

    def gamma(self, rate: float, cv: float, seed: int) -> "Workload":
        """As `poisson`, with intervals of this coefficient of variation: 1 is Poisson, more comes in bursts.

        Raises:
            ValueError: if the rate or `cv` is not positive.
        """
        if not (rate > 0 and cv > 0):
            raise ValueError(f"rate and cv must be positive, got {rate} and {cv}")
        rng = np.random.default_rng(seed)
        gaps = rng.gamma(1 / cv**2, cv**2 / rate, len(self))
        order = rng.permutation(len(self))
        mixed = {name: value[order] for name, value in self._columns().items()}
        return Workload(**mixed | {"arrival": np.cumsum(gaps)})

    def scale(self, rate: float) -> "Workload":
        """The same arrivals, faster or slower, so that there are `rate` a second on average."""
        return replace(self, arrival=self.arrival * (len(self) / self.arrival[-1] / rate))
