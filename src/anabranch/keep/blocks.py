"""Blocks of a cache of keys and values: who holds them, and which hold the beginning of another request's text, or
(`SegmentIndex`) any part of it.

A text is cut in blocks of so many tokens. The key of a full block says which tokens are in it and all before it: what
two texts share are the blocks whose keys are equal. Paged memory is that of Kwon et al., "Efficient Memory Management
for Large Language Model Serving with PagedAttention", SOSP 2023, and chained keys are vLLM's.

    >>> index = PrefixIndex(blocks=8)
    >>> first = block_keys([5, 6, 7, 8, 9], size=2)  # the fifth token fills no block
    >>> table = index.insert(first, index.alloc(2))
    >>> index.free(table), index.available  # nobody holds them, but they are still there
    (None, 8)
    >>> index.match(block_keys([5, 6, 7, 7], size=2)) == table[:1]
    True

Here is the book-keeping alone, on the host: numbers of blocks. Where keys and values lie is the caller's affair.
"""

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class OutOfBlocks(RuntimeError):
    """More blocks are wanted than nobody holds."""


def block_keys(tokens: Sequence[int] | np.ndarray, size: int, salt: bytes = b"") -> list[bytes]:
    """The key of every full block of a text, each made of the one before and the tokens of the block.

    Arguments:
        size: tokens of a block.
        salt: texts with different salts share nothing, such as those of two tenants.

    Raises:
        ValueError: if a block holds no token.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    data = np.asarray(tokens, np.int64).tobytes()
    step, keys, key = 8 * size, [], hashlib.blake2b(salt, digest_size=16).digest()
    for at in range(0, len(data) - step + 1, step):
        key = hashlib.blake2b(key + data[at : at + step], digest_size=16).digest()
        keys.append(key)
    return keys


class PrefixIndex:
    """Numbers of blocks, how many tables hold each, and where the block with a key is.

    A table is the list of a request's blocks. Blocks that nobody holds any more but that have a key stay, and are given
    away when there is no empty one: the one that was held least recently first, of a text its last one first.

    Two rules make that right, and are the caller's: who holds a block holds those before it, and a table is freed as a
    whole or from its end. Then no block is ever there without those before it.

    Raises:
        ValueError: if there is no block.
    """

    def __init__(self, blocks: int):
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        self.ref = [0] * blocks
        """How many tables hold each block."""
        self._key: list[Hashable | None] = [None] * blocks
        self._at: dict[Hashable, int] = {}
        self._empty = list(range(blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # have a key and no holder; what goes first is first

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._idle)

    def alloc(self, n: int) -> list[int]:
        """Blocks for new contents, held once.

        Raises:
            OutOfBlocks: if there are not so many that nobody holds; then nothing changes.
        """
        if n > self.available:
            raise OutOfBlocks(f"{n} blocks are wanted, {self.available} of {len(self.ref)} are free")
        ids = []
        for _ in range(n):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._at[self._key[block]]
                self._key[block] = None
            self.ref[block] = 1
            ids.append(block)
        return ids

    def fork(self, ids: Sequence[int]) -> None:
        """Let one more table hold these blocks."""
        for block in ids:
            if not self.ref[block]:
                del self._idle[block]
            self.ref[block] += 1

    def free(self, ids: Sequence[int]) -> None:
        """Let one table less hold these blocks.

        Raises:
            ValueError: if nobody holds one of them.
        """
        for block in reversed(ids):
            if not self.ref[block]:
                raise ValueError(f"block {block} is freed, but nobody holds it")
            self.ref[block] -= 1
            if not self.ref[block]:
                if self._key[block] is None:
                    self._empty.append(block)
                else:
                    self._idle[block] = None

    def match(self, keys: Sequence[Hashable]) -> list[int]:
        """The blocks of the longest prefix that is there, not held yet: `fork` them before the next `alloc`."""
        return [self._at[key] for key in keys[: self.look(keys)[0]]]

    def look(self, keys: Sequence[Hashable], guess: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """How many blocks of a prefix are there, and how many of those somebody holds.

        Arguments:
            guess: an earlier answer; if it is right still, that is found at once.
        """
        at, ref = self._at, self.ref
        there, held = min(guess[0], len(keys)), guess[1]
        if (there and keys[there - 1] not in at) or (there < len(keys) and keys[there] in at):
            there = bisect_left(keys, True, key=lambda key: key not in at)
        if held > there or (held and not ref[at[keys[held - 1]]]) or (held < there and ref[at[keys[held]]]):
            held = bisect_left(keys, True, hi=there, key=lambda key: not ref[at[key]])
        return there, held

    def shared(self, ids: Sequence[int]) -> int:
        """How many blocks of a table other tables hold as well."""
        return bisect_left(ids, True, key=lambda block: self.ref[block] < 2)

    def insert(self, keys: Sequence[Hashable], ids: Sequence[int]) -> list[int]:
        """Make known what the first blocks of a table hold; returns those that the table is to have in their place.

        These are the same ones, but where a key is known already: then the caller holds the known block from now on,
        and no longer its own, which has the same contents.
        """
        out = []
        for key, block in zip(keys, ids, strict=True):
            known = self._at.setdefault(key, block)
            if known == block:
                self._key[block] = key
            else:
                self.fork([known])
                self.free([block])
            out.append(known)
        return out


class Segment(NamedTuple):
    """Tokens that a text has in common with an earlier one, anywhere in both."""

    source: Hashable
    """Which text."""
    src: int
    """Where they begin in it."""
    dst: int
    """Where they begin in the new one."""
    length: int


class SegmentIndex:
    """Where runs of tokens have been before, at the beginning of a text or not.

    Every `window` tokens of a text in a row are a key, so that runs of at least so many are found. Of texts beyond
    `texts` those that were found or put in least recently are forgotten.

        >>> index = SegmentIndex(window=3)
        >>> index.insert("a", [1, 2, 3, 4, 5])  # nothing is forgotten for it
        []
        >>> index.match([9, 2, 3, 4, 5, 7])
        [Segment(source='a', src=1, dst=1, length=4)]

    Raises:
        ValueError: if `window` or `texts` is not positive.
    """

    most = 8
    """Places of one key that are known at most: of a token said a thousand times not every pair is tried."""

    def __init__(self, window: int = 5, texts: int = 1024):
        for name, value in (("window", window), ("texts", texts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.window, self.texts = window, texts
        self._tokens: OrderedDict[Hashable, tuple[np.ndarray, bytes]] = OrderedDict()
        self._at: dict[bytes, list[tuple[Hashable, int]]] = {}

    def __contains__(self, source: Hashable) -> bool:
        return source in self._tokens

    def insert(self, source: Hashable, tokens: Sequence[int] | np.ndarray, salt: bytes = b"") -> list[Hashable]:
        """Know a text; returns those that are forgotten for it.

        Arguments:
            salt: texts with different salts share nothing, such as those of two tenants.
        """
        self.remove(source)
        gone = [next(iter(self._tokens)) for _ in range(len(self._tokens) >= self.texts)]
        for old in gone:
            self.remove(old)
        self._tokens[source] = np.asarray(tokens, np.int64), salt
        for at, key in enumerate(self._keys(source)):
            places = self._at.setdefault(key, [])
            if len(places) < self.most:
                places.append((source, at))
        return gone

    def remove(self, source: Hashable) -> None:
        """Forget a text, if it is known."""
        if source not in self._tokens:
            return
        for key in set(self._keys(source)):
            places = [place for place in self._at.get(key, ()) if place[0] != source]
            if places:
                self._at[key] = places
            else:
                self._at.pop(key, None)
        del self._tokens[source]

    def match(self, tokens: Sequence[int] | np.ndarray, salt: bytes = b"") -> list[Segment]:
        """All runs that a text has in common with known ones, as long as they are; by where they begin in it."""
        text = np.asarray(tokens, np.int64)
        done: dict[tuple[Hashable, int], int] = {}  # to where each pair of texts, one shifted, has been compared
        found = []
        for at, key in enumerate(_grams(text, self.window, salt)):
            for source, src in self._at.get(key, ()):
                if done.get((source, src - at), 0) > at:
                    continue
                old = self._tokens[source][0]
                n = min(len(old) - src, len(text) - at)
                differs = np.flatnonzero(old[src : src + n] != text[at : at + n])
                length = int(differs[0]) if len(differs) else n
                done[source, src - at] = at + length
                found.append(Segment(source, src, at, length))
        for source in dict.fromkeys(segment.source for segment in found):
            self._tokens.move_to_end(source)
        return found

    def _keys(self, source: Hashable) -> list[bytes]:
        tokens, salt = self._tokens[source]
        return _grams(tokens, self.window, salt)


def _grams(tokens: np.ndarray, window: int, salt: bytes) -> list[bytes]:
    """Every `window` tokens in a row as bytes, which are their own hash: what is found need not be compared."""
    data = tokens.tobytes()
    return [salt + data[8 * at : 8 * (at + window)] for at in range(len(tokens) - window + 1)]
