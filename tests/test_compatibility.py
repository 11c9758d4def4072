"""Every trainer with what people run it with, each shown to be on: cells of `docs/compatibility.md`."""

import importlib.resources
import json
from unittest.mock import patch

import genac_runs
import pytest
import torch
from datasets import Dataset
from test_trl_options import Counter, lora, multiply
from tiny import tiny_model_dir, tiny_vision_language_model
from vapo_runs import PROMPTS

from trl_credit.methods import METHODS


pytestmark = pytest.mark.slow

SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 8,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": [],
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
TOKEN_CRITIC = {"critic_pretraining_steps": 0, "critic_learning_rate": 1e-2, "critic_initial_value": 0.5}
SETTINGS_OF = {
    "grpo-lambda": {"trace_lambda": 0.9},
    "vineppo": {"vine_continuations": 2, "segment_min_length": 2, "segment_target_length": 3, "segment_max_length": 4},
    "vapo": TOKEN_CRITIC,
    "sao": {**TOKEN_CRITIC, "critic_freeze": None},
    "bpco": {**TOKEN_CRITIC, "critic_initial_value": 0.9},
    "sppo": TOKEN_CRITIC,
    "genac": {**genac_runs.GENAC, "critic_pretraining_steps": 0, "critic_learning_rate": 1e-2},
}
WITH_CRITIC = [name for name in SETTINGS_OF if name not in ("grpo-lambda", "vineppo")]
ADAPTERS = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def share_of_even(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def critic_of_genac(tmp_path_factory):
    return genac_runs.fit_critic(tmp_path_factory.mktemp("critic"))


@pytest.fixture
def make(critic_of_genac, tmp_path):
    """Makes a trainer by the name of its command. `inputs` of it are what its losses were computed for."""

    def make(
        name, model, folder="out", reward_funcs=share_of_even, prompts=PROMPTS, data=None, trainer=None, **settings
    ):
        config_class, trainer_class = METHODS[name].load()

        class Recorder(trainer_class):
            def _compute_loss(self, model, inputs):
                networks = [self.model] + ([self.critic] if name in WITH_CRITIC else [])
                on = [any(getattr(m, "gradient_checkpointing", False) for m in n.modules()) for n in networks]
                self.__dict__.setdefault("inputs", []).append(inputs)
                self.__dict__.setdefault("checkpointing", []).append(on)
                return super()._compute_loss(model, inputs)

        arguments = dict(trainer or {})
        if name == "genac":
            arguments.setdefault("critic", critic_of_genac)
        return Recorder(
            model=model,
            reward_funcs=reward_funcs,
            args=config_class(str(tmp_path / folder), **{**SETTINGS, **SETTINGS_OF[name], **settings}),
            train_dataset=Dataset.from_dict({"prompt": prompts}) if data is None else data,
            **arguments,
        )

    return make


def weights_of(trainer) -> dict[str, torch.Tensor]:
    networks = {"policy": trainer.model} | ({"critic": trainer.critic} if hasattr(trainer, "critic") else {})
    return {
        f"{which}.{name}": p.detach().clone()
        for which, network in networks.items()
        for name, p in network.named_parameters()
    }


def train(trainer, **kwargs) -> set[str]:
    """Names of the parameters that moved."""
    before = weights_of(trainer)
    trainer.train(**kwargs)
    after = weights_of(trainer)
    assert all(weight.isfinite().all() for weight in after.values())
    return {name for name, weight in after.items() if not weight.equal(before[name])}


def history(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def names_of(network, prefix) -> set[str]:
    return {f"{prefix}.{name}" for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_one_process_moves_every_weight_of_every_network(name, make, model_dir):
    trainer = make(name, model_dir)
    assert trainer.accelerator.num_processes == 1
    moved = train(trainer)
    expected = names_of(trainer.model, "policy") | (
        names_of(trainer.critic, "critic") if name in WITH_CRITIC else set()
    )
    assert moved == expected
    assert len(history(trainer)) == 2 and all(entry["grad_norm"] > 0 for entry in history(trainer))


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_lora_trains_the_adapters_of_the_policy_alone(name, make, model_dir):
    trainer = make(name, model_dir, trainer={"peft_config": lora()})
    moved = {weight for weight in train(trainer) if weight.startswith("policy")}
    assert moved == names_of(trainer.model, "policy")
    assert len(moved) == 8 and all("lora_" in weight for weight in moved)


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_lora_trains_the_adapters_and_the_head_of_the_critic_alone(name, make, model_dir):
    # A head of zero has to move first, then the B of an adapter, then its A.
    trainer = make(name, model_dir, critic_peft_config=ADAPTERS, max_steps=3)
    moved = {weight for weight in train(trainer) if weight.startswith("critic")}
    assert moved == names_of(trainer.critic, "critic")
    heads = {weight for weight in moved if "lora_" not in weight}
    assert len(moved) - len(heads) == 8 and all("score" in weight for weight in heads)
    assert bool(heads) == (name != "genac")


@pytest.mark.parametrize("name", [name for name in WITH_CRITIC if name != "genac"])
def test_critic_and_policy_share_a_base_in_memory(name, make, model_dir):
    trainer = make(name, model_dir, critic_share_base=True, max_steps=3, trainer={"peft_config": lora()})
    policy = {p.data_ptr() for p in trainer.model.parameters() if not p.requires_grad}
    critic = [p for name, p in trainer.critic.named_parameters() if "layers" in name and not p.requires_grad]
    assert critic and {p.data_ptr() for p in critic} <= policy
    moved = train(trainer)
    assert moved == names_of(trainer.model, "policy") | names_of(trainer.critic, "critic")


def test_genac_has_no_base_to_share(make, model_dir):
    with pytest.raises(ValueError, match="critic_share_base"):
        make("genac", model_dir, critic_share_base=True, trainer={"peft_config": lora()})


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_qlora_trains_the_adapters_over_four_bits(name, make, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which is not installed")
    from transformers import BitsAndBytesConfig

    model_dir = str(tiny_model_dir(tmp_path, hidden=64))
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    trainer = make(name, model_dir, trainer={"peft_config": lora(), "quantization_config": four_bits})
    packed = [m for m in trainer.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 2 * 7 and all(m.weight.dtype == torch.uint8 for m in packed)
    moved = {weight for weight in train(trainer) if weight.startswith("policy")}
    assert len(moved) == 8 and all("lora_" in weight for weight in moved)


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_gradient_checkpointing_is_on_in_every_network_and_changes_nothing(name, make, model_dir):
    weights = []
    for on in (True, False):
        train(trainer := make(name, model_dir, str(on), gradient_checkpointing=on, optim="sgd"))
        assert trainer.checkpointing and all({*networks} == {on} for networks in trainer.checkpointing)
        weights.append(weights_of(trainer).values())
    for weight, other in zip(*weights, strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_experts_and_their_router_train_with_the_routers_loss(name, make, moe_dir):
    trainer = make(name, moe_dir)
    moved = train(trainer)
    assert all(entry["aux_loss"] > 1 for entry in history(trainer))
    assert any("expert" in weight and weight.startswith("policy") for weight in moved)


@pytest.mark.parametrize("name", ["sao", "bpco"])
def test_a_vision_language_policy_is_refused(name, make):
    processor, model = tiny_vision_language_model()
    with pytest.raises(ValueError, match="is read with a LlavaProcessor, .* and the critic reads text only"):
        make(name, model, trainer={"processing_class": processor})


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_a_rollout_function_makes_the_rollouts(name, make, model_dir):
    def own_rollout(prompts, trainer):
        ids = [[70 + i, 71, 72, 73, trainer.processing_class.eos_token_id] for i in range(len(prompts))]
        return {"prompt_ids": [[65, 66]] * len(prompts), "completion_ids": ids, "logprobs": None}

    trainer = make(name, model_dir, trainer={"rollout_func": own_rollout})
    assert any(weight.startswith("policy") for weight in train(trainer))
    for inputs in trainer.inputs:
        assert inputs["completion_ids"][:, 1:4].tolist() == [[71, 72, 73]] * 4
        assert sorted(inputs["completion_ids"][:, 0].tolist()) == [70, 71, 72, 73]


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_data_that_are_streamed_train_as_data_that_are_not(name, make, model_dir):
    data = Dataset.from_dict({"prompt": PROMPTS})
    train(plain := make(name, model_dir, "plain", data=data, shuffle_dataset=False))
    train(streamed := make(name, model_dir, "streamed", data=data.to_iterable_dataset(), shuffle_dataset=False))
    assert [entry["loss"] for entry in history(plain)] == [entry["loss"] for entry in history(streamed)]
    for weight, other in zip(weights_of(plain).values(), weights_of(streamed).values(), strict=True):
        assert weight.equal(other)


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_an_evaluation_generates_and_is_logged_and_moves_nothing(name, make, model_dir):
    held_out = Dataset.from_dict({"prompt": PROMPTS[:2]})
    trainer = make(name, model_dir, per_device_eval_batch_size=4, trainer={"eval_dataset": held_out})
    before = weights_of(trainer)
    metrics = trainer.evaluate()
    assert all(weight.equal(before[name]) for name, weight in weights_of(trainer).items())
    (inputs,) = trainer.inputs
    assert inputs["prompt_ids"].unique(dim=0).shape[0] == 2
    assert {"eval_loss", "eval_reward", "eval_rewards/unscored"} <= set(metrics) | set(trainer.state.log_history[-1])


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_a_rollout_is_learnt_from_twice(name, make, model_dir):
    trainer = make(name, model_dir, num_iterations=2, max_steps=4)
    train(trainer)
    assert ["num_tokens" in entry for entry in history(trainer)] == [True, False, True, False]
    first, second = trainer.inputs[:2]
    assert first["completion_ids"].equal(second["completion_ids"])


@pytest.mark.parametrize("name", SETTINGS_OF)
def test_a_resumed_run_is_the_run_to_the_bit(name, make, model_dir, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_generations": 2}
    whole = make(name, model_dir, **settings)
    train(whole)
    resumed = make(name, model_dir, **settings)
    train(resumed, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert len(resumed.inputs) == 2 and len(whole.inputs) == 4
    for (weight, p), q in zip(weights_of(whole).items(), weights_of(resumed).values(), strict=True):
        assert p.equal(q), weight


# --- Tools and environments


def train_with_tools(name, make, tmp_path, call: dict, reward_funcs=None, **arguments):
    """A step on completions of which the first of each pair begins with a call, written for the model."""
    template = (importlib.resources.files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    model_dir = str(tiny_model_dir(tmp_path, chat_template=template, max_position_embeddings=2048))
    trainer = make(
        name,
        model_dir,
        reward_funcs=reward_funcs,
        prompts=[[{"role": "user", "content": "Go."}]] * 4,
        max_steps=1,
        max_completion_length=160,
        trainer=arguments,
    )
    tokenizer, generate = trainer.processing_class, trainer.model.generate
    text = f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>"

    def write(input_ids, **kwargs):
        if len(input_ids) < 4:  # after the tool has answered
            return generate(input_ids, **kwargs)
        answers = [text if row % 2 == 0 else "No.<|im_end|>" for row in range(len(input_ids))]
        ids = tokenizer(answers, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, ids], 1)

    with patch.object(trainer.model, "generate", write):
        moved = train(trainer)
    assert any(weight.startswith("policy") for weight in moved)
    (inputs,), (entry,) = trainer.inputs, history(trainer)
    assert (entry["tools/call_frequency"], entry["tools/failure_frequency"]) == (0.5, 0.0)
    assert ((inputs["completion_mask"] * (1 - inputs["tool_mask"])).sum(1) > 0).sum() == 2, "the tool's answer"
    if inputs["advantages"].dim() == 2:
        assert not inputs["advantages"][inputs["tool_mask"] == 0].any()
    return trainer, entry


@pytest.mark.parametrize("name", [name for name in SETTINGS_OF if name != "vineppo"])
def test_a_tool_is_called_and_its_answer_is_not_trained_on(name, make, tmp_path):
    def calls_a_tool(completions, **kwargs):
        return [float(any(message["role"] == "tool" for message in completion)) for completion in completions]

    call = {"name": "multiply", "arguments": {"a": 6, "b": 7}}
    trainer, entry = train_with_tools(name, make, tmp_path, call, calls_a_tool, tools=[multiply])
    answers = [m["content"] for completion in trainer._logs["completion"] for m in completion if m["role"] == "tool"]
    assert answers == ["42", "42"] and entry["reward"] == 0.5


@pytest.mark.parametrize("name", [name for name in SETTINGS_OF if name != "vineppo"])
def test_an_environment_gives_the_tools_and_the_reward(name, make, tmp_path):
    call = {"name": "add", "arguments": {"amount": 1}}
    _, entry = train_with_tools(name, make, tmp_path, call, environment_factory=Counter)
    assert entry["rewards/Counter/mean"] == 0.5


def test_vineppo_refuses_an_environment(make, tmp_path):
    template = (importlib.resources.files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="scores continuations of completions, in which nothing runs `tools`"):
        make(
            "vineppo",
            str(tiny_model_dir(tmp_path, chat_template=template)),
            reward_funcs=None,
            prompts=[[{"role": "user", "content": "Go."}]] * 4,
            trainer={"environment_factory": Counter},
        )
