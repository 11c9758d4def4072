"""A newer TRL is taken if it has all that the package builds on; if not, the error says what moved."""

import importlib
import logging
import re
import tomllib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from packaging.version import Version
from test_grpo_lambda import make_trainer
from test_seam import names_imported, names_of_trl, names_used, sources

from trl_credit.seam import canary, versions


NEXT = Version(f"{versions.NEWEST_TESTED.major}.{versions.NEWEST_TESTED.minor + 1}.0")
# Of transformers, which a version of TRL may come with or not: `run_without_training` asks for them itself.
OF_TRANSFORMERS = {"_run_epoch", "_finalize_training", "_resume_from"}
METHODS = [(place, name) for place, names in canary.METHODS.items() for name in names]
FUNCTIONS = [(module, name) for module, names in canary.FUNCTIONS.items() for name in names]


@pytest.fixture
def next_trl(monkeypatch):
    """The TRL that is installed says that it is newer than any that was tested."""
    monkeypatch.setattr(versions, "INSTALLED", NEXT)
    monkeypatch.setattr(versions, "IS_NEWER", True)


needs_tiles = pytest.mark.skipif(not versions.HAS_TILED_HEAD, reason=f"trl {versions.INSTALLED} has no head in tiles")
is_newest = pytest.mark.skipif(
    versions.INSTALLED.release[:2] != versions.NEWEST_TESTED.release[:2], reason="is about the newest version tested"
)


@is_newest
def test_the_newest_version_that_was_tested_has_all_that_the_package_builds_on():
    assert [*canary.names_that_moved()] == []


@is_newest
@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_a_function_that_is_gone_is_named(module, name, monkeypatch):
    monkeypatch.delattr(importlib.import_module(module), name)
    assert f"`{module}.{name}` is gone" in [*canary.names_that_moved()]


@is_newest
@pytest.mark.parametrize(("place", "name"), METHODS)
def test_a_method_that_is_gone_or_takes_other_arguments_is_named(place, name, monkeypatch):
    module, kind = place.rsplit(".", 1)
    if canary.METHODS[place][name]:
        monkeypatch.setattr(f"{place}.{name}", lambda self, *, other: None)
        assert any(f"`{kind}.{name}` does not take (" in moved for moved in canary.names_that_moved())
    monkeypatch.setattr(importlib.import_module(module), kind, type("Moved", (), {}))
    assert f"`{kind}.{name}` is gone" in [*canary.names_that_moved()]


@is_newest
def test_keys_of_a_rollout_that_are_gone_are_named(monkeypatch):
    for place, keys in canary.KEYS.items():
        method = place.split(".", 3)[3]
        monkeypatch.setattr(place, lambda self, *args: None)
        moved = [complaint for complaint in canary.names_that_moved() if f"`{method}` does not know" in complaint]
        assert moved == [f"`{method}` does not know `{key}`" for key in keys.split()]


@is_newest
def test_a_trainer_of_a_newer_version_is_made_with_one_line_of_warning(next_trl, model_dir, tmp_path, caplog):
    versions.check_trl_version()
    with caplog.at_level(logging.WARNING, logger="trl_credit"):
        trainer = make_trainer(model_dir, tmp_path)
        trainer.train()
    (line,) = [record.getMessage() for record in caplog.records if str(NEXT) in record.getMessage()]
    assert f"trl {NEXT} is newer than {versions.NEWEST_TESTED}, the last version that trl_credit" in line


def test_an_attribute_of_a_newer_version_that_is_gone_stops_the_trainer_and_names_what_works(
    next_trl, model_dir, tmp_path, monkeypatch
):
    trainer = make_trainer(model_dir, tmp_path)
    kept = dict(vars(trainer))
    for name in canary.ATTRIBUTES.split():
        trainer.__dict__.pop(name)
        message = (
            rf"trl {NEXT} .* does not work with it: `{name}` of the trainer is gone.*trl=={versions.NEWEST_TESTED}\.\*"
        )
        with pytest.raises(ImportError, match=message):
            versions.check_trainer(trainer)
        trainer.__dict__.update(kept)
    trainer._metrics, trainer.reward_weights = {"training": {}}, torch.zeros(3)
    assert len([*canary.attributes_that_moved(trainer)]) == 2


def test_a_rollout_of_a_newer_version_with_another_shape_stops_the_run(next_trl):
    whole = {
        "prompt_ids": torch.zeros(4, 2),
        "prompt_mask": torch.zeros(4, 2),
        "completion_ids": torch.zeros(4, 3),
        "completion_mask": torch.zeros(4, 3),
        "advantages": torch.zeros(4),
        "num_items_in_batch": torch.tensor(12),
    }
    versions.check_rollout(whole)
    moved = {"completion_mask": torch.zeros(12), "advantages": None, "old_per_token_logps": torch.zeros(4)}
    for name, value in moved.items():
        with pytest.raises(ImportError, match=f"does not work with it: `{name}` of the rollout is "):
            versions.check_rollout({**whole, name: value})


@is_newest
def test_a_newer_version_without_a_name_is_refused_on_import(next_trl, monkeypatch):
    monkeypatch.delattr(trl.GRPOTrainer, "_compute_loss")
    with pytest.raises(ImportError, match="`GRPOTrainer._compute_loss` is gone"):
        versions.check_trl_version()


def test_an_older_version_is_refused_on_import(monkeypatch):
    monkeypatch.setattr(versions, "INSTALLED", Version("1.14.1"))
    with pytest.raises(ImportError, match=r"trl 1\.14\.1 is installed.*pip install 'trl>=1\.14\.2'"):
        versions.check_trl_version()


def test_a_version_that_needs_triton_says_so_where_there_is_none(model_dir, tmp_path, monkeypatch):
    trainer = make_trainer(model_dir, tmp_path)
    monkeypatch.setattr(versions, "INSTALLED", Version("1.15.0"))
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", None)
    with pytest.raises(ImportError, match=r"computes log-probabilities with Triton alone.*trl!=1\.15"):
        versions.check_trainer(trainer)


@needs_tiles
def test_what_needs_tiles_is_refused_without_them(model_dir, tmp_path, monkeypatch):
    trainer = make_trainer(model_dir, tmp_path, beta=0.04)
    monkeypatch.setattr(versions, "HAS_TILED_HEAD", False)
    with pytest.raises(ValueError, match="Listening to the reference model needs TRL 1.15 or later"):
        trainer.listen_to_reference((-1,))


@pytest.mark.parametrize("keeps", [True, False])
def test_gradient_checkpointing_is_as_it_was_after_a_generation(keeps, monkeypatch):
    """Until 1.15 TRL turned it on again with arguments of transformers' own."""
    given, module = [], SimpleNamespace(is_gradient_checkpointing=True)
    module.gradient_checkpointing_enable = given.append

    @contextmanager
    def unwrap(module, accelerator, **settings):
        given.append(settings)
        yield module

    monkeypatch.setattr("trl.models.utils.unwrap_model_for_generation", unwrap)
    monkeypatch.setattr(versions, "INSTALLED", Version("1.16.0" if keeps else "1.15.0"))
    kwargs = {"use_reentrant": False}
    with versions.unwrapped_for_generation(module, None, kwargs, gather_deepspeed3_params=True):
        pass
    gather = {"gather_deepspeed3_params": True}
    assert given == ([{**gather, "gradient_checkpointing_kwargs": kwargs}] if keeps else [gather, kwargs])


@is_newest
def test_all_that_the_seam_uses_is_in_the_canary():
    listed = {
        *(name for _, name in METHODS),
        "_last_loaded_step",
        *canary.ATTRIBUTES.split(),
        *(name for _, name in FUNCTIONS),
    }
    trees = [tree for path, tree in sources("seam", "trainers").items() if not path.startswith("seam/canary")]
    private = {name for name in names_used(trees) & names_of_trl() if name.startswith("_")}
    assert private - listed - OF_TRANSFORMERS - {"_name", "_tag_names", "_paper"} == set()
    assert names_imported(trees) - listed - {"accuracy_reward"} == set()


def test_the_oldest_set_of_versions_is_what_the_package_asks_for():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = tomllib.loads((root / "tests/versions/sets.toml").read_text(encoding="utf-8"))["oldest"]["pins"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["peft"]]
    asked += project["optional-dependencies"]["deepspeed"]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in asked if ">=" in line)
    pins = dict(pin.split("==") for pin in oldest)
    assert pins.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert Version(pins[name]) == Version(bound), name
