"""The journal gives back what was synced, whatever the end of its last file looks like."""

import io

import pytest

from anabranch.run.journal import Journal


def records(folder, first=0):
    return list(Journal(folder).replay(first))


def fill(folder, *counts):
    journal, n = Journal(folder), 0
    for count in counts:
        for _ in range(count):
            assert journal.append(f"record {n}".encode()) == n
            n += 1
        journal.sync()
        journal.cut(0)
    return sorted(folder.glob("*.journal"))


@pytest.mark.parametrize("first", [0, 2, 5, 7, 8])
def test_replay_begins_anywhere(tmp_path, first):
    fill(tmp_path, 3, 2, 3)
    assert records(tmp_path, first) == [(n, f"record {n}".encode()) for n in range(first, 8)]


def test_half_a_record_at_the_end_has_never_been(tmp_path):
    last = fill(tmp_path, 3, 2)[-1]
    whole = last.read_bytes()
    for size in range(len(whole) // 2, len(whole)):
        last.write_bytes(whole[:size])
        journal = Journal(tmp_path)
        assert [n for n, _ in journal.replay(0)] == [0, 1, 2, 3]
        assert journal.append(b"again") == 4
        journal.close()
        assert records(tmp_path)[-1] == (4, b"again")
        for path in tmp_path.glob("*.journal"):
            if path > last:
                path.unlink()


def test_a_flipped_bit_is_found(tmp_path):
    first, _ = fill(tmp_path, 3, 2)
    data = bytearray(first.read_bytes())
    data[20] ^= 1
    first.write_bytes(data)
    with pytest.raises(ValueError, match="record 3 follows, but 0 is missing"):
        records(tmp_path)
    assert [n for n, _ in records(tmp_path, 3)] == [3, 4]  # a checkpoint has the rest


def test_files_that_no_checkpoint_needs_go(tmp_path):
    journal = Journal(tmp_path)
    for n in range(6):
        journal.append(b"x")
        journal.cut(n - 1)  # the last two are needed
        assert len(list(tmp_path.glob("*.journal"))) == min(n + 1, 2)
    assert [n for n, _ in records(tmp_path, 4)] == [4, 5]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    class Full(io.BufferedWriter):
        left = 60

        def write(self, data):
            if len(data) > self.left:
                super().write(data[: self.left])
                raise OSError(28, "No space left on device")
            self.left -= len(data)
            return super().write(data)

    monkeypatch.setattr(
        "anabranch.run.journal.open", lambda path, mode: Full(open(path, mode, buffering=0)), raising=False
    )
    journal = Journal(tmp_path)
    journal.append(b"first")
    with pytest.raises(OSError, match="No space"):
        journal.append(b"second" * 10)
    monkeypatch.undo()
    assert journal.append(b"third") == 1
    journal.close()
    assert records(tmp_path) == [(0, b"first"), (1, b"third")]
