"""Packed answers of a critic that two processes train, started for real with gloo."""

import pytest
from launch import BIN, TESTS, run
from safetensors.torch import load_file
from test_packed import assert_close, completions, text_by_text, tiny_model


pytestmark = pytest.mark.distributed


def test_two_processes_with_uneven_shares_have_the_gradients_of_one_with_separate_texts(tmp_path):
    script = [TESTS / "distributed" / "packed_worker.py", tmp_path / "gradients.safetensors"]
    run([BIN / "torchrun", "--standalone", "--nproc-per-node", 2, *script])
    actual = load_file(tmp_path / "gradients.safetensors")
    assert actual.pop("processes") == 2 and actual.pop("empty") > 0

    model = tiny_model("qwen3")
    queries, answers = completions()
    (-sum(values.sum() for values in text_by_text(model, queries, answers, 0.7).values())).backward()
    assert_close(actual, {name: p.grad for name, p in model.named_parameters()})
