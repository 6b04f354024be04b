"""Whole files or none, on a full disk too."""

import os

import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from jaxdiff.data.array_records import new_records


def test_records_come_back(tmp_path):
    with new_records(tmp_path / "x.array_record") as write:
        write(b"one")
        write(b"")
        assert not (tmp_path / "x.array_record").exists()
    records = ArrayRecordDataSource([str(tmp_path / "x.array_record")])
    assert [records[0], records[1]] == [b"one", b""]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, small_disk):
    file = tmp_path / "x.array_record"
    with new_records(file) as write:
        write(b"old")
    with pytest.raises(OSError, match=r"x\.array_record: cannot be written"), new_records(file) as write:
        for _ in range(100):
            write(os.urandom(20_000))
    assert ArrayRecordDataSource([str(file)])[0] == b"old" and len(list(tmp_path.iterdir())) == 1


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_records(tmp_path / "x") as write:
        write(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
