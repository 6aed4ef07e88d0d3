"""Blocks and shared prefixes: the book-keeping under any use, and keys."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from anabranch.keep.blocks import OutOfBlocks, PrefixIndex, block_keys

SIZE = 2


class Tables(RuleBasedStateMachine):
    """Requests with texts of few tokens come, grow and go; beside the index, what each block was given for."""

    @initialize(blocks=st.integers(1, 12))
    def begin(self, blocks):
        self.index, self.tables, self.holds = PrefixIndex(blocks), [], {}

    @rule(text=st.lists(st.integers(0, 1), min_size=SIZE, max_size=8))
    def come(self, text):
        keys = block_keys(text, SIZE)
        found = self.index.match(keys)
        # The longest prefix that is there, by what is known of each block.
        known = {key: block for block, key in self.holds.items()}
        there = 0
        while there < len(keys) and keys[there] in known and known[keys[there]] in self.there():
            there += 1
        assert found == [known[key] for key in keys[:there]]
        held = sum(self.index.ref[block] > 0 for block in found)
        assert self.index.look(keys) == (there, held) == self.index.look(keys, (7, 3))
        self.index.fork(found)
        try:
            new = self.index.alloc(len(keys) - there)
        except OutOfBlocks:
            assert len(keys) - there > self.index.available
            self.index.free(found)
            return
        for block in new:
            self.holds.pop(block, None)
        table = self.index.insert(keys, found + new)
        assert table == found + new
        self.holds |= {block: key for key, block in zip(keys, table)}
        self.tables.append((keys, table))

    @rule(text=st.lists(st.integers(0, 1), min_size=SIZE, max_size=8))
    def compute_what_is_known(self, text):
        """Two that computed the same have it once."""
        keys = block_keys(text, SIZE)
        if len(keys) <= self.index.available:
            mine = self.index.alloc(len(keys))
            for block in mine:
                self.holds.pop(block, None)
            table = self.index.insert(keys, mine)
            known = {key: block for block, key in self.holds.items()}
            assert table == [known.get(key, block) for key, block in zip(keys, mine)]
            self.holds |= {block: key for key, block in zip(keys, table)}
            self.tables.append((keys, table))

    @rule(data=st.data())
    def grow(self, data):
        if self.tables and self.index.available:
            at = data.draw(st.integers(0, len(self.tables) - 1))
            new = self.index.alloc(1)
            self.holds.pop(new[0], None)
            self.tables[at] = self.tables[at][0], self.tables[at][1] + new

    @rule(data=st.data())
    def go(self, data):
        if self.tables:
            _, table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
            self.index.free(table)

    def there(self):
        return {block for block in range(len(self.index.ref)) if block in self.holds}

    @invariant()
    def books_are_right(self):
        count = [0] * len(self.index.ref)
        for _, table in self.tables:
            for block in table:
                count[block] += 1
        assert self.index.ref == count
        assert self.index.available == count.count(0)

    @invariant()
    def a_block_is_there_only_with_those_before_it(self):
        for keys, table in self.tables:
            assert self.index.match(keys) == table[: len(keys)]
            refs = [self.index.ref[block] for block in table]
            assert refs == sorted(refs, reverse=True)
            assert self.index.shared(table) == sum(ref > 1 for ref in refs)

    def teardown(self):
        for _, table in getattr(self, "tables", []):
            self.index.free(table)
        if hasattr(self, "index"):
            assert self.index.available == len(self.index.ref) == len(set(self.index.alloc(len(self.index.ref))))


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_was_used_last_stays_longest_and_of_a_text_its_beginning():
    index = PrefixIndex(4)
    a, b = block_keys([1, 1, 1, 1], SIZE), block_keys([2, 2, 2, 2], SIZE)
    first, second = (index.insert(keys, index.alloc(2)) for keys in (a, b))
    index.free(first)
    index.free(second)
    index.fork(index.match(a))
    index.free(first)  # b is now older than a
    assert index.alloc(1) == [second[1]] and index.look(b) == (1, 0) and index.look(a) == (2, 0)
    assert index.alloc(2) == [second[0], first[1]] and index.look(a) == (1, 0)


def test_keys_say_what_is_in_a_block_and_before_it():
    keys = block_keys(range(10), 3)
    assert len(keys) == 3 and len(set(keys)) == 3 and keys == block_keys(range(9), 3)
    other = block_keys([9, *range(1, 9)], 3)
    assert not set(keys) & set(other)  # a block of equal tokens after others is another
    assert not set(keys) & set(block_keys(range(9), 3, salt=b"tenant"))
    assert block_keys([1, 2], 3) == []


def test_refused():
    index = PrefixIndex(2)
    with pytest.raises(OutOfBlocks, match="3 blocks are wanted, 2 of 2 are free"):
        index.alloc(3)
    with pytest.raises(ValueError, match="block 1 is freed, but nobody holds it"):
        index.free([1])
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        PrefixIndex(0)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        block_keys([1], 0)
