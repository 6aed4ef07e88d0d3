"""The language model with experts in each layer."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch import contract
from anabranch.keep.text import shakespeare
from anabranch.layers.experts import Route, balance, choose, dispatch, loads
from anabranch.layers.linear import Linear, quantise
from anabranch.models.llama import Decoder
from anabranch.models.moe_lm import Config, MoELM, load, ranked, trace

CONFIG = Config(
    vocab=37, width=16, layers=2, heads=4, kv_heads=2, hidden=12, rope_base=1000.0, tied=False, experts=6, chosen=2
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 37, 19))
BEST = jnp.arange(2)
routed, traced = eqx.filter_jit(MoELM.routed), eqx.filter_jit(trace)


def drawn(config: Config) -> MoELM:
    """Random weights, without a program that draws them; norms too, so that none can be forgotten."""
    rng, shapes = np.random.default_rng(0), eqx.filter_eval_shape(MoELM, config, key=jax.random.PRNGKey(0))
    draw = lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), jnp.float32)
    return jax.tree.map(lambda x: draw(x) if hasattr(x, "shape") else x, shapes)


@pytest.fixture(scope="module")
def model():
    return drawn(CONFIG)


def test_logits_equal_those_of_transformers(model):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=37,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=12,
            num_local_experts=6,
            num_experts_per_tok=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            sliding_window=None,
        )
    ).eval()
    mine = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.own_head,
    }
    for i, block in enumerate([jax.tree.map(lambda x, i=i: x[i], model.blocks) for i in range(2)]):
        names = {
            "input_layernorm.weight": block.attention_norm,
            "self_attn.q_proj.weight": block.wq,
            "self_attn.k_proj.weight": block.wk,
            "self_attn.v_proj.weight": block.wv,
            "self_attn.o_proj.weight": block.wo,
            "post_attention_layernorm.weight": block.mlp_norm,
            "mlp.gate.weight": block.router,
            "mlp.experts.gate_up_proj": jnp.concatenate([block.gate, block.up], 1),
            "mlp.experts.down_proj": block.down,
        }
        mine |= {f"model.layers.{i}.{name}": x for name, x in names.items()}
    parameters = dict(theirs.named_parameters())
    assert parameters.keys() == mine.keys()
    with torch.no_grad():
        for name, x in mine.items():
            parameters[name].copy_(torch.tensor(np.array(x)))
        out = theirs(torch.tensor(np.asarray(TOKENS))[None], output_router_logits=True, labels=torch.tensor([[0] * 19]))
    logits, router = routed(model, TOKENS[None], BEST)
    np.testing.assert_allclose(logits[0], out.logits[0].numpy(), atol=1e-4)
    # Theirs takes both layers as one, and counts each of the k choices as a whole.
    both = router.reshape(-1, 6)
    np.testing.assert_allclose(2 * balance(both, choose(both, BEST).expert), out.aux_loss.item(), rtol=1e-4)


def test_a_stream_is_the_whole_text(model):
    """All at once, in texts of a batch, and token by token; with the few that go to an expert alone, and in blocks."""
    logits, router = routed(model, TOKENS[None], BEST)
    np.testing.assert_allclose(eqx.filter_jit(MoELM.__call__)(model, TOKENS), logits[0], atol=1e-5)
    cell = Decoder(model, 24)
    state, first, read = traced(cell, cell.init(), TOKENS[:18])
    state, last = eqx.filter_jit(Decoder.step)(cell, state, TOKENS[18])
    assert int(state.length) == 19
    np.testing.assert_allclose(jnp.concatenate([first, last[None]]), logits[0], atol=1e-5)
    np.testing.assert_allclose(read, router[:, 0, :18], atol=1e-5)


def test_a_decoder_with_experts_keeps_the_contract():
    report = contract.check(
        Decoder(drawn(dataclasses.replace(CONFIG, layers=1)), 8), TOKENS[:4], key=jax.random.PRNGKey(0)
    )
    assert report.ok, str(report)


def test_ranks_say_which_experts_work(model):
    """Rank 0 is the best; ranks that are none change nothing; rows of ranks go through one vmap."""
    cell, several = Decoder(model, 24), jnp.array([[0, 1], [2, -1], [6, 2]])
    out = eqx.filter_jit(jax.vmap(lambda ranks: ranked(cell, ranks).advance(cell.init(), TOKENS)[1]))(several)
    for logits, ranks in zip(out, several):
        np.testing.assert_allclose(logits, routed(model, TOKENS[None], ranks)[0][0], atol=1e-5)
    np.testing.assert_allclose(out[1], out[2], atol=1e-5)
    assert jnp.abs(out[1] - out[0]).max() > 0.01
    with pytest.raises(ValueError, match=r"ranks must be one row of at least one rank, got the shape \(1, 2\)"):
        ranked(cell, several[:1])


def test_choice_and_balance_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25]]))
    route = choose(logits, jnp.array([0, 2]))
    assert route.expert.tolist() == [[1, 0], [0, 2]]
    np.testing.assert_allclose(route.weight, [[6 / 7, 1 / 7], [2 / 3, 1 / 3]], rtol=1e-5)
    assert loads(route.expert, 3).tolist() == [0.5, 0.25, 0.25]
    # 3 (0.5 · 0.3 + 0.25 · 0.425 + 0.25 · 0.275)
    np.testing.assert_allclose(balance(logits, route.expert), 0.975, rtol=1e-5)
    none = jax.jit(jax.grad(lambda x: choose(x, jnp.array([9, -1])).weight.sum()))(logits)
    np.testing.assert_array_equal(none, 0)


@pytest.mark.parametrize("tokens", [2, 300])
def test_no_token_is_dropped_however_uneven_the_loads(tokens):
    """Against all experts computed for all tokens; in one product each, in blocks, and with everybody at one expert."""
    rng = np.random.default_rng(tokens)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((tokens, 4), (5, 4, 4)))
    drawn = jnp.asarray(rng.integers(0, 5, (tokens, 2)))
    weight = jnp.asarray(rng.uniform(size=(tokens, 2)), jnp.float32)
    run = jax.jit(lambda route: dispatch(lambda w, x: jnp.tanh(x @ w), w, x, route))
    for expert in (drawn, jnp.full((tokens, 2), 4)):
        each = jnp.tanh(jnp.einsum("td,edf->tef", x, w))
        wanted = (jnp.take_along_axis(each, expert[..., None], 1) * weight[..., None]).sum(1)
        np.testing.assert_allclose(run(Route(expert, weight)), wanted, atol=1e-5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="chosen must be in 1 to experts=4, got 5"):
        Config(experts=4, chosen=5)


def test_stacked_experts_are_rounded_as_each_alone():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)), jnp.float32)
    both = quantise(Linear(w)), quantise(Linear(w[1]))
    np.testing.assert_array_equal(both[0].w[1], both[1].w)
    np.testing.assert_array_equal(both[0].scale[1], both[1].scale)


@pytest.mark.parametrize("name", ["strong", "light", "wide"])
def test_trained_weights_predict_text_they_have_not_seen(name, data):
    """Pieces of the last tenth of the verse; and of the experts of each layer, hardly any is idle."""
    whole = np.frombuffer(shakespeare().encode(), np.uint8)
    starts = np.linspace(len(whole) * 9 // 10, len(whole) - 128, 32).astype(int)
    text = whole[starts[:, None] + np.arange(128)].astype(np.int32)
    logits, router = routed(load(name), jnp.asarray(text), BEST)
    share = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), text[:, 1:, None], -1)
    assert -share.mean() / np.log(2) < 2.6
    each = jax.vmap(lambda logits: loads(choose(logits, BEST).expert, logits.shape[-1]))(router)
    assert each.min() > 0 or (name == "wide" and (each > 0).mean() > 0.97)  # one of its 64 reads no verse
