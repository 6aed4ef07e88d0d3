"""Text to tokens and back, as a GGUF file says.

>>> text = Tokens.of(smollm2_file())  # doctest: +SKIP
>>> text.decode(text.encode("Hello there"))  # doctest: +SKIP
'Hello there'
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anabranch.models.weights import gguf_reader

_ENDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_SPACE = r"|\s+(?!\S)|\s+"
_GPT2 = rf"{_ENDS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+{_SPACE}"
_LINES = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+{_SPACE}"
_WORDS = rf"(?i:{_ENDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
PIECES = {
    "gpt-2": _GPT2,
    "smollm": r"\p{N}|" + _GPT2,
    "qwen2": rf"{_WORDS}|\p{{N}}{_LINES}",
    "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}{_LINES}",
}
"""How text is cut before pairs of bytes are merged, by `tokenizer.ggml.pre`."""


def _bytes() -> dict[str, int]:
    """The letters in which byte-level vocabularies write bytes: printable ones as they are, the others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _bytes()


class Tokens:
    """A byte-level BPE vocabulary with its special tokens and chat template."""

    def __init__(self, tokenizer: Any, stop: set[int], template: str | None):
        self.tokenizer, self.stop, self.template = tokenizer, stop, template
        self.added = set(tokenizer.get_added_tokens_decoder())
        """`stop`: tokens that end an answer."""

    @classmethod
    def of(cls, path: str | Path) -> "Tokens":
        """The vocabulary of a GGUF file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if its vocabulary is of another kind.
        """
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        fields = gguf_reader(path).fields

        def read(name: str, other: Any = None) -> Any:
            return fields[name].contents() if name in fields else other

        kind, pre = read("tokenizer.ggml.model"), read("tokenizer.ggml.pre", "gpt-2")
        if kind != "gpt2" or pre not in PIECES:
            raise ValueError(
                f"{path}: the vocabulary must be gpt2 with one of {', '.join(PIECES)}, got {kind!r}, {pre!r}"
            )
        names = read("tokenizer.ggml.tokens", [])
        merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges", [])]
        made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES[pre]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        special = [name for name, kind in zip(names, read("tokenizer.ggml.token_type", []), strict=False) if kind == 3]
        made.add_special_tokens([AddedToken(name, normalized=False) for name in special])
        ends = {read(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")} - {None}
        ends |= {i for i, name in enumerate(names[: len(special) + 1]) if name in ("<|endoftext|>", "<|im_end|>")}
        return cls(made, ends, read("tokenizer.chat_template"))

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text are recognised: do not pass on what strangers wrote, but through `chat`."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int], special: bool = False) -> str:
        """Text; half of a character becomes U+FFFD. `special` keeps the special tokens."""
        return self.tokenizer.decode([int(i) for i in tokens], skip_special_tokens=not special)

    def bytes(self, token: int) -> bytes:
        """What a token adds to a text; nothing for special ones and those that are none."""
        name = self.tokenizer.id_to_token(token)
        return b"" if name is None or token in self.added else bytes(BYTES[letter] for letter in name)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation of `{"role": ..., "content": ...}`, up to where the assistant answers.

        Special tokens that contents spell out are taken as plain text, so that nobody can speak as another.

        Raises:
            ValueError: if the model has no chat template.
        """
        if self.template is None:
            raise ValueError("the model has no chat template")
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        # The template places contents as marks, which then become the tokens of what they stand for.
        mark = lambda i: f"\ue000{i}\ue001"
        marked = [{**message, "content": mark(i)} for i, message in enumerate(messages)]
        text = env.from_string(self.template).render(messages=marked, add_generation_prompt=True)
        found: list[int] = []
        for i, message in enumerate(messages):
            before, there, text = text.partition(mark(i))
            if not there:
                raise ValueError(f"the chat template has no place for message {i}, of role {message.get('role')!r}")
            found += self.encode(before) + self.plain(message["content"])
        return found + self.encode(text)

    def plain(self, text: str) -> list[int]:
        """Tokens of a text in which nothing is special."""
        made = self.tokenizer
        pieces = made.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for piece, _ in pieces for token in made.model.tokenize(piece)]
