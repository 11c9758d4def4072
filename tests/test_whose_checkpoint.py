"""A checkpoint says whose it is; what of it cannot be read is named, and so is the way on."""

import logging
import shutil
from pathlib import Path

import pytest
import sppo_runs
import torch
import vapo_runs
from accelerate import Accelerator
from tiny import tiny_model, tiny_model_dir
from transformers import AutoModelForSequenceClassification

from trl_credit import SPPOTrainer, VAPOTrainer
from trl_credit.critics.engine import CriticEngine, CriticOptimization
from trl_credit.critics.facts import CriticFacts
from trl_credit.saved import MANIFEST
from trl_credit.trainers.genac.genac_trainer import STATE_FILE


RUNS = {"vapo": (vapo_runs, VAPOTrainer, {}), "sppo": (sppo_runs, SPPOTrainer, {"reward_range": [0, 1]})}


def make(method, model_dir, folder, **settings):
    runs, trainer, own = RUNS[method]
    saving = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "max_steps": 2}
    return runs.make_trainer(model_dir, folder, trainer=trainer, **{**saving, **own, **settings})


@pytest.fixture(scope="module")
def runs(model_dir, tmp_path_factory):
    """The output directory of a run of each method. Not to be changed: see `checkpoint`."""
    folders = {}
    for method in RUNS:
        folders[method] = tmp_path_factory.mktemp(method)
        make(method, model_dir, folders[method]).train()
    return folders


@pytest.fixture
def checkpoint(runs, tmp_path):
    """A copy of a run's first checkpoint, without the list of its files, as 0.2.0 saved it."""

    def get(method):
        folder = Path(shutil.copytree(runs[method] / "checkpoint-1", tmp_path / "checkpoint-1"))
        (folder / MANIFEST).unlink()
        return folder

    return get


def resume(method, model_dir, checkpoint, **settings):
    trainer = make(method, model_dir, checkpoint.parent / "resumed", **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


# --- Whose it is


@pytest.mark.parametrize(("saved_by", "resumed_by"), [("vapo", "sppo"), ("sppo", "vapo")])
def test_the_checkpoint_of_another_method_is_refused(saved_by, resumed_by, model_dir, checkpoint):
    kinds = {"vapo": r"a critic of tokens \(VAPO, PPO\)", "sppo": r"a critic of prompts \(SPPO\)"}
    message = rf"checkpoint-1 is {kinds[saved_by]}, .* and {kinds[resumed_by]} is needed"
    with pytest.raises(ValueError, match=message):
        resume(resumed_by, model_dir, checkpoint(saved_by))


@pytest.mark.parametrize(
    ("option", "was", "now"), [("critic_loss", "'bce'", "mse"), ("reward_range", "[0.0, 1.0]", [0.0, 2.0])]
)
def test_a_checkpoint_whose_critic_is_read_otherwise_is_refused(option, was, now, model_dir, checkpoint):
    with pytest.raises(ValueError) as caught:
        resume("sppo", model_dir, checkpoint("sppo"), **{"reward_range": "running", option: now})
    assert f"was saved by a run with `{option}={was}`, and this one has {now!r}" in str(caught.value)


def test_another_learning_rate_is_used_from_there_and_said(model_dir, checkpoint, caplog):
    settings = {"critic_learning_rate": 4e-4, "critic_head_learning_rate": 4e-4, "critic_lr_scheduler_type": "linear"}
    with caplog.at_level(logging.WARNING):
        resumed = resume("vapo", model_dir, checkpoint("vapo"), max_steps=4, **settings)
    rates = [entry["critic/learning_rate"] for entry in resumed.state.log_history if "critic/learning_rate" in entry]
    assert rates == pytest.approx([1e-3, 3e-4, 2e-4, 1e-4]), "three quarters of the training are left"
    assert [group["lr"] for group in resumed.engine.backend.optimizer.param_groups] == [0.0, 0.0]
    said = [line for line in caplog.messages if "From here the critic is trained with" in line]
    assert len(said) == 1 and "'critic_learning_rate': 0.0004" in said[0] and "0.001" in said[0].split("until")[1]
    assert "critic_lr_scheduler_type" in said[0] and "critic_max_grad_norm" not in said[0]


def test_the_same_learning_rate_is_not_worth_a_word(model_dir, checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        resumed = resume("vapo", model_dir, checkpoint("vapo"))
    assert resumed.state.global_step == 2 and "From here the critic" not in caplog.text


@pytest.mark.parametrize(
    ("option", "now"), [("critic_weight_decay", 0.1), ("critic_optim", "sgd"), ("adam_epsilon", 1e-4)]
)
def test_another_optimizer_is_refused_by_name(option, now, model_dir, checkpoint):
    named = "critic_optim_args" if option == "adam_epsilon" else option
    with pytest.raises(ValueError, match=rf"The critic's optimizer in .*checkpoint-1 was saved with `{named}="):
        resume("vapo", model_dir, checkpoint("vapo"), **{option: now})


def test_a_head_that_gets_a_rate_of_its_own_is_refused_with_the_options_that_decide(model_dir, checkpoint):
    with pytest.raises(ValueError, match="optimizer in .*critic_state.pt does not fit .* `critic_head_learning_rate`"):
        resume("vapo", model_dir, checkpoint("vapo"), critic_head_learning_rate=1e-2)


# --- What cannot be read, in a checkpoint that has no list of its files


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [emptied, cut_off])
@pytest.mark.parametrize("name", ["critic_state.pt", "critic/model.safetensors", "critic/critic.json"])
def test_a_file_that_cannot_be_read_is_named(name, harm, model_dir, checkpoint):
    folder = checkpoint("vapo")
    harm(folder / name)
    named = folder / ("critic" if name.endswith("safetensors") else name)
    with pytest.raises(ValueError) as caught:
        resume("vapo", model_dir, folder)
    assert str(caught.value).startswith(f"{named} cannot be read (")
    assert "truncated or damaged" in str(caught.value) and "Take another checkpoint" in str(caught.value)


def test_a_critic_without_its_config_is_refused_before_a_model_is_made(model_dir, checkpoint):
    folder = checkpoint("vapo")
    (folder / "critic" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="critic holds no critic: it has no config.json"):
        resume("vapo", model_dir, folder)


def test_a_missing_critic_is_named(model_dir, checkpoint, tmp_path):
    folder = checkpoint("vapo")
    shutil.rmtree(folder / "critic")
    with pytest.raises(FileNotFoundError, match=rf"There is no critic in {folder}/critic"):
        resume("vapo", model_dir, folder)
    with pytest.raises(FileNotFoundError, match=r"There is no critic in .*/no/such/critic: it is no folder, and no id"):
        make("vapo", model_dir, tmp_path, critic=str(tmp_path / "no/such/critic"))


def test_the_critic_of_another_size_is_named_with_what_does_not_fit(model_dir, checkpoint, tmp_path):
    wider = str(tiny_model_dir(tmp_path / "wider", hidden=32))
    with pytest.raises(ValueError) as caught:
        resume("vapo", model_dir, checkpoint("vapo"), critic=wider)
    assert "does not fit this run (RuntimeError: " in str(caught.value) and "size mismatch" in str(caught.value)
    assert "Give the run the critic that it began with" in str(caught.value)


def test_a_reward_model_with_two_labels_is_refused_by_name(model_dir, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="A critic must have one label, but .*two has 2"):
        make("vapo", model_dir, tmp_path, critic=str(tmp_path / "two"))


@pytest.mark.parametrize("name", [STATE_FILE, "critic.json"])
def test_a_truncated_json_file_is_named(name, model_dir, tmp_path):
    from genac_runs import make_trainer

    (tmp_path / "critic").mkdir()
    for path in (tmp_path / STATE_FILE, tmp_path / "critic" / "critic.json"):
        path.write_text("{}" if path.name != name else '{"kind": "gen')
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(JSONDecodeError"):
        if name == STATE_FILE:
            make_trainer(model_dir, tmp_path / "out").begin_training(str(tmp_path))
        else:
            CriticFacts.load(tmp_path / "critic")


# --- Numbers


def test_an_overflow_of_float16_is_not_blamed_on_the_learning_rate():
    network = tiny_model(num_labels=1, layers=1).half()
    for p in network.parameters():
        p.requires_grad_(False)
    trained = torch.nn.Parameter(torch.ones(1))
    network.register_parameter("trained", trained)
    engine = CriticEngine(network, Accelerator(cpu=True), CriticOptimization(1e-3))
    engine.begin(2)

    def overflow(network, scale):
        return network.trained.sum() * (network.lm_head.weight.abs().max() * scale).float()

    with pytest.raises(FloatingPointError, match="weights in float16, whose numbers end at 65504") as caught:
        engine.update([torch.tensor(6e4, dtype=torch.float16) ** 2], overflow, lambda _: torch.tensor(1))
    assert "learning rate" not in str(caught.value)
