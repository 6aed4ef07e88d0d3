"""`Partitioned`: the keys of one stream over many Ray actors, each with a `Keyed`; none is lost when an actor dies.

A key belongs to one of `BUCKETS` buckets for ever, and a bucket to one actor at a time. Every `every` micro-batches all
actors save what has changed, each to a folder of its own, and then one small file, which names these folders and the
owner of each bucket, makes the checkpoint hold for all of them at once. Until then the micro-batches since the one
before it are kept. So there is one way in which an actor comes by its states, whether it is new, replaces one that has
died, or has been given other buckets: it reads them from the last checkpoint, and is shown the events since.
"""

import logging
import secrets
import shutil
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Int64, PyTree, UInt32

from anabranch import state
from anabranch.cell import Cell, State
from anabranch.run.checkpoint import Checkpoints, pack_keys, unpack_keys
from anabranch.run.keyed import Keyed, Rows, _factorize, _hash, _key_array

log = logging.getLogger("anabranch.scale")

BUCKETS = 256
"""The keys move between actors in so many parts; no more actors than that can share them."""
ATTEMPTS = 3
"""An actor that dies as often as this over one call is not replaced again: the call itself seems to kill it."""
_CHECKPOINT = "partitioned.safetensors"


class Worker:
    """What runs in an actor: a `Keyed` of the keys in some buckets, and its checkpoints in a folder of its own."""

    def __init__(self, cell: Cell, capacity: int, seed: int, folder: Path):
        self._make = lambda: Keyed(cell, capacity, seed=seed, threads=1)  # more cores are more actors
        self._folder = folder

    def restore(self, sources: list[Path], number: int, buckets: list[int], parts: list[Any]) -> None:
        """Forget everything, read the states of the keys in `buckets` from checkpoint `number`, and go on over `parts`.

        Raises:
            StateError: if the checkpoint cannot be read in one of the folders `sources`.
        """
        import ray

        self._keyed = self._make()
        names: list[Hashable] = []
        end = 0  # the keys of one folder are numbered behind those of the folder before
        for source in sources:
            first = end
            for arrays in _read(source, number):
                keys = unpack_keys(arrays["keys"])
                named, gone, numbers = (arrays[name] + first for name in ("named", "gone", "numbers"))
                self._keyed.restore(Rows(named, keys, gone, numbers, arrays["rows"]))
                names += keys
                end = max(end, int(named.max(initial=-1)) + 1)
        mine = set(buckets)
        self._keyed.forget([key for key in names if bucket(key) not in mine])
        self._checkpoints = Checkpoints(self._folder, keep=2)  # one that is not yet agreed on, and the one before it
        for part in parts:
            self._keyed(*ray.get(part))

    def step(self, part: tuple[pa.Array | list, PyTree]) -> PyTree:
        """One part of a micro-batch: keys and inputs."""
        return self._keyed(*part)

    def save(self, number: int) -> None:
        """Write the states that have changed, as a part of checkpoint `number`; returns when they are on the disk."""
        saved = self._keyed.everything() if self._checkpoints.wants_everything else self._keyed.changed()
        self._checkpoints.save({**saved._asdict(), "keys": pack_keys(saved.keys)}, {"number": number})
        self._checkpoints.wait()

    def row(self, key: Hashable) -> UInt32[np.ndarray, " words"]:
        """The state of one key, packed."""
        return np.asarray(state.pack(self._keyed.state(key)))

    def size(self) -> int:
        """How many keys have been seen."""
        return len(self._keyed)


@dataclass
class Share:
    """The buckets of one actor, and all that it takes to put another actor in its place."""

    buckets: list[int]
    sources: list[Path]
    """Folders in which the last checkpoint has their states."""
    parts: list[Any] = field(default_factory=list)
    """References to its parts of the micro-batches since then."""
    actor: Any = None
    folder: Path = Path()
    """Where the actor writes."""


class Partitioned:
    """A cell with one state for each key, like `Keyed`, whose keys are spread over Ray actors.

    The results equal those of a single `Keyed` with the same seed: every event is applied once and answered once, also
    when actors join, leave or are killed. Ray is started with its defaults if `ray.init` has not been called.

    Arguments:
        cell: any cell that is neither coupled nor on the host.
        capacity: keys whose state each actor holds ready; the others spill.
        actors: how many share the keys at first; a resumed stream begins with those it had.
        folder: where checkpoints are written; every node must see it under this path. What an earlier stream has left
            there is replaced, unless resumed.
        seed: from which each key's random initial state is drawn.
        every: micro-batches between two checkpoints; so many are kept, lest an actor die.
        resume: go on from the last checkpoint in `folder`, if there is one.

    Raises:
        ImportError: without Ray (the extra `ray`).
        ValueError: if the cell cannot be spread, an argument is out of range, or the checkpoint has another seed.
    """

    position: int
    """Events that the last checkpoint has seen, all of them answered: a resumed stream goes on with the next one."""

    def __init__(
        self,
        cell: Cell,
        capacity: int,
        actors: int,
        *,
        folder: str | Path,
        seed: int = 0,
        every: int = 64,
        resume: bool = False,
    ):
        try:
            import ray
        except ImportError:
            raise ImportError("keys are spread over actors by Ray: pip install 'anabranch[ray]'") from None
        if cell.coupled or cell.host:
            raise ValueError(
                f"{type(cell).__name__} is {'coupled' if cell.coupled else 'on the host'}: it cannot be spread"
            )
        if not 1 <= actors <= BUCKETS:
            raise ValueError(f"actors must be from 1 to {BUCKETS}, got {actors}")
        for name, value in (("capacity", capacity), ("every", every)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.cell, self.capacity, self.seed, self.every = cell, capacity, seed, every
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ray: Any = ray
        self._shipped = ray.put(cell)
        self._packing = state.Packing(jax.eval_shape(lambda key: cell.init(key=key), jax.random.PRNGKey(0)))
        self.position = self._events = self._batches = self._number = 0
        self._shares = [Share(list(range(i, BUCKETS, actors)), []) for i in range(actors)]
        if resume and (self.folder / _CHECKPOINT).exists():
            self._resume()
        else:
            (self.folder / _CHECKPOINT).unlink(missing_ok=True)
            self._clean([])
        self._hand_out(self._shares)

    def _resume(self) -> None:
        meta: Any = state.read_meta(self.folder / _CHECKPOINT)
        if meta["seed"] != self.seed:
            raise ValueError(f"{self.folder}: the checkpoint there has seed {meta['seed']}, not {self.seed}")
        self.position = self._events = meta["position"]
        self._number = meta["number"]
        self._shares = [Share(share["buckets"], [self.folder / share["folder"]]) for share in meta["shares"]]

    # The stream

    def __call__(self, keys: Sequence[Hashable] | np.ndarray | pa.Array, xs: PyTree) -> PyTree:
        """Step once for each event, in order; `xs` and the result are stacked on a leading axis.

        A micro-batch is applied whole or, if an error is raised, not at all.

        Raises:
            ValueError: if a key is null, keys and inputs differ in number, or there are none.
            TypeError: if a key is of a type that a checkpoint cannot hold; raised when the next one is due.
            RayActorError: if an actor dies again and again over this micro-batch.
        """
        keys = _key_array(keys)
        n = len(keys)
        lengths = {np.shape(leaf)[0] for leaf in jax.tree.leaves(xs) if np.ndim(leaf)}
        if lengths - {n}:
            raise ValueError(f"{n} keys came with inputs of length {sorted(lengths)}")
        if n == 0:
            raise ValueError("a micro-batch needs at least one event")
        if self._batches == self.every:  # not before the answers have been given: they would be missing after a resume
            self.checkpoint()
        xs = jax.tree.map(lambda leaf: np.asarray(leaf) if np.ndim(leaf) else np.full(n, leaf), xs)
        codes, unique = _factorize(keys)
        share = self._owners()[[bucket(key) for key in unique]][codes]
        places = {i: np.flatnonzero(share == i) for i in np.unique(share).tolist()}
        parts = {
            i: self._ray.put((_select(keys, at), jax.tree.map(lambda leaf: leaf[at], xs))) for i, at in places.items()
        }
        try:
            answers = self._ask("step", {i: (part,) for i, part in parts.items()})
        except BaseException:
            self._hand_out(self._shares)  # other actors may have applied their part of it
            raise
        out: PyTree = None
        for i, ys in answers.items():
            self._shares[i].parts.append(parts[i])
            if out is None:
                out = jax.tree.map(lambda leaf: np.empty((n, *leaf.shape[1:]), leaf.dtype), ys)
            jax.tree.map(lambda whole, leaf: whole.__setitem__(places[i], leaf), out, ys)
        self._events += n
        self._batches += 1
        return out

    def _owners(self) -> Int64[np.ndarray, " buckets"]:
        owners = np.empty(BUCKETS, np.int64)
        for i, share in enumerate(self._shares):
            owners[share.buckets] = i
        return owners

    def _ask(self, method: str, calls: dict[int, tuple]) -> dict[int, Any]:
        """The answers of some actors, side by side; one that dies is replaced, brought up to date, and asked again."""
        asked = {i: getattr(self._shares[i].actor, method).remote(*args) for i, args in calls.items()}
        return {i: self._answer(self._shares[i], answer, method, calls[i]) for i, answer in asked.items()}

    def _answer(self, share: Share, answer: Any, method: str, args: tuple) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                if answer is None:
                    self._start(share)
                    self._ray.get(self._restore(share))
                    answer = getattr(share.actor, method).remote(*args)
                return self._ray.get(answer)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError) as error:
                if attempt == ATTEMPTS - 1:
                    raise
                log.warning("an actor is gone and will be replaced: %s", error)
                answer = None

    def _start(self, share: Share) -> None:
        """A new actor in the place of the one that is there, if any.

        It writes to a folder of its own: one that was taken for dead, but lives on, cannot spoil its successor's.
        """
        if share.actor is not None:
            self._ray.kill(share.actor)
        share.folder = self.folder / f"actor-{secrets.token_hex(8)}"
        share.actor = self._ray.remote(Worker).remote(self._shipped, self.capacity, self.seed, share.folder)

    def _restore(self, share: Share) -> Any:
        return share.actor.restore.remote(share.sources, self._number, share.buckets, share.parts)

    def _hand_out(self, shares: list[Share]) -> None:
        """Have these shares' actors, started if need be, take up their states as they are to be now."""
        for share in shares:
            if share.actor is None:
                self._start(share)
        restored = [self._restore(share) for share in shares]
        for share, done in zip(shares, restored):
            self._answer(share, done, "size", ())

    # Where the keys are

    def __len__(self) -> int:
        return sum(self._ask("size", {i: () for i in range(len(self._shares))}).values())

    def state(self, key: Hashable) -> State:
        """The state of one key.

        Raises:
            KeyError: if the key has not been seen.
        """
        i = int(self._owners()[bucket(key)])
        return self._packing.unpack(jnp.asarray(self._ask("row", {i: (key,)})[i]))

    @property
    def actors(self) -> list[Any]:
        """The handles of the actors, as Ray knows them."""
        return [share.actor for share in self._shares]

    def add(self) -> None:
        """Start one more actor, and give it its share of the buckets; all others stay where they are.

        Raises:
            ValueError: if there is an actor for every bucket.
        """
        if len(self._shares) == BUCKETS:
            raise ValueError(f"{BUCKETS} actors share the keys already, there is no bucket for another")
        self.checkpoint()
        new = Share([], [])
        for _ in range(BUCKETS // (len(self._shares) + 1)):
            donor = max(self._shares, key=lambda share: len(share.buckets))
            new.buckets.append(donor.buckets.pop())
        new.sources = [share.folder for share in self._shares]
        self._shares.append(new)
        self._hand_out(self._shares)
        self.checkpoint()

    def remove(self) -> None:
        """Give the buckets of the actor that joined last to the others, and end it.

        Raises:
            ValueError: if it is the only one.
        """
        if len(self._shares) == 1:
            raise ValueError("the last actor cannot be removed")
        self.checkpoint()
        gone = self._shares.pop()
        for number in gone.buckets:
            min(self._shares, key=lambda share: len(share.buckets)).buckets.append(number)
        for share in self._shares:
            share.sources = [share.folder, gone.folder]
        self._hand_out(self._shares)
        self._ray.kill(gone.actor)
        self.checkpoint()

    # Checkpoints

    def checkpoint(self) -> None:
        """Make all that has been answered durable: after this, `position` is the number of events so far."""
        number = self._number + 1
        self._ask("save", {i: (number,) for i in range(len(self._shares))})
        shares = [{"buckets": share.buckets, "folder": share.folder.name} for share in self._shares]
        meta = {"number": number, "position": self._events, "seed": self.seed, "shares": shares}
        state.save(self.folder / _CHECKPOINT, (), meta)  # from here on it holds
        self._number, self.position, self._batches = number, self._events, 0
        for share in self._shares:
            share.sources, share.parts = [share.folder], []
        self._clean([share.folder for share in self._shares])

    def _clean(self, keep: list[Path]) -> None:
        for folder in set(self.folder.glob("actor-*")) - set(keep):
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Make everything durable, and end the actors."""
        self.checkpoint()
        for share in self._shares:
            self._ray.kill(share.actor)


def bucket(key: Hashable) -> int:
    """The bucket of a key, the same in every process."""
    return _hash(key) % BUCKETS


def _select(keys: pa.Array | list, at: Int64[np.ndarray, " n"]) -> pa.Array | list:
    return [keys[i] for i in at.tolist()] if isinstance(keys, list) else keys.take(pa.array(at))


def _read(folder: Path, number: int) -> list[dict[str, Any]]:
    """What a folder holds of checkpoint `number`: the last full one up to it and the changes since, oldest first.

    Nothing but these files is touched: the folder may be another actor's, who is writing the next one.
    """
    chain: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        found: Any = state.read_meta(path)
        if found["number"] > number:  # written, but not agreed on
            continue
        if not chain and found["number"] < number:
            break
        chain.insert(0, state.load(path))
        if path.stem.endswith("full"):
            return chain
    raise state.StateError(f"{folder}: checkpoint {number} is missing")
