import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.learn.streambp import StreamBP, next_tokens
from anabranch.models.llama import Config, Llama

CONFIG = Config(vocab=37, width=24, layers=3, heads=6, kv_heads=2, hidden=40, rope_base=1000.0)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_equal_those_of_transformers(tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = Config(**{**vars(CONFIG), "tied": tied})
    ours = jax.tree.map(lambda x: 4 * x, Llama(config, key=jax.random.PRNGKey(0)))
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=37,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=40,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=tied,
        )
    ).eval()

    def named(model):
        names = {
            "attention_norm": "input_layernorm",
            "wq": "self_attn.q_proj",
            "wk": "self_attn.k_proj",
            "wv": "self_attn.v_proj",
            "wo": "self_attn.o_proj",
            "mlp_norm": "post_attention_layernorm",
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }
        found = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
        for i in range(config.layers):
            for mine, name in names.items():
                found[f"model.layers.{i}.{name}.weight"] = getattr(model.blocks, mine)[i]
        return found if tied else found | {"lm_head.weight": model.own_head}

    parameters = dict(theirs.named_parameters())
    assert parameters.keys() == named(ours).keys()
    with torch.no_grad():
        for name, x in named(ours).items():
            parameters[name].copy_(torch.tensor(np.array(x)))
    tokens = np.random.default_rng(0).integers(0, 37, 19)
    out = theirs(torch.tensor(tokens)[None], labels=torch.tensor(tokens)[None])
    np.testing.assert_allclose(ours(jnp.asarray(tokens)), out.logits[0].detach().numpy(), atol=1e-4, rtol=1e-4)

    out.loss.backward()

    batch = jnp.asarray(tokens)[None], next_tokens(jnp.asarray(tokens)[None])
    loss, grads = StreamBP(chunk=8, logits_chunk=8).value_and_grad(ours, batch, jax.random.PRNGKey(0))
    np.testing.assert_allclose(loss, out.loss.item(), rtol=1e-5)
    for name, g in named(grads).items():
        wanted = parameters[name].grad.numpy()
        assert np.linalg.norm(g - wanted) <= 1e-4 * np.linalg.norm(wanted), name


def test_no_token_sees_later_ones():
    model = Llama(CONFIG, key=jax.random.PRNGKey(0))
    tokens = jnp.arange(12)
    np.testing.assert_allclose(model(tokens)[:7], model(tokens.at[7:].set(3))[:7], atol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads=2, got 3"):
        Config(width=12, heads=3, kv_heads=2)
