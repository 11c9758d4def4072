"""Checkpoints that an earlier version wrote go on with this one as they would have with that one."""

import json
import math
import tarfile
from pathlib import Path

import pytest
import torch
from checkpoints_0_2_0 import make


FOLDER = Path(make.__file__).parent
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module", params=make.RUNS)
def resumed(request, tmp_path_factory):
    """The run's name, its folder and its trainer, resumed and at its end."""
    folder = tmp_path_factory.mktemp(request.param)
    with tarfile.open(FOLDER / f"{request.param}.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    trainer = make.make_trainer(request.param, folder / "start", folder / "resumed")
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return request.param, folder, trainer


def test_a_checkpoint_of_0_2_0_resumes(resumed):
    name, folder, trainer = resumed
    expected = EXPECTED[name]
    found = make.results(trainer, folder / "start", folder / "trained")
    assert trainer.state.global_step == 4
    assert [entry["step"] for entry in found["steps"]] == [3, 4]
    if name == "genac":
        # The critic is told of earlier rollouts alone now, so it is asked another question and answers otherwise.
        assert all(math.isfinite(entry["loss"]) for entry in found["steps"])
        return
    for entry, other in zip(found["steps"], expected["steps"], strict=True):
        for number in make.NUMBERS:  # other machines round differently
            assert math.isclose(entry[number], other[number], rel_tol=1e-4, abs_tol=1e-6), (entry["step"], number)
    for network, distance in expected["moved"].items():
        assert math.isclose(found["moved"][network], distance, rel_tol=1e-3), network


def test_the_critic_of_a_checkpoint_of_0_2_0_goes_on_where_it_was(resumed):
    name, folder, trainer = resumed
    # Two of pretraining, which is not done again, and one a step.
    assert trainer.engine.steps == EXPECTED[name]["critic_updates"] == 2 + 4
    assert len([entry for entry in trainer.state.log_history if "critic_pretraining/loss" in entry]) == 2
    rates = [entry["critic/learning_rate"] for entry in trainer.state.log_history if "critic/learning_rate" in entry]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3]), "the schedule of the whole run"
    states = [
        torch.load(path / "critic_state.pt", weights_only=True)
        for path in (folder / "checkpoint-2", folder / "resumed" / "checkpoint-4")
    ]
    assert [state["steps"] for state in states] == [4, 6]
    for before, after in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert (before["step"], after["step"]) == (4, 6), "AdamW's moments were kept"
