"""What a kill leaves of a table of the credit log that is being written."""

import pyarrow.parquet as pq
import pytest
from test_credit_log import make_trainer


class Killed(BaseException):
    pass


def test_a_table_is_there_when_all_of_it_is_written(model_dir, tmp_path, monkeypatch):
    write = pq.write_table

    def write_half(table, where, **kwargs):
        write(table, where, **kwargs)
        half = where.read_bytes()[:100]
        where.write_bytes(half)
        raise Killed

    monkeypatch.setattr(pq, "write_table", write_half)
    with pytest.raises(Killed):
        make_trainer(model_dir, tmp_path, log_credit=True).train()
    assert [path.suffix for path in tmp_path.glob("*/step_*")] == [".partial"]
