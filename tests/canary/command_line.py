"""Checks of TRL's command line, scripts, model cards and small functions."""

import contextlib
import importlib
import inspect
from pathlib import Path
from types import FunctionType, SimpleNamespace

import torch
import trl

from trl_credit.seam.versions import HAS_TILED_HEAD

from .run import check


@check
def model_card(run):
    ours = {
        "_name": "our-method",
        "_tag_names": ["our-tag"],
        "_paper": {"title": "our-paper", "id": "1", "citation": "our-citation"},
    }
    run.trainer.__dict__.update(ours)
    run.trainer.create_model_card()
    path = Path(run.trainer.args.output_dir, "README.md")
    assert path.exists(), "`create_model_card` does not write `README.md`"
    card = path.read_text(encoding="utf-8")
    assert "### Framework versions" in card, "the card has no `### Framework versions`"
    for name, texts in {**ours, "_paper": ours["_paper"].values(), "_name": ["our-method"]}.items():
        assert all(text in card for text in texts), f"the card does not say what `{name}` does"


@check
def functions():
    utils = importlib.import_module("trl.trainer.utils")
    tiles = ("add_fused_lm_head", "_CHUNKED_LOGPROB_CHUNK_SIZE") if HAS_TILED_HEAD else ()
    for name in ("get_config_model_id", "is_async_callable", "maybe_gather_lm_head_ctx", *tiles):
        assert hasattr(utils, name), f"`trl.trainer.utils` has no `{name}` any more"
    models = importlib.import_module("trl.models.utils")
    assert hasattr(models, "disable_gradient_checkpointing"), (
        "`trl.models.utils.disable_gradient_checkpointing` is gone"
    )

    async def coroutine():
        pass

    assert utils.is_async_callable(coroutine) and not utils.is_async_callable(print), "`is_async_callable` errs"
    assert utils.get_config_model_id(SimpleNamespace(_name_or_path="a/b")) == "a/b", "`get_config_model_id` errs"
    try:
        context = utils.maybe_gather_lm_head_ctx(torch.nn.Parameter(torch.zeros(1)), None)
    except TypeError as error:
        raise AssertionError(f"`maybe_gather_lm_head_ctx` does not take (weight, bias): {error}") from error
    assert isinstance(context, contextlib.AbstractContextManager), "`maybe_gather_lm_head_ctx` is no context"


@check
def command_line():
    script = importlib.import_module("trl.scripts.grpo")
    assert hasattr(script, "GRPOScriptArguments"), "`trl.scripts.grpo` has no `GRPOScriptArguments` any more"
    classes = (script.GRPOScriptArguments, trl.GRPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    parser = trl.TrlParser(classes, prog="trl-credit", allow_abbrev=False)
    try:
        *_, from_file, from_argv = parser.parse_args_and_config(
            ["--output_dir", "out", "--bf16", "False", "--num_processes", "2"],
            return_remaining_strings=True,
            separate_remaining_strings=True,
        )
    except (AttributeError, TypeError) as error:
        raise AssertionError(f"`parse_args_and_config` has another signature: {error}") from error
    assert (from_file, from_argv) == ([], ["--num_processes", "2"]), (
        "`parse_args_and_config` does not return the remaining arguments of file and command line last"
    )
    for name, attribute, arguments, expected in (
        ("trl.cli.commands.training", "_subtract_subsequence", (["a", "b", "c"], ["b"]), ["a", "c"]),
        ("trl.cli.accelerate_config", "resolve_accelerate_config_argument", (["--x"],), ["--x"]),
    ):
        function = getattr(importlib.import_module(name), attribute, None)
        assert function is not None and function(*arguments) == expected, f"`{name}.{attribute}` is gone or errs"


@check
def launcher():
    module, seen = importlib.import_module("trl.cli.accelerate_launcher"), []
    launch = getattr(module, "launch_training_script", None)
    assert launch is not None, "`trl.cli.accelerate_launcher` has no `launch_training_script` any more"
    try:
        launch(
            __file__,
            ["--num_processes", "2"],
            ["--x"],
            launch_command_fn=seen.append,
            launch_parser_fn=importlib.import_module("accelerate.commands.launch").launch_command_parser,
        )
    except TypeError as error:
        raise AssertionError(f"`launch_training_script` has another signature: {error}") from error
    assert [(args.training_script, args.num_processes) for args in seen] == [(__file__, 2)], (
        "`launch_training_script` does not launch a script by its absolute path"
    )


@check
def a_file_of_data_is_part_of_a_mixture():
    utils = importlib.import_module("trl.scripts.utils")
    fields = {"path", "data_files"}
    known = set(inspect.signature(getattr(utils, "DatasetConfig", lambda: None)).parameters)
    assert fields <= known, f"`DatasetConfig` no longer takes {sorted(fields - known)}"
    mixture = importlib.import_module("trl").DatasetMixtureConfig()
    assert (mixture.datasets, mixture.streaming) == ([], False), "`DatasetMixtureConfig` has other defaults"


@check
def script_gets_its_trainer_from_trl_when_it_runs():
    for script, trainer in (("trl.scripts.grpo", "GRPOTrainer"), ("trl.scripts.sft", "SFTTrainer")):
        main = getattr(importlib.import_module(script), "main", None)
        assert isinstance(main, FunctionType), f"`{script}` has no `main` any more"
        assert trainer in main.__code__.co_varnames, f"`main` does not import `{trainer}` when it is called"
        parameters = list(inspect.signature(main).parameters)
        assert parameters == ["script_args", "training_args", "model_args", "dataset_args"], (
            f"`main` takes {parameters}, not what its parser returns"
        )
    env = importlib.import_module("trl.scripts.env")
    assert hasattr(env, "print_env"), "`trl.scripts.env` has no `print_env` any more"
    try:
        data = importlib.import_module("trl.scripts.utils").DatasetConfig(path="json", data_files="a.jsonl")
    except (AttributeError, TypeError) as error:
        raise AssertionError(f"`trl.scripts.utils.DatasetConfig` is gone or takes others: {error}") from error
    assert (data.path, data.data_files) == ("json", "a.jsonl"), "`DatasetConfig` does not keep `path` and `data_files`"
