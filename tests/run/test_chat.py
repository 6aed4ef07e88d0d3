"""Conversations without end."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch import cli
from anabranch.keep.memory import Sinks
from anabranch.models.llama import Config, Decoder, Llama
from anabranch.run.chat import Chat

START, END = 256, 257


class Bytes:
    """A vocabulary of bytes, with a template as most models have it."""

    stop = {END}

    def plain(self, text):
        return list(text.encode())

    def bytes(self, token):
        return bytes([token]) if token < START else b""

    def chat(self, messages):
        said = [[START, *self.plain(f"{m['role']}\n{m['content']}"), END, 10] for m in messages]
        return [*sum(said, self.plain("Be kind.\n")), START, *self.plain("assistant\n")]


def tiny(context=8192):
    """A language model of bytes that talks nonsense; as in test_live.py, so that what it runs is compiled once."""
    sizes = Config(vocab=258, width=16, layers=1, heads=2, kv_heads=1, hidden=16, context=context)
    return jax.tree.map(lambda x: 4 * x, Llama(sizes, key=jax.random.PRNGKey(0)))


@pytest.fixture(scope="module")
def llama():
    return tiny()


def test_what_is_new_is_read_as_the_template_would_have_it(llama, monkeypatch):
    """With room for all, the memory after two turns is that of the whole conversation, read at once."""
    cell, words, turns = Decoder(llama, keep=Sinks(400, room=64)), Bytes(), []
    chat = Chat(cell, words, limit=5)
    take = chat._take
    monkeypatch.setattr(chat, "_take", lambda tokens: (turns.append(list(tokens)), take(tokens))[1])
    for text in ("Hello", "And?"):
        list(chat.say(text))
    asked, said = [turn for turn in turns if len(turn) > 1], [turn for turn in turns if len(turn) == 1]
    answer = len(said) // 2  # both have as many tokens as they may
    hello, empty, more = (
        {"role": r, "content": c} for r, c in (("user", "Hello"), ("assistant", ""), ("user", "And?"))
    )
    at, both = len(words.chat([hello])), words.chat([hello, empty, more])
    assert len(asked) == 2 and answer == 5
    spoken = both[:at], *said[:answer], both[at:], *said[answer:]
    whole = [token for turn in spoken for token in turn]
    assert chat.read == len(whole)
    state, _ = cell.advance(cell.init(), jnp.array(whole))
    following = jnp.int32(65)
    np.testing.assert_allclose(cell.step(state, following)[1], cell.step(chat.state, following)[1], atol=1e-3)


def test_it_goes_on_in_bounded_memory(llama):
    chat = Chat(Decoder(llama, keep=Sinks(24, 2, room=8)), Bytes(), temperature=1.0, top_p=0.9, seed=3, limit=8)
    shapes = jax.tree.map(jnp.shape, chat.state)
    said = ["".join(chat.say("Tell me more")) for _ in range(4)]
    assert chat.read > 150 and 24 <= chat.kept <= 32 and len(set(said)) > 1
    assert jax.tree.map(jnp.shape, chat.state) == shapes
    assert chat.state.memory[0].position[0, :2].tolist() == [0, 1]
    again = Chat(chat.model, Bytes(), temperature=1.0, top_p=0.9, seed=3, limit=8)
    assert "".join(again.say("Tell me more")) == said[0]


def test_what_cannot_be_is_named(llama):
    with pytest.raises(ValueError, match="a memory that forgets, got Room"):
        Chat(Decoder(llama, 16), Bytes())
    with pytest.raises(ValueError, match=r"got temperature=-1, top_p=1\.0, limit=512"):
        Chat(Decoder(llama, keep=Sinks(16)), Bytes(), temperature=-1)


def test_lines_are_answered_until_quit(llama, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n/quit\nnever\n"))
    chat = Chat(Decoder(llama, keep=Sinks(24, 2, room=8)), Bytes(), limit=4)
    cli._talk(chat)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 1 and f"{chat.read:,} tokens read, {chat.kept:,} kept" in err and chat.read < 60


def test_a_file_says_which_memory(tmp_path):
    run = lambda *args: CliRunner().invoke(cli.app, ["chat", *args])
    path = tmp_path / "chat.toml"
    path.write_text(
        '[model]\nname = "m"\nweights = "none.gguf"\n[model.memory]\npolicy = "anabranch.keep.memory:Lost"\n'
    )
    assert "model.memory.policy: anabranch.keep.memory has no 'Lost'" in run(str(path)).output
    path.write_text(path.read_text().replace("Lost", "H2O") + "options = { budget = 0 }\n")
    assert "model.memory.options: budget must be at least 1, got 0" in run(str(path)).output
    path.write_text(path.read_text().replace("budget = 0", "budget = 9"))
    assert "there is no model" in run(str(path)).output
    serve = lambda: CliRunner().invoke(cli.app, ["serve", str(path)]).output
    assert "there is no model" in serve()
    path.write_text(path.read_text().replace("budget = 9", "budget = 0"))
    assert "model.memory.options: budget must be at least 1, got 0" in serve()
    path.write_text(path.read_text().replace("[model.memory]", "size = 64\n[model.memory]"))
    assert "model: sessions have either a size or a memory that forgets" in serve()
