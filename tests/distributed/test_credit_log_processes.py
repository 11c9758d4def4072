"""The credit log of two processes. `torchrun test_credit_log_processes.py MODEL_DIR OUTPUT_DIR` is what each runs."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow.parquet as pq
import pytest
from launch import BIN, run
from tiny import tiny_model_dir
from torch import distributed
from vapo_runs import make_trainer

from trl_credit.credit_log.reader import CREDIT_FOLDER


def train(model_dir, folder, **settings):
    make_trainer(model_dir, folder, num_generations=4, max_steps=2, log_credit=True, log_credit_steps=1,
                 log_credit_completions=6, **settings).train()  # fmt: skip


@pytest.mark.distributed
def test_two_processes_write_the_table_of_one(tmp_path):
    model_dir = tiny_model_dir(tmp_path)
    train(model_dir, tmp_path / "one", per_device_train_batch_size=8)
    run([BIN / "torchrun", "--standalone", "--nproc-per-node", 2, __file__, model_dir, tmp_path / "two"])
    assert (tmp_path / "two" / "processes").read_text() == "2"
    names = [f"step_000000{step}.parquet" for step in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "two" / CREDIT_FOLDER).iterdir()) == names
    for name in names:
        one, two = (pq.read_table(tmp_path / folder / CREDIT_FOLDER / name).to_pylist() for folder in ("one", "two"))
        assert [row["row"] for row in two] == [0, 1, 2, 3, 4, 5]  # 4 of the first process and 2 of the second
        for expected, found in zip(one, two, strict=True):
            assert found.keys() == expected.keys()
            for column in ("tokens", "prompt", "trained", "reward", "step"):
                assert found[column] == expected[column], column
            for column in ("advantage", "value", "logp", "entropy", "ratio"):
                assert found[column] == pytest.approx(expected[column], abs=1e-5, nan_ok=True), column


if __name__ == "__main__":
    model_dir, folder = sys.argv[1:]
    train(model_dir, folder, per_device_train_batch_size=4)
    if distributed.get_rank() == 0:
        (Path(folder) / "processes").write_text(str(distributed.get_world_size()))
    distributed.barrier()
    distributed.destroy_process_group()
