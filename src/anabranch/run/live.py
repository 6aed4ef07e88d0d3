"""What a server serves: a pipeline or a bare cell, stepped in batches, each written to the journal before it counts.

A batch is recorded, stepped and only then answered, once the record is durable. After a crash the last checkpoint is
read and the records that follow it are stepped again, in the same batches: the states and outputs are bit for bit those
of a server that did not crash, and what was answered has been counted exactly once.
"""

import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from anabranch.run.journal import Journal

log = logging.getLogger("anabranch.serve")


class NotTaken(Exception):
    """A batch was not stepped, and nothing has changed: it may be sent again."""


class Stuck(Exception):
    """A batch is in the journal, but could not be stepped: it will count, once, as soon as it can be."""


class Served(Protocol):
    """What `Live` keeps alive."""

    def open(self) -> int:
        """Take over the last checkpoint, whatever was there before; returns how many batches it holds."""
        ...

    def prepare(self, events: list[Any]) -> Any:
        """A batch of these events, with all that its outcome depends on, such as the time of day."""
        ...

    def step(self, batch: Any) -> list[Any]:
        """The answers, one an event."""
        ...

    def idle(self) -> Any:
        """A batch that ends streams which have been idle for too long, or None."""
        ...

    def pack(self, batch: Any) -> bytes: ...
    def unpack(self, data: bytes) -> Any: ...
    def save(self, batches: int) -> None:
        """Begin a checkpoint that holds this many batches."""
        ...

    def wait(self) -> None:
        """Wait for the checkpoint that was begun last; raises what went wrong with it."""
        ...

    def close(self) -> None: ...
    def abandon(self) -> None: ...


class Live:
    """A served pipeline or cell, with its journal and its checkpoints.

    If a batch cannot be stepped, it goes back to the last checkpoint and steps what the journal holds after it once
    more: what another server would do that starts after a crash. A batch whose outputs could not be written is among
    it; one that failed for another reason is not, and its events count as not taken.

    Arguments:
        served: the pipeline or cell.
        folder: of the journal.
        durable: answer only what the disk has; otherwise a crash forgets what came after the last checkpoint.
        every: seconds between checkpoints.
        keep: checkpoints that can be gone back to; the journal reaches back to the first of them.
    """

    def __init__(self, served: Served, folder: Path, *, durable: bool = True, every: float = 10.0, keep: int = 3):
        self.served, self.durable, self.every = served, durable, every
        self.journal = Journal(folder)
        self._sync = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self.batches = 0
        self.stuck = False
        """Whether the last batch could not be stepped yet."""
        self.failures = 0
        """Checkpoints that could not be written."""
        self._begun, self._again = 0, 0.0
        self._held: deque[int] = deque(maxlen=keep)  # how many batches the last checkpoints hold

    def start(self) -> int:
        """Take over what an earlier server has left; returns how many batches were stepped again."""
        self._go_back()
        return self.batches - self._begun

    def _go_back(self) -> list[Any]:
        """Read the last checkpoint, and step what follows it in the journal; returns the answers to the last batch."""
        self._begun = self.batches = self.served.open()
        answers: list[Any] = []
        for number, data in self.journal.replay(self.batches):
            answers = self.served.step(self.served.unpack(data))
            self.batches = number + 1
        self._saved, self.stuck = time.monotonic(), False
        return answers

    def step(self, events: list[Any]) -> list[Any]:
        """The answers to a batch, once they count.

        Raises:
            NotTaken: if the journal cannot be written, the disk being full for instance, if an earlier batch is stuck,
                or if these events cannot be stepped.
            Stuck: if the outputs cannot be written.
        """
        return self._go(self.served.prepare(events))

    def expire(self) -> None:
        """End the streams that have been idle for too long."""
        batch = None if self.stuck else self.served.idle()
        if batch is not None:
            self._go(batch)

    def _go(self, batch: Any) -> list[Any]:
        written = None
        if self.stuck:
            try:
                self._recover()
            except Stuck as error:
                raise NotTaken(str(error)) from error
        if self.durable:
            try:
                self.journal.append(self.served.pack(batch))
            except OSError as error:
                raise NotTaken(f"the journal cannot be written: {error}") from error
            written = self._sync.submit(self.journal.sync)  # beside the step
        try:
            answers = self.served.step(batch)
        except Exception as error:
            if written is None:
                raise
            log.exception("a batch could not be stepped; going back to the last checkpoint")
            written.result()
            if isinstance(error, OSError):
                return self._recover()
            self.journal.drop()  # as it is with these events, and would be again
            try:
                self._recover()
            except Stuck:
                log.exception("and that cannot be done yet")
            raise NotTaken(f"these events cannot be stepped: {error}") from error
        if written is not None:
            written.result()
        self.batches += 1
        if time.monotonic() - self._saved >= self.every:
            self.save()
        return answers

    def _recover(self) -> list[Any]:
        self.stuck = True
        try:
            if time.monotonic() < self._again:
                raise TimeoutError("it is tried once a second")
            self._again = time.monotonic() + 1.0
            self.served.abandon()
            return self._go_back()
        except Exception as error:
            raise Stuck(f"what has been taken in cannot be stepped yet, but is kept: {error}") from error

    def save(self) -> None:
        """Begin a checkpoint. If the one before could not be written, the journal has kept what is in it."""
        try:
            self.served.wait()
            self._held.append(self._begun)
        except OSError as error:
            self.failures += 1
            log.error("a checkpoint could not be written: %s", error)
        self._saved = time.monotonic()
        try:
            self.served.save(self.batches)
        except OSError as error:
            if not self.durable:
                raise
            self.failures += 1
            self.stuck = True  # some of the outputs may be half written
            log.error("no checkpoint could be begun: %s", error)
            return
        self._begun = self.journal.next = self.batches
        self.journal.cut(self._held[0] if len(self._held) == self._held.maxlen else 0)

    def close(self) -> None:
        """Make a final checkpoint, and close."""
        if not self.stuck:
            self.save()
        if self.stuck:
            return self.abandon()
        self.served.close()
        self._sync.shutdown()

    def abandon(self) -> None:
        """Let go after a failure; the next server goes on from the journal."""
        self._sync.shutdown()
        self.served.abandon()
        self.journal.close()
