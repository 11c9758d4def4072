"""
The canary for what a critic needs of TRL and transformers beyond `test_seam.py`: each check says which name moved, and
is shown to by moving it.
"""

import inspect
import types

import pytest
import torch
import trl
from datasets import Dataset
from tiny import tiny_model_dir
from transformers import TrainerCallback
from trl.trainer import utils

from trl_credit.seam import CreditConfig
from trl_credit.seam.versions import HAS_TILED_HEAD, unwrapped_for_generation


SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_generations": 2,
    "max_completion_length": 4,
    "max_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(tiny_model_dir(tmp_path_factory.mktemp("model"), layers=1))


def run(model_dir, out, **moved):
    """Train and save with TRL's trainer, and keep the calls; `moved` methods are TRL's under another behaviour."""
    calls = []
    names = (
        "training_step",
        "_prepare_inputs",
        "_get_train_sampler",
        "save_model",
        "_save_checkpoint",
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "_load_from_checkpoint",
    )

    def remember(name):
        original = moved.get(name) or getattr(trl.GRPOTrainer, name)

        def method(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            calls.append((name, args, kwargs, result))
            return result

        return method

    def reward(completions, **kwargs):
        calls.append(("reward", (), kwargs, None))
        return [0.5] * len(completions)

    trainer = type("Watched", (trl.GRPOTrainer,), {name: remember(name) for name in names})(
        model=model_dir,
        reward_funcs=reward,
        args=trl.GRPOConfig(str(out), **SETTINGS),
        train_dataset=Dataset.from_dict({"prompt": ["ab", "cde", "f", "gh"]}),
    )

    class AtTheEndOfAStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            calls.append(("on_step_end", (), {}, all(p.grad is None for p in trainer.model.parameters())))

    trainer.callback_handler.callbacks.insert(0, AtTheEndOfAStep())
    trainer.train()
    first = list(calls)
    trainer.args.max_steps = 2
    trainer.train(resume_from_checkpoint=True)
    return types.SimpleNamespace(trainer=trainer, calls=first, resumed=calls[len(first) :])


def missing(seen) -> list[str]:
    """What is not as the seam needs it, by name."""
    trainer, wrong = seen.trainer, []

    def need(holds, name):
        if not holds:
            wrong.append(name)

    def of(name, calls=seen.calls):
        return [call for call in calls if call[0] == name]

    batches = getattr(trainer, "_buffered_inputs", None)
    need(isinstance(batches, list) and len(batches) == 4, "_buffered_inputs")
    need(getattr(trainer, "_step", None) == 2 * 2, "_step: micro-batches that were trained on")
    steps, inputs = of("training_step"), of("_prepare_inputs")
    need(len(steps) == 2, "training_step: once a micro-batch")
    need([call[3] for call in of("on_step_end")] == [True], "on_step_end: once a step, without the policy's gradient")
    need(len(inputs) == len(steps) == 2, "_prepare_inputs: once a training step")
    need(all("num_items_in_batch" in call[3] for call in inputs), "num_items_in_batch")
    need(bool(of("_get_train_sampler")), "_get_train_sampler")
    folder = str(trainer.args.output_dir)
    saved = of("_save_checkpoint")
    need(
        saved and list(inspect.signature(trl.GRPOTrainer._save_checkpoint).parameters) == ["self", "model", "trial"],
        "_save_checkpoint",
    )
    saves = of("save_model")
    need(
        bool(saves) and saves[0][1][0] == f"{folder}/checkpoint-1" and saves[0][2] == {"_internal_call": True},
        "save_model",
    )
    need(trainer._get_output_dir(trial=None) == folder, "_get_output_dir")
    pushes = list(inspect.signature(trl.GRPOTrainer._push_from_checkpoint).parameters) == ["self", "checkpoint_folder"]
    need(pushes, "_push_from_checkpoint")
    need(list(inspect.signature(trl.GRPOTrainer.train).parameters)[1] == "resume_from_checkpoint", "train")
    loaded = of("_load_optimizer_and_scheduler", seen.resumed)
    need(bool(loaded) and loaded[0][1][0].endswith("checkpoint-1"), "_load_optimizer_and_scheduler")
    need(bool(of("_load_rng_state", seen.resumed)), "_load_rng_state")
    weights = of("_load_from_checkpoint", seen.resumed)
    need(bool(weights) and weights[0][1][0].endswith("checkpoint-1"), "_load_from_checkpoint")
    need("extra" in getattr(trainer, "_logs", {}), "_logs: extra")
    need(all(call[2].get("completion_ids") for call in of("reward")), "reward functions: completion_ids")
    need(trainer.log_completions is False, "log_completions")
    need(getattr(trainer.args, "chat_template_kwargs", 0) is None, "chat_template_kwargs")
    need(getattr(trainer, "environment_factories", 0) is None and trainer.tools == [], "environment_factories, tools")
    need(len(next(iter(trainer.get_train_dataloader()))) == 2 * 4, "get_train_dataloader")
    need(
        hasattr(trainer, "_tokenizer") and trainer.num_generations_eval == trainer.num_iterations + 1 == 2, "attributes"
    )

    # The token mean of `dapo` is divided by `num_items_in_batch`, shared out over the steps of a generation batch.
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    batch = {**inputs[0][3], "advantages": torch.tensor([1.0, -0.5])}
    loss = trainer._compute_loss(trainer.model, dict(batch)).item()
    half = trainer._compute_loss(trainer.model, {**batch, "num_items_in_batch": batch["num_items_in_batch"] * 2}).item()
    tokens = batch["completion_mask"].sum() / 4
    expected = -(batch["advantages"] * batch["completion_mask"].sum(1)).sum() / (batch["num_items_in_batch"] / 2)
    need(half == pytest.approx(loss / 2) and loss == pytest.approx(expected.item(), abs=1e-6) and tokens > 0, "dapo")

    rollout = {"values": torch.arange(8.0).view(4, 2), "ids": torch.arange(4), "count": torch.tensor(3)}
    parts = utils.split_tensor_dict(utils.shuffle_sequence_dict(rollout), 2)
    same = all(torch.equal(part["values"][:, 0], 2.0 * part["ids"]) for part in parts)
    need(len(parts) == 2 and same and parts[0]["count"] == 3, "shuffle_sequence_dict, split_tensor_dict")
    return wrong


def test_what_a_critic_needs_is_there(model_dir, tmp_path):
    assert missing(run(model_dir, tmp_path)) == []


def test_load_best_model_is_what_loads_the_best_model_when_the_training_ends():
    assert "_load_best_model" in trl.GRPOTrainer._finalize_training.__code__.co_names
    assert list(inspect.signature(trl.GRPOTrainer._load_best_model).parameters) == ["self"]


def test_a_name_that_moves_is_named(model_dir, tmp_path, monkeypatch):
    seen = run(model_dir, tmp_path)
    names = ("training_step", "on_step_end", "_prepare_inputs", "_get_train_sampler", "save_model", "_save_checkpoint")
    for name in names:
        without = types.SimpleNamespace(**{**vars(seen), "calls": [call for call in seen.calls if call[0] != name]})
        if name != "_prepare_inputs":  # the loss is computed on its result
            assert any(name in wrong for wrong in missing(without)), name
    for name in ("_load_optimizer_and_scheduler", "_load_rng_state", "_load_from_checkpoint"):
        rest = [call for call in seen.resumed if call[0] != name]
        assert name in missing(types.SimpleNamespace(**{**vars(seen), "resumed": rest}))
    for name, wrong in (("_buffered_inputs", "_buffered_inputs"), ("_logs", "_logs: extra")):
        kept = seen.trainer.__dict__.pop(name)
        assert wrong in missing(seen)
        setattr(seen.trainer, name, kept)
    monkeypatch.setattr(utils, "split_tensor_dict", lambda rollout, parts: [rollout])
    assert missing(seen) == ["shuffle_sequence_dict, split_tensor_dict"]


def test_a_network_beside_the_policy_generates_as_trls_policy_does(model_dir):
    """With `unwrap_model_for_generation`, which `seam/versions.py` calls as each version of TRL has it."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM
    from trl.generation.vllm_generation import VLLMGeneration

    network = AutoModelForCausalLM.from_pretrained(model_dir)
    network.gradient_checkpointing_enable({"use_reentrant": False})
    with unwrapped_for_generation(network, Accelerator(cpu=True), {}, gather_deepspeed3_params=True) as unwrapped:
        assert unwrapped is network and not network.is_gradient_checkpointing
    assert network.is_gradient_checkpointing

    arguments = inspect.signature(VLLMGeneration.__init__).parameters
    ours = {"model", "accelerator", "processing_class", "mode", "server_base_url", "server_timeout", "group_port"}
    ours |= {"tensor_parallel_size", "gpu_memory_utilization", "max_model_length", "enable_sleep_mode", "model_impl"}
    ours |= {"trust_remote_code", "temperature", "max_completion_length"}
    assert ours <= set(arguments)
    # What REINFORCE relies on: the whole distribution is sampled unless told otherwise.
    whole = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {name: arguments[name].default for name in whole} == whole
    assert list(inspect.signature(VLLMGeneration.generate).parameters)[1:4] == ["prompts", "images", "num_generations"]
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]


@pytest.mark.skipif(not HAS_TILED_HEAD, reason="its log-probabilities are not those of a head in tiles")
def test_the_references_pass_can_be_listened_to(model_dir, tmp_path):
    trainer = trl.GRPOTrainer(
        model=model_dir,
        reward_funcs=lambda completions, **kwargs: [0.5] * len(completions),
        args=trl.GRPOConfig(str(tmp_path), **SETTINGS, beta=0.1),
        train_dataset=Dataset.from_dict({"prompt": ["ab", "cde", "f", "gh"]}),
    )
    readers, forward = [], trainer._get_per_token_logps_and_entropies

    def watched(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        readers.append(model)
        return forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = watched
    trainer.train()
    # The policy as it was, then the reference, once and with the whole rollout, then the losses.
    assert [model is trainer.ref_model for model in readers] == [False, True, False, False]

    ids = torch.tensor([[65, 66, 67, 68]])
    read = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "fused_lm_head": True}
    utils.add_fused_lm_head(
        trainer.ref_model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs", "entropy")
    )
    with torch.no_grad():  # a second time, on what is wrapped already
        found = trainer.ref_model(**read)
        logps = trainer.ref_model(ids).logits[:, :-1].log_softmax(-1)
    chosen = logps.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
    assert torch.allclose(found.log_probs, chosen, atol=1e-4)
    assert torch.allclose(found.entropy, -(logps.exp() * logps).sum(-1), atol=1e-4)
    assert list(inspect.signature(utils.use_adapter).parameters) == ["model", "adapter_name"]


def test_lists_in_a_rollout_stay_with_their_rows():
    rollout = {"ids": torch.arange(4), "readings": ["0", None, "2", "3"]}
    parts = utils.split_tensor_dict(utils.shuffle_sequence_dict(rollout), 2)
    for part in parts:
        assert part["readings"] == [None if i == 1 else str(i) for i in part["ids"].tolist()]


def test_one_completion_for_a_prompt_passes_grpo_configs_check_and_stays_one(tmp_path):
    with pytest.raises(ValueError, match="at least 2 generations"):
        trl.GRPOConfig(str(tmp_path), **{**SETTINGS, "num_generations": 1})

    config = CreditConfig(str(tmp_path), **{**SETTINGS, "num_generations": 1})
    assert type(config.num_generations) is int and config.num_generations == 1
