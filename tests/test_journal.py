"""What is on the disk after a process has died."""

import pytest

from trl_credit.journal import Journal, read_rows, write_rows


def test_a_file_that_could_not_be_written_to_its_end_is_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"a": 1}, {"a": 2}])
    with pytest.raises(TypeError):  # in the second row, when the first one is written
        write_rows(path, [{"a": 3}, {"a": object()}])
    assert list(read_rows(path)) == [{"a": 1}, {"a": 2}]
    write_rows(path, [{"a": 4}])
    assert list(read_rows(path)) == [{"a": 4}]


def test_half_a_line_is_cut_off_and_whole_ones_stay(tmp_path):
    path = tmp_path / "rows.jsonl"
    Journal(path).append([1])
    with path.open("a") as file:
        file.write('{"half": ')
    journal = Journal(path)
    journal.append([2])
    assert journal.rows() == [[1], [2]]
