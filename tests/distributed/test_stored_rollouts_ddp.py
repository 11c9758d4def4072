"""Two processes write rollouts and learn from them as one process does, and either reads those of the other."""

import json

import pytest
import stored_worker
import torch
from datasets import Dataset
from launch import BIN, TESTS, run
from safetensors.torch import load_file


pytestmark = pytest.mark.distributed

# In float32 sums over processes come out in another order.
TOLERANCE = 1e-5
ACCUMULATING = {"gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def folder(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    stored_worker.pretrain(str(model_dir), folder / "one", folder / "of_one", **ACCUMULATING)
    script = [TESTS / "distributed" / "stored_worker.py", model_dir, folder / "two", folder / "of_one"]
    run([BIN / "torchrun", "--standalone", "--nproc-per-node", 2, *script])
    return folder


def held_out(run):
    history = json.loads((run / "history.json").read_text())
    name = "critic_pretraining/held_out_{}".format
    return [[entry[name(x)] for x in ("error", "explained_variance")] for entry in history if name("error") in entry]


def test_both_write_the_same_rollouts_in_the_same_order(folder):
    files = sorted(path.name for path in (folder / "of_one").glob("*.arrow"))
    assert len(files) == 4
    for name in files:
        one, two = (Dataset.from_file(str(folder / of / name)).to_list() for of in ("of_one", "two/rollouts"))
        assert len(one) == 4
        for row in (*one, *two):
            row["scores"] = [round(score, 5) for score in row["scores"]]
        assert one == two, name


@pytest.mark.parametrize("rollouts", ["own", "others"])
def test_two_processes_learn_as_one_whoever_has_written_the_rollouts(rollouts, folder):
    errors = torch.tensor(held_out(folder / "one"))
    assert errors.shape == (3, 2) and len(errors[:, 0].unique()) == 3
    assert torch.tensor(held_out(folder / "two" / rollouts)) == pytest.approx(errors, abs=TOLERANCE)
    one, two = (load_file(run / "critic" / "model.safetensors") for run in (folder / "one", folder / "two" / rollouts))
    assert all((one[name] - two[name]).abs().max() < TOLERANCE for name in one)
    assert one["score.weight"].abs().max() > 100 * TOLERANCE


def test_one_process_reads_what_two_have_written(folder, model_dir):
    trainer = stored_worker.pretrain(
        str(model_dir), folder / "again", folder / "two" / "rollouts", generates=False, **ACCUMULATING
    )
    expected = load_file(folder / "one" / "critic" / "model.safetensors")
    assert all((p - expected[name]).abs().max() < TOLERANCE for name, p in trainer.critic.state_dict().items())
