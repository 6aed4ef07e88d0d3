"""The journal of a server: what has been taken in since the last checkpoint, written down before it is acknowledged."""

import itertools
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from anabranch.run.sink import sync

log = logging.getLogger("anabranch.journal")
_HEAD = struct.Struct("<QII")  # number, length, checksum
_MOST = 1 << 30


class Journal:
    """Numbered records in files of a folder, each file beginning where a checkpoint was made.

    A record is durable once `sync` has returned. After a crash the records of whole files are there, and of the last
    file those up to the first that was only half written.

        >>> import tempfile
        >>> journal = Journal(tempfile.mkdtemp())
        >>> journal.append(b"three rows"), journal.append(b"two rows")
        (0, 1)
        >>> journal.sync()
        >>> [(n, data) for n, data in Journal(journal.folder).replay(1)]
        [(1, b'two rows')]
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.next = 0
        """The number of the next record."""
        self._file = None
        self._path, self._start = self.folder, 0

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.journal"))

    def replay(self, first: int) -> Iterator[tuple[int, bytes]]:
        """The records from number `first` on; what is appended afterwards follows them.

        Raises:
            ValueError: if records are missing between `first` and those that are there.
        """
        self.next = first
        files = self._files()
        for i, path in enumerate(files):
            end = 0
            with open(path, "rb") as file:
                while head := file.read(_HEAD.size):
                    number, length, checksum = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, _MOST + 1, 0)
                    data = file.read(length) if length <= _MOST else b""
                    if len(data) != length or zlib.crc32(data, number & 0xFFFFFFFF) != checksum:
                        break
                    end = file.tell()
                    if number > self.next:
                        raise ValueError(f"{path}: record {number} follows, but {self.next} is missing")
                    if number == self.next:
                        self.next += 1
                        yield number, data
                torn = path.stat().st_size - end
            if torn:
                if i < len(files) - 1:
                    log.warning("%s: %d bytes at its end cannot be read", path, torn)
                os.truncate(path, end)  # half a record: nobody has been told that it is kept

    def append(self, data: bytes) -> int:
        """Write a record; returns its number.

        Raises:
            OSError: if it cannot be written; then it is as if it had not been tried.
        """
        if self._file is None:
            self._path = self.folder / f"{self.next:016d}.journal"
            self._file = open(self._path, "ab")
            sync(self.folder)
        number, self._start = self.next, self._file.tell()
        try:
            self._file.write(_HEAD.pack(number, len(data), zlib.crc32(data, number & 0xFFFFFFFF)))
            self._file.write(data)
            self._file.flush()
        except OSError:
            self._file.detach().close()  # without another try to write what is buffered
            self._file = None
            os.truncate(self._path, self._start)
            raise
        self.next += 1
        return number

    def drop(self) -> None:
        """Take back the record that was appended last."""
        assert self._file is not None
        os.ftruncate(self._file.fileno(), self._start)
        self._file.seek(self._start)
        self.next -= 1
        self.sync()

    def sync(self) -> None:
        """Make all records durable."""
        if self._file is not None:
            os.fdatasync(self._file.fileno())

    def cut(self, first: int) -> None:
        """Begin a file with the next record, and remove the files whose records all come before number `first`."""
        self.close()
        for path, later in itertools.pairwise(self._files()):
            if int(later.stem) <= first:
                path.unlink()

    def close(self) -> None:
        """Make all records durable, and close."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None
