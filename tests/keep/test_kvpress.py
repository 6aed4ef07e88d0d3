"""What policies keep of a prompt, and what the model says then, against kvpress on the same weights."""

import argparse
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.keep.memory import H2O, KeyNorm, Sinks, SnapKV
from anabranch.models import weights
from anabranch.models.llama import Decoder, Session

N, WINDOW = 1024, 64
POLICIES = {
    "StreamingLLMPress": Sinks(N // 2, 4),
    "KnormPress": KeyNorm(N // 2),
    "SnapKVPress": SnapKV(N // 2, WINDOW, 5),
    "ObservedAttentionPress": H2O(N // 2, 0, fair=True),
}


@pytest.fixture(scope="module")
def prompt(smollm2):
    """No token twice: in the first layer twins have keys of one norm, and rounding would say which of them stays."""
    text = "".join(p.read_text(encoding="utf-8") for p in sorted(Path(argparse.__file__).parent.glob("a*.py")))
    return np.array(list(dict.fromkeys(smollm2[1].plain(text)))[: N + 1])


@pytest.fixture(scope="module")
def theirs(smollm2):
    """The model of transformers, with what a press keeps of a prompt and the logits of the token after it."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kvpress = pytest.importorskip("kvpress")
    pytest.importorskip("accelerate")
    file = weights.smollm2_file()
    # kvpress's hooks need all weights of attention, which only this implementation gives.
    model = hf.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    @contextmanager
    def pressed(press):
        """As `press(model)`, whose hook knows the names of older versions of transformers."""

        def hook(module, args, given, out):
            n = given["hidden_states"].shape[1]
            cache = given.get("cache", given.get("past_key_values"))
            return press.forward_hook(
                module, args, given | {"past_key_values": cache, "cache_position": torch.arange(n)}, out
            )

        hooks = []
        for layer in model.model.layers:
            layer.self_attn.rotary_emb = model.model.rotary_emb
            hooks.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        yield
        for one in hooks:
            one.remove()

    def run(name, tokens, rerotate=False):
        press = getattr(kvpress, name)(compression_ratio=0.5)
        if name == "SnapKVPress":
            press.window_size = WINDOW
        kept, compress = [], type(press).compress

        def watched(module, hidden, keys, values, attentions, given):
            found = compress(press, module, hidden, keys, values, attentions, given)
            same = (keys[0, :, None] == found[0][0, :, :, None]).all(-1)  # no two keys are the same
            kept.append(same.int().argmax(-1).sort(-1).values.numpy())
            return found

        if rerotate:
            press = kvpress.KeyRerotationPress(press)
        else:
            press.compress = watched
        cache = hf.DynamicCache()
        with torch.inference_mode():
            with pressed(press):
                model(torch.tensor(tokens[None, :N]), past_key_values=cache)
            at = cache.get_seq_length() if rerotate else N
            out = model(torch.tensor(tokens[None, N:]), past_key_values=cache, position_ids=torch.tensor([[at]]))
        return np.array(kept), out.logits[0, 0].numpy()

    return run


@pytest.fixture(scope="module")
def read(smollm2, prompt, theirs):
    """The model and its memory of the prompt, before anything is forgotten: the same for all policies."""
    cell = Decoder(weights.load(weights.smollm2_file()), keep=H2O(N // 2, 0, room=N, compact=False))
    advance, state = eqx.filter_jit(Decoder.advance), cell.init()
    for part in (prompt[: N - WINDOW], prompt[N - WINDOW : N]):  # so that SnapKV sees the last queries alone
        state, _ = advance(cell, state, jnp.asarray(part))
    return cell, state


def after(read, prompt, policy):
    """What the policy keeps, (layers, heads, N / 2), and the logits of the next token."""
    cell, state = read
    forget = jax.jit(lambda held: held.compressed())
    memory = [forget(replace(held, keep=replace(policy, room=N, compact=False))) for held in state.memory]
    kept = np.array([held.position[:, : N // 2] for held in memory])
    back = tuple(replace(held, keep=replace(cell.keep, compact=policy.compact)) for held in memory)
    _, logits = eqx.filter_jit(Decoder.step)(cell, Session(back, state.length), jnp.asarray(prompt[N]))
    return kept, logits


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_the_same_tokens_are_kept_and_the_same_is_said(name, read, prompt, theirs):
    kept, logits = after(read, prompt, replace(POLICIES[name], compact=False))
    wanted, said = theirs(name, prompt)
    np.testing.assert_array_equal(kept, wanted)
    np.testing.assert_allclose(logits, said, atol=1e-3)


@pytest.mark.slow
def test_what_closes_ranks_is_turned_again(read, prompt, theirs):
    _, logits = after(read, prompt, POLICIES["StreamingLLMPress"])
    np.testing.assert_allclose(logits, theirs("StreamingLLMPress", prompt, rerotate=True)[1], atol=1e-3)
