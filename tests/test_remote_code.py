"""Code that comes with a critic's checkpoint is run when the user says so, and never otherwise."""

import json

import genac_runs
import pytest
import sppo_runs
import transformers
import vapo_runs
from tiny import tiny_tokenizer
from transformers import AutoConfig

from trl_credit.critics.loading import load_critic


MAKE = {"vapo": vapo_runs.make_trainer, "sppo": sppo_runs.make_trainer, "genac": genac_runs.make_trainer}


@pytest.fixture(params=["model", "tokenizer"])
def trapped(request, tmp_path, monkeypatch):
    """A checkpoint whose own classes leave a mark where they are imported, and the mark."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "checkpoint", tmp_path / "mark"
    genac_runs.fit_critic(folder)
    (folder / "trap.py").write_text(f"open({str(mark)!r}, 'w').write('run')\n")
    if request.param == "model":
        file, classes = "config.json", {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
        classes["AutoModelForTokenClassification"] = "trap.Model"
    else:
        file, classes = "tokenizer_config.json", {"AutoTokenizer": ["trap.Tokenizer", "trap.Tokenizer"]}
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, "auto_map": classes}))
    return request.param, str(folder), mark


@pytest.mark.parametrize("name", MAKE)
def test_a_trainer_runs_no_code_of_its_critic(name, trapped, model_dir, tmp_path):
    what, folder, mark = trapped
    MAKE[name](model_dir, tmp_path / "run", critic=folder)
    assert not mark.exists()
    if (what, name) == ("tokenizer", "vapo"):  # which reads the policy's tokens
        return
    with pytest.raises(AttributeError, match="trap"):  # there is no such class in it
        MAKE[name](model_dir, tmp_path / "run", critic=folder, critic_model_init_kwargs={"trust_remote_code": True})
    assert mark.read_text() == "run"


@pytest.mark.parametrize("kind", ["token", "prompt", "generative"])
def test_a_report_runs_no_code_of_a_critic(kind, trapped, monkeypatch):
    what, folder, mark = trapped
    if kind != "generative":
        monkeypatch.setattr(f"trl_credit.critics.{kind}.refuse_causal_lm", lambda path: None)
    load_critic(folder, tiny_tokenizer(), kind)
    assert not mark.exists()
    if what == "model":
        with pytest.raises(AttributeError):
            AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert mark.exists(), "the trap is one"
