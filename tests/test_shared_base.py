"""A critic on the policy's frozen base is a LoRA critic with one set of base weights; the policy does not notice."""

import copy

import pytest
import torch
from peft import AutoPeftModelForTokenClassification, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import ARCHITECTURES, tiny_model, tiny_model_dir
from transformers import AutoModelForCausalLM
from vapo_runs import make_trainer

from trl_credit.critics.shared_base import make_shared_base_critic
from trl_credit.critics.token import make_token_critic, read_values


ADAPTERS = {"r": 4, "target_modules": "all-linear"}


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", **{**ADAPTERS, **settings})


def trained(network):
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def fill(network, seed=7):
    """Adapters and head that have learned something: fresh ones do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(network).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return network


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, 96, (3, 14), generator=generator)
    prompt_mask, completion_mask = torch.ones(3, 5, dtype=torch.long), torch.ones(3, 9, dtype=torch.long)
    prompt_mask[0, :3] = 0
    completion_mask[1, 4:] = 0
    return {
        "prompt_ids": ids[:, :5],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, 5:],
        "completion_mask": completion_mask,
    }


# --- The network


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_values_and_gradients_are_those_of_a_lora_critic(arch, tmp_path):
    path = tiny_model_dir(tmp_path, arch)
    policy = fill(get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype="float32"), lora()), seed=1)
    shared = fill(make_shared_base_critic(policy, peft_config=lora()))
    separate = fill(make_token_critic(path, peft_config=lora()))
    assert list(trained(shared)) == list(trained(separate))
    for network in (shared, separate):
        read_values(network, batch()).square().sum().backward()
    torch.testing.assert_close(read_values(shared, batch()), read_values(separate, batch()), rtol=0, atol=1e-6)
    for name, p in trained(separate).items():
        torch.testing.assert_close(trained(shared)[name].grad, p.grad, rtol=1e-6, atol=1e-6, msg=name)
        assert p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in policy.parameters())
    lent = {id(p) for p in policy.parameters()}
    assert all(id(p) in lent for name, p in shared.named_parameters() if not p.requires_grad and "score" not in name)


def test_a_fresh_one_answers_the_initial_value_whatever_the_policy_has_learned():
    policy = fill(get_peft_model(tiny_model(), lora()))
    assert (read_values(make_shared_base_critic(policy, initial_value=0.25), batch()) == 0.25).all()


def test_the_base_is_the_policys_own_and_nothing_else_of_it_is():
    policy = get_peft_model(tiny_model(), lora())
    critic = make_shared_base_critic(policy)
    base = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    for name, p in critic.named_parameters():
        assert (p.data_ptr() in base) == ("lora_" not in name and "score" not in name), name
    assert not {id(p) for p in trained(critic).values()} & {id(p) for p in policy.parameters()}


def test_moving_the_policy_moves_the_one_base():
    policy = get_peft_model(tiny_model(), lora())
    critic = make_shared_base_critic(policy)
    policy.to(torch.float64)
    ours = critic.get_base_model().model.embed_tokens.weight
    assert ours.dtype == torch.float64 and ours is policy.get_base_model().model.embed_tokens.weight


def test_by_default_its_adapters_are_as_the_policys_without_dropout_and_trained_copies():
    policy = get_peft_model(tiny_model(), lora(r=3, lora_dropout=0.1, modules_to_save=["lm_head"]))
    config = make_shared_base_critic(policy).peft_config["default"]
    assert (config.r, config.lora_dropout, config.modules_to_save) == (3, 0.0, ["classifier", "score"])
    assert policy.peft_config["default"].lora_dropout == 0.1


# --- In a run


def run(model, folder, shares, **settings):
    """Three steps on its own samples, with a critic that has learned something already."""
    settings = {
        "peft_config": lora(),
        "rollout": None,
        "max_steps": 3,
        "critic_pretraining_steps": 2,
        "gradient_accumulation_steps": 2,
        "critic_learning_rate": 1e-2,
        "learning_rate": 0.1,
        "length_adaptive_alpha": 1.5,
        **settings,
        **({"critic_share_base": True} if shares else {"critic_peft_config": ADAPTERS}),
    }
    trainer = make_trainer(model, folder, **settings)
    fill(trainer.critic)
    trainer.before = {
        network: {name: p.detach().clone() for name, p in getattr(trainer, network).named_parameters()}
        for network in ("model", "critic")
    }
    trainer.train()
    trainer.save_model()
    return trainer


def policy_with_reference(model_dir):
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32"), lora())


SCENARIOS = {
    "plain": {},
    "reference policy": {"beta": 0.1},
    "reference policy of an adapter": {"beta": 0.1, "model": policy_with_reference, "peft_config": None},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "a trained output layer": {"peft_config": lora(modules_to_save=["lm_head"])},
}


@pytest.fixture(scope="module")
def runs(model_dir, tmp_path_factory):
    """Runs by scenario: with a shared base and with a separate LoRA critic."""
    cache = {}

    def get(name):
        if name not in cache:
            pair = []
            for shares in (True, False):
                settings = dict(SCENARIOS[name])
                model = settings.pop("model", lambda folder: folder)(model_dir)
                torch.manual_seed(0)
                pair.append(run(model, tmp_path_factory.mktemp("run"), shares, **settings))
            cache[name] = pair
        return cache[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_both_trajectories_are_those_of_a_run_with_a_separate_lora_critic(name, runs):
    shared, separate = runs(name)
    for network in ("model", "critic"):
        ours, theirs = getattr(shared, network), dict(getattr(separate, network).named_parameters())
        assert dict(ours.named_parameters()).keys() == theirs.keys()
        for parameter, weight in ours.named_parameters():
            if "ref" not in parameter.split(".") and (weight.requires_grad or "original_module" not in parameter):
                torch.testing.assert_close(weight, theirs[parameter], rtol=0, atol=1e-6, msg=parameter)
    logs = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (shared, separate)]
    for ours, theirs in zip(*logs, strict=True):
        for metric in ("loss", "grad_norm", "reward", "critic/loss", "critic/grad_norm", *["kl"] * ("beta" in name)):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5, abs=1e-7), metric


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.slow
def test_what_is_trained_moves_and_the_base_stays_to_the_bit(name, runs):
    trainer, _ = runs(name)
    for network in ("model", "critic"):
        for parameter, weight in getattr(trainer, network).named_parameters():
            moved = not weight.equal(trainer.before[network][parameter])
            assert moved == weight.requires_grad, (network, parameter)


def test_gradient_checkpointing_changes_nothing(runs):
    plain = runs("plain")[0]
    for name in ("gradient checkpointing", "reentrant"):
        for network in ("model", "critic"):
            theirs = dict(getattr(plain, network).named_parameters())
            for parameter, weight in trained(getattr(runs(name)[0], network)).items():
                torch.testing.assert_close(weight, theirs[parameter], rtol=0, atol=1e-6, msg=parameter)


def test_each_optimizer_has_the_parameters_of_its_network_and_no_other(runs):
    trainer, _ = runs("plain")
    for optimizer, network in ((trainer.optimizer, trainer.model), (trainer.engine.backend.optimizer, trainer.critic)):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in trained(network).values()}


@pytest.mark.parametrize("name", ["plain", "a trained output layer", "reference policy of an adapter"])
def test_the_policy_is_saved_as_without_the_critic(name, runs):
    shared, separate = runs(name)
    folders = [trainer.args.output_dir for trainer in (shared, separate)]
    from pathlib import Path

    files = [{str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()} for folder in folders]
    assert files[0] == files[1] and "adapter_model.safetensors" in files[0]
    ours, theirs = (load_file(f"{folder}/adapter_model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys() and not any("score" in key for key in ours)
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], rtol=0, atol=1e-6, msg=key)
    assert list(shared.model.peft_config) == list(separate.model.peft_config)


def test_what_goes_to_vllm_is_the_merged_policy_and_the_critic_is_the_same_after_it(runs):
    """TRL's own walk over the weights, which merges the adapters into the shared base and takes them out again."""
    from trl.generation.vllm_generation import DistributedBackend, VLLMGeneration

    shared, _ = runs("plain")
    before = read_values(shared.critic, batch())
    sync = object.__new__(VLLMGeneration)
    sync.model, sync.accelerator, sync._dist = shared.model, shared.accelerator, DistributedBackend(shared.accelerator)
    sent = {name: weight.clone() for name, weight in sync._iter_named_params()}
    expected = copy.deepcopy(shared.model).merge_and_unload().state_dict()
    assert sent.keys() == expected.keys()
    for name, weight in sent.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)
    assert not sent["model.layers.0.mlp.up_proj.weight"].equal(
        shared.before["model"]["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"]
    )
    torch.testing.assert_close(read_values(shared.critic, batch()), before, rtol=0, atol=1e-6)


def test_a_saved_critic_loads_with_peft_and_as_the_start_of_either_kind_of_run(runs, model_dir, tmp_path):
    trainer, _ = runs("plain")
    saved = f"{trainer.args.output_dir}/critic"
    values = read_values(trainer.critic, batch())
    assert values.std() > 0.01
    assert AutoPeftModelForTokenClassification.from_pretrained(saved, num_labels=1).config.num_labels == 1
    later = [
        AutoPeftModelForTokenClassification.from_pretrained(saved, num_labels=1),
        make_trainer(model_dir, tmp_path, critic=saved).critic,
        make_trainer(model_dir, tmp_path, critic=saved, peft_config=lora(), critic_share_base=True).critic,
    ]
    for critic in later:
        torch.testing.assert_close(read_values(critic, batch()), values, rtol=0, atol=1e-6)
    assert trained(later[2]).keys() == trained(trainer.critic).keys()


@pytest.mark.slow
def test_it_adds_less_than_15_percent_to_the_weights_gradients_and_optimizer_of_a_lora_run(tmp_path):
    """Where adapters are small beside the base, as they are: here 2 % of it."""
    path = tiny_model_dir(tmp_path, hidden=128, layers=2)
    sizes = {}
    for shares in (True, False):
        trainer = run(path, tmp_path, shares, peft_config=lora(r=1), optim="adamw_torch", max_steps=1)
        policy, both = (
            _bytes([trainer.model], [trainer.optimizer]),
            _bytes([trainer.model, trainer.critic], [trainer.optimizer, trainer.engine.backend.optimizer]),
        )
        sizes[shares] = both / policy
    assert sizes[True] < 1.15 and sizes[False] > 1.5


def _bytes(networks, optimizers):
    weights = {p.untyped_storage().data_ptr(): p for network in networks for p in network.parameters()}.values()
    states = [s for o in optimizers for state in o.state.values() for s in state.values() if torch.is_tensor(s)]
    gradients = [p for p in weights if p.requires_grad]
    return sum(t.nbytes for t in [*weights, *states, *gradients])


# --- What is refused


def refused(model_dir, tmp_path, message, error=ValueError, **settings):
    with pytest.raises(error, match=message):
        make_trainer(model_dir, tmp_path, **{"peft_config": lora(), "critic_share_base": True, **settings})


def test_what_has_no_frozen_base_to_share_is_refused(model_dir, tmp_path):
    refused(model_dir, tmp_path, "needs a policy with adapters .* got a Qwen2ForCausalLM", peft_config=None)
    refused(model_dir, tmp_path, "but the policy trains .*q_proj.bias", peft_config=lora(bias="all"))
    refused(
        model_dir,
        tmp_path,
        "The policy's adapters: init_lora_weights='pissa'",
        peft_config=lora(init_lora_weights="pissa"),
    )


def test_a_critic_that_would_change_the_base_or_is_not_on_it_is_refused(model_dir, tmp_path):
    refused(model_dir, tmp_path, "has bias='all'", critic_peft_config={**ADAPTERS, "bias": "all"})
    pissa = {**ADAPTERS, "init_lora_weights": "pissa"}
    refused(model_dir, tmp_path, "`critic_peft_config`: init_lora_weights='pissa'", critic_peft_config=pissa)
    refused(model_dir, tmp_path, "lora_dropout=0.1", critic_peft_config={**ADAPTERS, "lora_dropout": 0.1})
    refused(model_dir, tmp_path, "can start from the policy's base .* got a Qwen2ForCausalLM", critic=tiny_model())
    refused(model_dir, tmp_path, "can start from the policy's base .* got '.*tiny-qwen2'", critic=str(model_dir))
    other = tiny_model_dir(tmp_path / "other", seed=1)
    make_token_critic(other, peft_config=lora()).save_pretrained(tmp_path / "critic")
    refused(model_dir, tmp_path, "has adapters for '.*other.*', but the policy's base", critic=tmp_path / "critic")
