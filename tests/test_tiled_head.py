"""Log-probabilities of a critic's answers without their logits: the same numbers, and which networks have them."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from genac_runs import fit_critic, make_trainer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_packed import completions, tiny_model, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

from trl_credit.critics.generative import packed
from trl_credit.critics.generative.packed import answer_log_probs, plan_rows
from trl_credit.seam import lm_head
from trl_credit.seam.lm_head import tiled_lm_head, why_not_tiled


# What an architecture does with its logits, at strengths that cannot be missed.
HEADS = {
    "qwen2": {},
    "tied": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gpt_neox": {},
}


def model_of(head, **more):
    architecture = "qwen2" if head == "tied" else head
    if architecture == "qwen2":
        return tiny_model(architecture, **HEADS[head], **more)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=259,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        pad_token_id=None,
        **HEADS[head],
        **more,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def found(model, monkeypatch, tiles: bool):
    """Log-probabilities of all answers and the gradients of a sum of them."""
    with monkeypatch.context() as patch:
        if not tiles:
            patch.setattr(packed, "why_not_tiled", lambda network: "the test asks for logits")
        queries, answers = completions()
        rows = [row for batch in plan_rows(queries, answers, 1000, packed=False) for row in batch]
        log_probs, present = answer_log_probs(model, rows, 0.7)
    return log_probs.detach(), with_gradients(model, dict(enumerate(log_probs * present)))


@pytest.mark.parametrize("head", HEADS)
def test_tiles_have_the_log_probabilities_and_gradients_of_logits(head, monkeypatch):
    model = model_of(head)
    assert why_not_tiled(model) is None
    monkeypatch.setattr(lm_head, "_WORDS_ON_CPU", 100)  # of 259: three tiles, the last of them narrow
    expected, gradients = found(model, monkeypatch, tiles=False)
    actual, others = found(model, monkeypatch, tiles=True)
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert others.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert (others[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-8, name


def test_adapters_below_the_head_are_trained_on_tiles(monkeypatch):
    model = get_peft_model(model_of("qwen2"), LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    assert why_not_tiled(model) is None
    expected, gradients = found(model, monkeypatch, tiles=False)
    actual, others = found(model, monkeypatch, tiles=True)
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert others.keys() == gradients.keys() and all("lora" in name for name in gradients)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-8, name


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("tiles", [True, False])
def test_no_tensor_of_an_update_is_as_large_as_the_logits(tiles, monkeypatch):
    words = 20_000
    model = tiny_model("qwen2", vocab_size=words)
    queries, answers = completions()
    (rows,) = plan_rows(queries, answers, 1000)
    logits = sum(row.answer_tokens for row in rows) * words
    monkeypatch.setattr(lm_head, "_WORDS_ON_CPU", 500)
    if not tiles:
        monkeypatch.setattr(packed, "why_not_tiled", lambda network: "the test asks for logits")
    with Largest() as largest:
        answer_log_probs(model, rows)[0].sum().backward()
    assert (largest.elements < logits / 3) is tiles


def test_the_network_is_afterwards_as_it_was():
    model = tiny_model("qwen2")
    before, words = model.forward, lm_head.trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    with pytest.raises(ZeroDivisionError), tiled_lm_head(model, 1.0):
        assert lm_head.trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE == lm_head._WORDS_ON_CPU
        1 / 0  # noqa: B018
    assert model.forward == before and "forward" not in vars(model)
    assert words == lm_head.trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    mine = model.forward = lambda *args, **kwargs: None
    with tiled_lm_head(model, 1.0):
        pass
    assert model.forward is mine


class FromTheHub(Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def with_lora_on_the_head():
    config = LoraConfig(target_modules=["lm_head", "q_proj"], r=4, init_lora_weights=False)
    return get_peft_model(tiny_model("qwen2"), config)


def with_prompt_tuning():
    return get_peft_model(tiny_model("qwen2"), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3))


def recurrent_gemma():
    config = AutoConfig.for_model(
        "recurrent_gemma",
        vocab_size=259,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        logits_soft_cap=2.0,
    )
    return AutoModelForCausalLM.from_config(config)


def bert():
    config = AutoConfig.for_model(
        "bert", vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config.is_decoder = True
    return AutoModelForCausalLM.from_config(config)


OTHERS = {
    "code of its own": (lambda: FromTheHub(tiny_model("qwen2").config), "what FromTheHub does with its logits"),
    "LoRA on the head": (with_lora_on_the_head, "its language-model head is a Linear"),
    "prompt tuning": (with_prompt_tuning, "PROMPT_TUNING puts tokens of its own in front"),
    "a cap that TRL does not know": (recurrent_gemma, "changes its logits by `logits_soft_cap`"),
    "layers above the backbone": (bert, "BertLMHeadModel is more than a backbone and a language-model head"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_without_tiles_says_why(name):
    make, reason = OTHERS[name]
    assert reason in why_not_tiled(make())


def test_adapters_on_the_head_are_part_of_the_log_probabilities(monkeypatch):
    """TRL's head would read the weights under them."""
    model = with_lora_on_the_head()
    queries, answers = completions()
    (rows,) = plan_rows(queries, answers, 1000)
    log_probs, present = answer_log_probs(model, rows)
    monkeypatch.setattr(packed, "why_not_tiled", lambda network: None)
    below, _ = answer_log_probs(model, rows)
    assert (log_probs - below)[present].abs().max() > 0.1
    log_probs.sum().backward()
    assert any("lm_head" in name and p.grad is not None and p.grad.any() for name, p in model.named_parameters())


def test_a_critic_without_tiles_is_warned_of_by_name(model_dir, tmp_path, caplog):
    critic = fit_critic(tmp_path / "critic")
    trainer = make_trainer(model_dir, tmp_path / "plain", critic=critic)
    assert "16 bytes" not in caplog.text
    lora = {"target_modules": ["lm_head", "q_proj"], "r": 4}
    trainer = make_trainer(model_dir, tmp_path / "lora", critic=critic, critic_peft_config=lora)
    assert "16 bytes" in caplog.text and "its language-model head is a Linear" in caplog.text
    trainer.train()
    assert trainer.engine.steps > 0


def test_every_change_of_logits_in_transformers_is_one_that_is_known():
    """Read off the source of all causal language models."""
    known = {"final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"}
    known |= set(lm_head._UNKNOWN_TRANSFORMS)
    changes = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        for model in re.findall(r"\nclass \w+(?:ForCausalLM|LMHeadModel)\(.*?(?=\nclass |\Z)", text, re.DOTALL):
            changes |= set(re.findall(r"self\.(?:config\.|model\.)?(\w*(?:cap|scal|multipl|unpad)\w*)\b", model))
    assert known | {"logit_softcap"} >= changes  # a module of one that also has an `unpadded_vocab_size`
    assert len(known & changes) >= 7
