"""Recorded training: a script, the weights it writes, and what they were made from.

`training/<slug>.py` of the repository defines `train(key) -> (model, info)`. `info` is a dictionary of plain values
that is kept with the weights; under `"data"` it lists the files that were read, as paths, whose contents are hashed.
What a script generates itself needs no entry: it is fixed by the script and the key.

A script with several sets of weights defines `train(key, name)`: the slug `<script>:<name>` is one of them.
A script of several stages may also take `start`, the path of weights that it wrote when it had fewer of them, and go on
from there. What made those is then told as well, under `"start"`.
"""

import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax

from anabranch import catalog, state

M = TypeVar("M")
WEIGHTS = Path(__file__).parent / "models" / "weights"


def train(slug: str, seed: int = 0, start: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Run a training script and write its weights, from the beginning or from those in the file `start`.

    Returns:
        The path of `<slug>.safetensors` (with `_` for `:`) and its metadata: `info`, the seed, the hashes of script and
        data, the seconds it took, versions and date.

    Raises:
        LookupError: not inside a repository, or no such script.
        ValueError: the script cannot go on from `start`.
    """
    scripts = catalog.repository() / "training"
    stem, *name = slug.split(":", 1)
    script = scripts / f"{stem}.py"
    if not script.is_file():
        raise LookupError(f"no script {script}{catalog.did_you_mean(stem, [p.stem for p in scripts.glob('*.py')])}")
    spec = importlib.util.spec_from_file_location(f"training.{stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    if start is not None and "start" not in inspect.signature(module.train).parameters:
        raise ValueError(f"{script} always trains from the beginning, got start={start}")
    begin, more = time.perf_counter(), {} if start is None else {"start": start}
    model, info = module.train(jax.random.PRNGKey(seed), *name, **more)
    if start is not None:
        info |= {"start": {"sha256": _hash(start)} | state.read_meta(start)}
    versions = {p: importlib.metadata.version(p) for p in ("anabranch", "jax", "equinox", "optax", "numpy")}
    meta = info | {
        "slug": slug,
        "seed": seed,
        "script": _hash(script),
        "data": {Path(file).name: _hash(Path(file)) for file in info.get("data", ())},
        "seconds": round(time.perf_counter() - begin, 1),
        "versions": {"python": platform.python_version()} | versions,
        "date": datetime.now(UTC).date().isoformat(),
    }
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    path = _path(slug)
    state.save(path, eqx.filter(model, eqx.is_array), meta)
    return path, meta


def load(slug: str, model: M) -> M:
    """`model` with the weights that `train(slug)` wrote.

    Raises:
        FileNotFoundError: there are no such weights.
        anabranch.state.StateError: they are of another structure, shape or dtype.
    """
    path = _path(slug)
    if not path.is_file():
        raise FileNotFoundError(f"no weights {path}: write them with `anabranch train {slug}`")
    return eqx.combine(state.load(path, eqx.filter(model, eqx.is_array)), model)


def _path(slug: str) -> Path:
    return WEIGHTS / f"{slug.replace(':', '_')}.safetensors"


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
