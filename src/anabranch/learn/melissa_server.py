"""`melissa` on processes: solvers in Ray actors stream into one reservoir, from which a network trains.

Each client runs one member of the ensemble at a time and is asked for a few time steps at once; its thread puts them on
a bounded queue and asks for no more while the queue is full. The trainer empties the queue into the buffer between two
batches. How many samples of each member are in the buffer is counted where they are put, and saved together with the
buffer and the network: so a client that dies is replaced and goes on with the first sample that has not come, and a
server that dies goes on from its checkpoint, neither losing a sample nor taking one twice.
"""

import logging
import queue
import threading
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from anabranch import state
from anabranch.cell import noise
from anabranch.learn.base import Sgd
from anabranch.learn.melissa import Fifo, HeatEnsemble

log = logging.getLogger("anabranch.melissa")

ATTEMPTS = 3
"""A call that kills as many clients in a row is not tried again: the call itself seems to kill them."""
_CHECKPOINT = "melissa.safetensors"


class Client:
    """What runs in an actor: one member of the ensemble, so many time steps a call."""

    def __init__(self, ensemble: HeatEnsemble, key: Int[np.ndarray, " words"]):
        self._ensemble, self._key = ensemble, jnp.asarray(key)
        self._advance = eqx.filter_jit(ensemble.advance)
        self._at: tuple[int, int] | None = None

    def run(self, member: int, start: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `start` to `start + steps` of a member: x f32[steps, 6] and u f32[steps, n²]."""
        if self._at != (member, start):  # another one left off there: what it had done is done again
            self._state = self._ensemble.begin(jnp.array([member]), self._key)
            if start:
                self._state, _ = self._advance(self._state, jnp.zeros(start))
        self._state, (x, u) = self._advance(self._state, jnp.zeros(steps))
        self._at = member, start + steps
        return np.asarray(x[:, 0]), np.asarray(u[:, 0])


class Server:
    """Trains a network on an ensemble that is running.

    Arguments:
        ensemble: the solver, with one member.
        buffer: holds samples `(x f32[6], u f32[n²])`.
        learner: learns from `(x f32[B, 6], (u f32[B, n²], valid bool[B]))`; see `melissa.surrogate`.
        simulations: how many members are run in all.
        clients: how many run at once.
        folder: where the checkpoint is written.
        block: time steps that a client computes in one call.
        waiting: blocks on the queue before the clients wait.
        every: batches between two checkpoints.
        seed: from which all chance is drawn.
        resume: go on from the checkpoint in `folder`, if there is one.

    Raises:
        ImportError: without Ray (the extra `ray`).
        ValueError: an argument is out of range, or the checkpoint is of another run.
    """

    received: Int[np.ndarray, " simulations"]
    """How many samples of each member have been put."""

    def __init__(
        self,
        ensemble: HeatEnsemble,
        buffer: Fifo,
        learner: Sgd,
        *,
        simulations: int,
        clients: int,
        folder: str | Path,
        block: int = 10,
        waiting: int = 4,
        every: int = 200,
        seed: int = 0,
        resume: bool = False,
    ):
        try:
            import ray
        except ImportError:
            raise ImportError("the solvers run in Ray actors: pip install 'anabranch[ray]'") from None
        if ensemble.members != 1:
            raise ValueError(f"a client runs one member at a time, got an ensemble of members={ensemble.members}")
        numbers = {"simulations": simulations, "clients": clients, "block": block, "waiting": waiting, "every": every}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.ensemble, self.buffer, self.learner = ensemble, buffer, learner
        self.block, self.every, self.folder = block, every, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        key: PRNGKeyArray = jax.random.PRNGKey(seed)
        self._key = np.asarray(noise(key, 0, "ensemble"))
        self._states = buffer.init(key=noise(key, 0, "buffer")), learner.init(key=noise(key, 0, "learner"))
        self.received = np.zeros(simulations, np.int32)
        self._meta = {"seed": seed, "simulations": simulations, "steps": ensemble.steps}
        path = self.folder / _CHECKPOINT
        if resume and path.exists():
            if state.read_meta(path) != self._meta:
                raise ValueError(f"{path} is of another run: {state.read_meta(path)}, not {self._meta}")
            self._states, received = state.load(path, like=(self._states, jnp.asarray(self.received)))
            self.received = np.array(received)
        self._put = jax.jit(buffer.put)
        self._get = jax.jit(buffer.get)
        self._learn = eqx.filter_jit(learner.learn)
        self._ray: Any = ray
        self._queue: queue.Queue[Any] = queue.Queue(waiting)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._todo = [i for i in range(simulations) if self.received[i] < ensemble.steps][::-1]
        self.actors = [self._start() for _ in range(clients)]
        """The clients' handles, as Ray knows them."""

    @property
    def buffer_state(self) -> Any:
        """What the buffer holds."""
        return self._states[0]

    @property
    def learner_state(self) -> Any:
        """What has been learned."""
        return self._states[1]

    def train(self, batches: int | None = None) -> int:
        """Train so many batches more, or until every sample has been seen; returns how many were trained.

        Ends with a checkpoint, and ends the clients: to train more, resume with another server.

        Raises:
            RayActorError: if clients die again and again over the same call.
        """
        producers = [threading.Thread(target=self._produce, args=(i,), daemon=True) for i in range(len(self.actors))]
        for thread in producers:
            thread.start()
        trained, offered = 0, []
        try:
            while batches is None or trained < batches:
                offered = self._fill(offered)
                over = bool((self.received == self.ensemble.steps).all())
                buffer, batch = self._get(self._states[0], True, over)
                if not batch.valid.any():
                    if over:
                        break
                    time.sleep(0.001)  # too few samples yet
                    continue
                x, u = batch.samples
                self._states = buffer, self._learn(self._states[1], x, (u, batch.valid))
                trained += 1
                if trained % self.every == 0:
                    self.checkpoint()
            self.checkpoint()
        finally:
            self._stop.set()
            for actor in self.actors:
                self._ray.kill(actor)
            for thread in producers:
                thread.join()
        return trained

    def checkpoint(self) -> None:
        """Save buffer, network, and what has been received, as one file."""
        state.save(self.folder / _CHECKPOINT, (self._states, jnp.asarray(self.received)), self._meta)

    def _fill(self, offered: list) -> list:
        """Put what is on the queue into the buffer; returns what it does not take yet."""
        blocks = 0
        while True:
            if not offered:
                if blocks == self._queue.maxsize:  # solvers that are faster must not keep the trainer from training
                    return []
                blocks += 1
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    return []
                if isinstance(item, BaseException):
                    raise item
                member, x, u = item
                offered = [(member, sample) for sample in zip(x, u)]
            member, sample = offered[0]
            buffer, accepted = self._put(self._states[0], sample)
            self._states = buffer, self._states[1]
            if not accepted:
                return offered
            self.received[member] += 1
            offered = offered[1:]

    def _start(self) -> Any:
        return self._ray.remote(Client).remote(self.ensemble, self._key)

    def _produce(self, i: int) -> None:
        """The thread of one client: member after member, block after block."""
        while not self._stop.is_set():
            with self._lock:
                if not self._todo:
                    return
                member = self._todo.pop()
            start = int(self.received[member])
            while start < self.ensemble.steps and not self._stop.is_set():
                steps = min(self.block, self.ensemble.steps - start)
                try:
                    x, u = self._ask(i, member, start, steps)
                except Exception as error:
                    self._offer(error)  # raised where it is trained
                    return
                self._offer((member, x, u))
                start += steps

    def _ask(self, i: int, member: int, start: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        for attempt in range(ATTEMPTS):
            try:
                return self._ray.get(self.actors[i].run.remote(member, start, steps))
            except self._ray.exceptions.RayActorError as error:
                if attempt == ATTEMPTS - 1 or self._stop.is_set():
                    raise
                log.warning("client %d is gone and will be replaced: %s", i, error)
                self.actors[i] = self._start()
        raise AssertionError("not reached")

    def _offer(self, item: Any) -> None:
        """Wait for room on the queue, unless the server stops."""
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
