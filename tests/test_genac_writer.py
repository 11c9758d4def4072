"""What writes the critic's answers, and what is said about it before a run."""

import logging

import pytest
import torch
from genac_runs import fit_critic, make_trainer
from tiny import tiny_model
from trl.generation.vllm_generation import VLLMGeneration

from trl_credit import GenACConfig
from trl_credit.critics.generative.branch_mask import attending, attention_of, takes_flex_attention
from trl_credit.seam.lent_engine import LentEngine, why_not_lent


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return fit_critic(tmp_path_factory.mktemp("critic"))


def config(**settings):
    return GenACConfig("out", use_cpu=True, bf16=False, report_to=[], **settings)


def test_without_vllm_transformers_writes(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic)
    assert trainer.writer.vllm is None and trainer.writer.reads_prefixes_once
    trainer = make_trainer(model_dir, tmp_path, critic=critic, critic_use_vllm=True)
    assert trainer.writer.vllm == "colocate", "there is no engine of the policy"


def test_the_policys_engine_is_refused_where_there_is_none(model_dir, critic, tmp_path):
    with pytest.raises(ValueError, match="`critic_vllm_mode='policy'` cannot be: the policy does not use vLLM"):
        make_trainer(model_dir, tmp_path, critic=critic, critic_vllm_mode="policy")


def test_an_engine_is_lent_to_models_that_it_could_have_been_built_for():
    policy = tiny_model(hidden=32)
    assert why_not_lent(policy, tiny_model(hidden=32, seed=1, initializer_range=0.1)) is None
    assert "hidden_size" in why_not_lent(policy, tiny_model(hidden=16))
    assert "rope" in why_not_lent(
        policy, tiny_model(hidden=32, rope_parameters={"rope_type": "default", "rope_theta": 7})
    )
    assert "architecture is not the policy's" in why_not_lent(policy, tiny_model("llama", hidden=32))
    policy.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert why_not_lent(policy, tiny_model(hidden=32)) == "the policy is quantized"


def test_what_the_policys_engine_writes_for_the_critic_costs_the_policy_its_weights_there(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic)
    loaded = []
    # TRL's own class, over an engine that only takes weights.
    owner = object.__new__(VLLMGeneration)
    owner.mode, owner.tensor_parallel_size, owner.enable_sleep_mode = "colocate", 1, True
    owner._llm_weights_sleeping, owner.llm = False, Engine(loaded)
    trainer.vllm_generation, trainer._last_loaded_step = owner, trainer.state.global_step
    network = trainer.critic
    lent = trainer.vllm_of_policy(network, trainer.critic_processing_class, temperature=1.0)
    assert isinstance(lent, LentEngine) and lent.llm is owner.llm
    lent.sync_weights()
    assert trainer._last_loaded_step == -1, "TRL loads the policy again, before it generates"
    assert dict(loaded).keys() == dict(network.named_parameters()).keys()
    assert all(torch.equal(weight, network.get_parameter(name)) for name, weight in loaded)


class Engine:
    """As much of vLLM as a sync needs."""

    def __init__(self, loaded: list):
        self.load_weights = loaded.extend
        self.llm_engine = self.model_executor = self.driver_worker = self.model_runner = self.model = self

    def wake_up(self, tags):
        pass

    def reset_prefix_cache(self):
        pass


def test_a_run_is_warned_where_answers_by_transformers_will_take_most_of_a_step(model_dir, critic, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(model_dir, tmp_path, critic=critic)
    assert "written by transformers" not in caplog.text, "completions of a few states"
    long = {"max_completion_length": 1200, "segment_target_length": 60, "segment_max_length": 120}
    long |= {"critic_max_completion_length": 300}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(model_dir, tmp_path, critic=critic, **long)
    head = len(trainer.critic_processing_class(trainer.question.template)["input_ids"])
    assert "1200 tokens has about 20 states; what they share is read once" in caplog.text
    assert f"{(head + 1200) / 1200:.1f} times its tokens, and up to 5.0 times its tokens are written" in caplog.text


def test_a_critic_that_cannot_share_is_said_to_read_each_prompt_in_full(model_dir, tmp_path, caplog):
    sliding = tiny_model(hidden=32, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    long = {"max_completion_length": 1200, "segment_target_length": 60, "segment_max_length": 120}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(model_dir, tmp_path, critic=sliding, critic_packing=False, **long)
    head = len(trainer.critic_processing_class(trainer.question.template)["input_ids"])
    assert f"each reads its prompt in full, {20 * (head + 600) / 1200:.1f} times its tokens" in caplog.text


def test_flex_attention_is_for_updates_alone_and_not_for_what_does_not_take_it(model_dir, critic, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic=critic)
    assert trainer._update_attention is None, "there is no GPU"
    network = trainer.critic
    assert takes_flex_attention(network) and attention_of(network) == "sdpa"
    with attending(network, "flex_attention"):
        assert attention_of(network) == "flex_attention"
        assert all(layer.self_attn.config._attn_implementation == "flex_attention" for layer in network.model.layers)
    assert attention_of(network) == "sdpa"
    with attending(network, None):
        assert attention_of(network) == "sdpa"


@pytest.mark.parametrize("option", ["critic_vllm_gpu_memory_utilization", "critic_vllm_max_model_length"])
def test_options_of_an_engine_of_its_own_need_that_engine(option):
    value = 0.5 if "memory" in option else 512
    with pytest.raises(ValueError, match=f"`{option}={value}` has no effect with `critic_vllm_mode=None`"):
        config(use_vllm=True, **{option: value})
    assert getattr(config(critic_vllm_mode="colocate", **{option: value}), option) == value
