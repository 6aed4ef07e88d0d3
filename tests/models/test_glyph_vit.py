import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anabranch.data import mnist
from anabranch.models.glyph_vit import LETTERS, Block, GlyphViT, load


@pytest.fixture(scope="module")
def trained():
    return load()


def test_shapes(trained):
    image = jnp.zeros((28, 28))
    assert trained.features(image).shape == (64,) and trained(image).shape == (len(LETTERS),)
    assert jax.eval_shape(jax.vmap(trained.features), jnp.zeros((3, 28, 28))).shape == (3, 64)
    assert len(set(LETTERS)) == len(LETTERS) and not any(letter.isdigit() for letter in LETTERS)


def test_weights_are_those_of_training_and_fit_in_the_repository(trained):
    from anabranch.train import WEIGHTS

    assert (WEIGHTS / "glyph_vit.safetensors").stat().st_size < 1.5e6
    fresh = GlyphViT(key=jax.random.PRNGKey(0))
    assert jax.tree.structure(eqx.filter(fresh, eqx.is_array)) == jax.tree.structure(eqx.filter(trained, eqx.is_array))
    assert not np.array_equal(fresh.positions, trained.positions)


def test_a_block_is_that_of_torch():
    torch = pytest.importorskip("torch")
    block, h = Block(64, 4, key=jax.random.PRNGKey(1)), np.random.default_rng(0).normal(size=(50, 64))
    # Away from their initial ones and zeros.
    norms = lambda b: (b.attention_norm.weight, b.attention_norm.bias, b.mlp_norm.weight, b.mlp_norm.bias)
    drawn = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    block = eqx.tree_at(norms, block, tuple(map(jnp.asarray, drawn)))
    theirs = torch.nn.TransformerEncoderLayer(
        64, 4, 256, 0.0, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), norm_first=True, batch_first=True
    )
    attention, zeros = block.attention, np.zeros(64 * 3, np.float32)
    qkv = [attention.query_proj.weight, attention.key_proj.weight, attention.value_proj.weight]
    first, second = block.mlp.layers
    theirs.load_state_dict(
        {
            name: torch.tensor(np.array(value))
            for name, value in {
                "self_attn.in_proj_weight": np.concatenate(qkv),
                "self_attn.in_proj_bias": zeros,
                "self_attn.out_proj.weight": attention.output_proj.weight,
                "self_attn.out_proj.bias": zeros[:64],
                "linear1.weight": first.weight,
                "linear1.bias": first.bias,
                "linear2.weight": second.weight,
                "linear2.bias": second.bias,
                "norm1.weight": drawn[0],
                "norm1.bias": drawn[1],
                "norm2.weight": drawn[2],
                "norm2.bias": drawn[3],
            }.items()
        }
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(h, dtype=torch.float32)[None])[0]
    np.testing.assert_allclose(block(jnp.asarray(h, jnp.float32)), expected, atol=1e-4)


def probe(z, labels, train):
    """Test accuracy of ridge regression on one-hot labels, learned from the first rows."""
    z = z - z[:train].mean(0)
    z = np.column_stack([z / np.sqrt((z[:train] ** 2).mean()), np.ones(len(z))])
    weights = np.linalg.solve(z[:train].T @ z[:train] + np.eye(z.shape[1]), z[:train].T @ np.eye(10)[labels[:train]])
    return (np.argmax(z[train:] @ weights, 1) == labels[train:]).mean()


def test_letters_help_to_read_digits(trained, data):
    images, labels = (a[:1300] for a in mnist())

    def accuracy(net):
        return probe(np.asarray(eqx.filter_jit(eqx.filter_vmap(net.features))(images)), labels, 300)

    assert accuracy(trained) > max(0.7, accuracy(GlyphViT(key=jax.random.PRNGKey(0))) + 0.1)
