"""Adapters of a critic where ZeRO-3 wants one dtype for all weights."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_model
from transformers import AutoModelForTokenClassification
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from trl_credit.critics.generative.network import make_generative_critic
from trl_credit.critics.token import add_saved_adapters, finish_token_critic


pytest.importorskip("deepspeed")


LORA = LoraConfig(r=2, target_modules="all-linear")


@contextmanager
def zero_3():
    # By this transformers knows that a run is one of ZeRO-3, as long as it lives.
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    yield
    del config


def value_network():
    return AutoModelForTokenClassification.from_config(tiny_model().config, dtype=torch.bfloat16)


@pytest.fixture
def critics(tmp_path):
    """What makes a critic with adapters on a base in bfloat16, as it is already in memory."""
    finish_token_critic(value_network(), peft_config=LORA).save_pretrained(tmp_path)
    fresh, saved, generative = value_network(), value_network(), tiny_model().bfloat16()
    return {
        "fresh": lambda: finish_token_critic(fresh, peft_config=LORA),
        "saved": lambda: add_saved_adapters(saved, tmp_path),
        "generative": lambda: make_generative_critic(generative, LORA),
    }


@pytest.mark.parametrize("critic", ["fresh", "saved", "generative"])
@pytest.mark.parametrize(("engine", "dtype"), [(nullcontext, torch.float32), (zero_3, torch.bfloat16)])
def test_14_adapters_are_float32_but_under_zero_3_as_the_base(critic, engine, dtype, critics):
    with engine():
        network = critics[critic]()
    assert {p.dtype for name, p in network.named_parameters() if "lora_" in name} == {dtype}
