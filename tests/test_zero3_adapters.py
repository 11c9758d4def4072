"""Adapters of a critic where ZeRO-3 wants one dtype for all weights."""

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_model
from transformers import AutoModelForTokenClassification
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from trl_credit.critics.token import finish_token_critic


pytest.importorskip("deepspeed")


@pytest.mark.parametrize("zero_3", [False, True])
def test_14_adapters_are_float32_but_under_zero_3_as_the_base(zero_3):
    network = AutoModelForTokenClassification.from_config(tiny_model().config, dtype=torch.bfloat16)
    # By this transformers knows that a run is one of ZeRO-3, as long as it lives.
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}}) if zero_3 else None
    try:
        critic = finish_token_critic(network, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    finally:
        del config
    dtypes = {p.dtype for name, p in critic.named_parameters() if "lora_" in name}
    assert dtypes == {torch.bfloat16 if zero_3 else torch.float32}
