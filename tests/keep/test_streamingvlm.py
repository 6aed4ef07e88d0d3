"""StreamingVLM against the list of tokens that the authors' code holds, and the forms of its training."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.keep.streamingvlm import (
    Chunk,
    Narrator,
    StreamingVLM,
    example,
    narrated,
    overlapped_chunks,
    resink,
    sft_mask_check,
    sft_targets,
)
from anabranch.models.video_qa import BACK, EOS, PATCHES, SILENT, Config, VideoQA, Watcher, question

KEY = jax.random.PRNGKey(0)
KEEP = StreamingVLM(sink=3, text=3, vision=3, asked=3)
SMALL = Config(vocab=64, width=16, layers=2, heads=4, kv_heads=2, hidden=16, rope_base=1000.0)
step, tell, ask = (eqx.filter_jit(f) for f in (Watcher.step, Watcher.tell, Watcher.ask))


@pytest.fixture(scope="module")
def model():
    return jax.tree.map(lambda x: 2 * x, eqx.filter_jit(VideoQA)(SMALL, key=KEY))


def segments(tokens, start, end):
    """(first, last) of all stretches from the tokens `start` to `end`, and the line break after them if there is."""
    out, i = [], 0
    while i < len(tokens):
        if tokens[i : i + len(start)] == start:
            j = next(j for j in range(i + len(start), len(tokens)) if tokens[j] == end)
            out.append((i, j + (tokens[j + 1 : j + 2] == ["\n"])))
            i = j
        i += 1
    return out


def official(first, words, rounds, sink, window):
    """What remains as each reply begins, by the code's list operations: the numbers of frames and the words.

    Tokens of format are strings, words and patches pairs.
    """
    tokens = ["<", "previous", "text", "\n", *[("word", w) for w in first], ">"]
    for i, reply in enumerate(words):
        if i >= rounds:
            # The words of the oldest reply go to the end of the earlier ones, without its ellipsis.
            a, b = segments(tokens, ["<", "assistant"], ">")[0]
            b = b - 2 - (tokens[b] == "\n")
            a += 3
            end = segments(tokens, ["<", "previous"], ">")[0][1]
            end -= 1 + (tokens[end] == "\n")  # the last token of the earlier words
            tokens = tokens[: end + 1] + tokens[a : b + 1] + tokens[end + 1 : a] + tokens[b + 1 :]
            a, b = segments(tokens, ["<", "assistant"], ">")[0]
            del tokens[a : b + 1]
            a, b = segments(tokens, ["<", "user"], ">")[0]
            del tokens[a : b + 1]
        if i > 0:
            a, b = segments(tokens, ["<", "previous"], ">")[0]
            a, b = a + sink + 4, b - window - 1
            if a <= b:
                del tokens[a : b + 1]
        tokens += ["\n", "<", "user", "\n", "time", *[("frame", i)] * 8, ">", "\n", "<", "assistant", "\n"]
        yield [token for token in tokens if isinstance(token, tuple)]
        tokens += [*[("word", w) for w in reply], "...", ">"]


@pytest.mark.parametrize("rounds", [4, 2])
def test_what_is_held_is_what_the_authors_hold(rounds):
    """For 40 rounds, some silent; the window of the code counts a line break."""
    rng = np.random.default_rng(0)
    number = iter(range(1000))
    first = [next(number) for _ in range(3)]
    words = [[next(number) for _ in range(rng.integers(0, 4) * (rng.random() < 0.7))] for _ in range(40)]
    keep = StreamingVLM(sink=6, text=5, vision=rounds, said=3, patches=8)
    memory, tick, names = keep.empty(1, 2, places=2), 0, {}

    @eqx.filter_jit
    def extend(memory, at):
        x = jnp.ones((len(at), 1, 2))
        return keep.settle((memory.extend(x, x, x, at, lambda x, positions: x)[1],))[0]

    def tell(memory, word):
        nonlocal tick
        names[tick], tick = ("word", word), tick + 1
        return extend(memory, jnp.array([[tick - 1, 0, 0]]))

    for word in first:
        memory = tell(memory, word)
    for i, (reply, wanted) in enumerate(zip(words, official(first, words, rounds, 6, 6), strict=True)):
        names[tick], tick = ("frame", i), tick + 1
        memory = extend(memory, jnp.array([[tick - 1, 1 + y, 1 + x] for y in (0, 1) for x in range(4)]))
        assert [names[t] for t in memory.position[0].tolist() if t >= 0] == wanted
        for word in reply:
            memory = tell(memory, word)
        held = [names[t] for t in memory.position[0].tolist() if t >= 0]
        assert held == wanted + [("word", word) for word in reply]  # nothing leaves before the next frame
        assert memory.position.shape == (1, keep.most + keep.room)
    assert len(wanted) > 8 * rounds + 11  # both ends of the earlier words are full


def stream(frames, words=0.4):
    """Random pictures and words: two, one or none after each."""
    rng = np.random.default_rng(1)
    said = np.where(rng.random((frames, 2)) < words, rng.integers(0, 10, (frames, 2)), SILENT)
    said[said[:, 0] == SILENT, 1] = SILENT
    return jnp.asarray(rng.uniform(size=(frames, 16, 16)), jnp.float32), jnp.asarray(said, jnp.int32)


def told(watcher, frames, words):
    """The stream told by hand: states and logits after each frame and word."""
    state, out = watcher.init(), []
    for frame, reply in zip(frames, words, strict=True):
        state, logits = step(watcher, state, frame)
        out.append(logits)
        for word in reply[reply != SILENT]:
            state, logits = tell(watcher, state, word[None])
            out.append(logits[0])
    return state, jnp.stack(out)


def test_a_window_for_all_is_a_chunk_of_all(model):
    """What is trained is what lives on the stream, while nothing has to leave."""
    frames, words = stream(8)
    keep = StreamingVLM(sink=0, text=0, vision=8, asked=3)
    state, found = told(Watcher(model, keep), frames, words)
    chunk = Chunk(jnp.zeros(0, jnp.int32), frames, words)
    said, spoken = eqx.filter_jit(narrated)(model, chunk, question(BACK, 1))
    _, counts = sft_targets(words)
    np.testing.assert_allclose(found, said[counts > 0], atol=1e-4)
    np.testing.assert_allclose(ask(Watcher(model, keep), state, question(BACK, 1)), spoken[-1], atol=1e-4)


def test_first_words_of_a_chunk_are_told_before_it(model):
    frames, words = stream(4)
    before = jnp.array([3, 1, -1, -1])
    said, _ = eqx.filter_jit(narrated)(model, Chunk(before, frames, words))
    watcher = Watcher(model, KEEP)
    state = watcher.init()
    for word in before[:2]:
        state, _ = tell(watcher, state, word[None])
    _, logits = step(watcher, state, frames[0])
    np.testing.assert_allclose(said[0, 0], logits, atol=1e-4)


def test_chunks_overlap_and_know_what_was_said_before():
    frames, words = stream(20)
    chunks = overlapped_chunks(frames, words, 8, 4, sink=2, text=3)
    assert chunks.frames.shape == (4, 8, 16, 16) and (chunks.before[0] == -1).all()
    for start, before, part, said in zip((0, 4, 8, 12), *chunks, strict=True):
        np.testing.assert_array_equal(part, frames[start : start + 8])
        np.testing.assert_array_equal(said, words[start : start + 8])
        old = [w for w in words[:start].reshape(-1).tolist() if w != SILENT]
        wanted = old if len(old) <= 5 else old[:2] + old[-3:]
        assert before.tolist() == wanted + [-1] * (5 - len(wanted))
    target, counts = sft_targets(jnp.array([[7, 12], [SILENT, SILENT], [5, SILENT]]))
    assert target[0].tolist() == [7, 12, EOS] and target[1, 0] == SILENT and target[2, :2].tolist() == [5, EOS]
    assert counts.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_a_chunk_of_all_covers_a_memory_of_all():
    _, words = stream(24)
    words = np.asarray(words)
    assert sft_mask_check(StreamingVLM(sink=0, text=0, vision=24), words, 24, 0) == (1.0, 1.0)
    # By hand, without words: frames 6 to 8 of ten see three frames, and in chunks [0, 8) and [2, 10) all before.
    silent, pairs = np.full((10, 2), SILENT), lambda frames: frames * PATCHES**2 + PATCHES * (PATCHES + 1) / 2
    inside = sum(pairs(min(t, 2)) for t in range(10))
    covered, exact = sft_mask_check(StreamingVLM(sink=0, text=0, vision=3), silent, 8, 6)
    assert covered == 1.0 and exact == pytest.approx(inside / sum(pairs(t if t < 8 else t - 2) for t in range(10)))
    covered, _ = sft_mask_check(StreamingVLM(sink=0, text=0, vision=3), silent, 5, 0)
    assert covered == pytest.approx(1 - 3 * PATCHES**2 / inside)  # frame 5 misses two frames, frame 6 one
    words = np.where(np.arange(10)[:, None] % 2, SILENT, 1).repeat(2, 1)
    assert sft_mask_check(StreamingVLM(sink=4, text=4, vision=3), words, 6, 4)[0] > 0.99
    assert sft_mask_check(StreamingVLM(sink=0, text=0, vision=3), words, 6, 4)[1] < 0.9


def test_a_narrator_says_what_telling_by_hand_gives(model):
    """Greedy words of random weights; the memory is that of a stream with these words in it."""
    frames, _ = stream(14)
    cell = Narrator(model, KEEP)
    state, words = eqx.filter_jit(cell.advance)(cell.init(), frames)
    by_hand, logits = told(cell.watcher, frames, words)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    target, counts = sft_targets(words)
    best = np.asarray(logits.argmax(-1))
    wanted = np.asarray(target[counts > 0])
    # After the last word that fits nothing is asked; what ends a reply may be silence as well.
    open_ended = np.asarray(jnp.ones_like(counts).at[:, -1].set(0)[counts > 0]) > 0
    ends = np.isin(wanted, (SILENT, EOS))
    assert (np.where(ends, np.isin(best, (SILENT, EOS)), best == wanted) | ~open_ended).all()
    assert (words != SILENT).any() and int(state.tick) == 14 + int((words != SILENT).sum())


def test_append_positions_are_those_of_the_stream(model):
    """Compact ones stay within the memory, so that a late stream is read as an early one."""
    frames, _ = stream(6)
    for compact in (True, False):
        watcher = Watcher(model, KEEP if compact else StreamingVLM(sink=3, text=3, vision=3, asked=3, compact=False))
        state, _ = told(watcher, frames, jnp.full((6, 2), SILENT))
        late = [replace(held, position=held.position + 9 * (held.position > 4)) for held in state.memory]
        late = state._replace(memory=tuple(late), tick=state.tick + 9)
        here, there = step(watcher, state, frames[0])[1], step(watcher, late, frames[0])[1]
        assert bool(jnp.allclose(here, there, atol=1e-5)) == compact


def test_another_task_takes_the_place_of_the_first(model):
    frames, _ = stream(3)
    watcher = Watcher(model, KEEP)
    start = lambda c: tell(watcher, watcher.init(), question(BACK, c))[0]
    state, other = start(1), start(2)
    changed = resink(watcher, state, question(BACK, 2))
    for a, b in zip(changed.memory, other.memory, strict=True):
        np.testing.assert_allclose(a.k, b.k, atol=1e-5)
    state, _ = step(watcher, state, frames[0])
    changed = resink(watcher, state, question(BACK, 2))
    np.testing.assert_array_equal(changed.memory[1].k[:, 3:], state.memory[1].k[:, 3:])
    assert not np.allclose(changed.memory[1].v[:, :3], state.memory[1].v[:, :3])
    with pytest.raises(ValueError, match="at most sink=3 tokens, got 4"):
        resink(watcher, state, jnp.arange(4))


def test_contract():
    report = contract.check(*example(), key=KEY)
    assert report.ok, str(report)


def test_bad_arguments_are_named(model):
    for arguments, said in (
        ({"sink": -1, "text": 1, "vision": 4}, "sink must be at least 0, got -1"),
        ({"sink": 1, "text": 1, "vision": 1}, "vision must be at least 2, got 1"),
        (
            {"sink": 1, "text": 1, "vision": 4, "said": 7, "asked": 2},
            r"2 said \+ asked must be less than patches=16, got 2 \* 7 \+ 2",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            StreamingVLM(**arguments)
    with pytest.raises(ValueError, match=r"room for 16 \+ 3 tokens, got room=18"):
        Narrator(model, StreamingVLM(sink=1, text=1, vision=4, said=1), said=3)
    with pytest.raises(ValueError, match="<= 20 frames, got overlap=8, length=8"):
        overlapped_chunks(*stream(20), 8, 8, 1, 1)
