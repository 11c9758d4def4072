"""`--dataset_name` takes a file with every command that trains."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from trl import GRPOTrainer, SFTTrainer

from trl_credit.methods import METHODS
from trl_credit.scripts import genac_sft, genac_traces
from trl_credit.scripts.train import make_parser
from trl_credit.seam.scripts import reader_of, run_grpo_script, run_sft_script


ROWS = [{"prompt": f"{n} + 1 =", "completion": str(n + 1)} for n in range(8)]
BASE = [
    "--model_name_or_path",
    "m",
    "--output_dir",
    "o",
    "--bf16",
    "false",
    "--use_cpu",
    "--reward_funcs",
    "json.dumps",
]


class Reached(Exception):
    """What the script has made of its arguments, as far as the trainer."""


def stops(base):
    class Stops(base):
        def __init__(self, train_dataset=None, eval_dataset=None, **kwargs):
            raise Reached(train_dataset, eval_dataset)

    return Stops


def data_of(parser, *argv, run=run_grpo_script, base=GRPOTrainer):
    with pytest.raises(Reached) as reached:
        run(stops(base), *parser.parse_args_and_config([*BASE[: None if base is GRPOTrainer else 7], *argv]))
    return reached.value.args


@pytest.fixture(params=["jsonl", "json", "csv", "parquet"])
def file(request, tmp_path):
    path, data = tmp_path / f"problems.{request.param}", Dataset.from_list(ROWS)
    if request.param == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        getattr(data, f"to_{request.param}")(str(path))
    return str(path)


def test_every_kind_of_file_is_read(file):
    train, evaluation = data_of(make_parser("vapo"), "--dataset_name", file)
    assert train["prompt"] == [row["prompt"] for row in ROWS] and evaluation is None


PARSERS = {name: (lambda name=name: make_parser(name)) for name in METHODS} | {"genac-traces": genac_traces.make_parser}


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


@pytest.mark.parametrize("name", PARSERS)
def test_every_command_takes_a_file(name, jsonl):
    train, _ = data_of(PARSERS[name](), "--dataset_name", jsonl)
    assert len(train) == len(ROWS)


def test_the_command_for_traces_takes_a_file(jsonl):
    argv = ("--dataset_name", jsonl)
    train, _ = data_of(genac_sft.make_parser(), *argv, run=run_sft_script, base=SFTTrainer)
    assert train["completion"] == [row["completion"] for row in ROWS]


def test_a_part_of_a_file_is_for_evaluation_if_asked(jsonl):
    asked = ("--eval_strategy", "steps", "--test_split_size", "0.25")
    train, evaluation = data_of(make_parser("sppo"), "--dataset_name", jsonl, *asked)
    assert (len(train), len(evaluation)) == (6, 2)


def test_a_file_may_be_streamed(jsonl):
    train, _ = data_of(make_parser("vapo"), "--dataset_name", jsonl, "--dataset_streaming")
    assert not hasattr(train, "__len__") and next(iter(train))["prompt"] == "0 + 1 ="


def test_a_folder_is_read_as_before(jsonl):
    assert reader_of(str(Path(jsonl).parent)) is None and reader_of("trl-lib/DeepMath-103K") is None
    train, _ = data_of(make_parser("vapo"), "--dataset_name", str(Path(jsonl).parent))
    assert len(train) == len(ROWS)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    missing = str(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="there is no file .*none.jsonl"):
        run_grpo_script(GRPOTrainer, *make_parser("vapo").parse_args_and_config([*BASE, "--dataset_name", missing]))
