"""VAPO with `critic="probe"`: a small head on what the reference makes of the rollouts anyway."""

import json
import math
import random
from collections import Counter

import pytest
import torch
import vapo_runs
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vapo_runs import make_trainer

from trl_credit import GenACConfig, GenACTrainer, VAPOConfig, VAPOTrainer
from trl_credit.critics.loading import load_critic
from trl_credit.critics.probe.critic import Question, read_with
from trl_credit.scripts import grpo_parser


OWN = {
    "critic_model_name_or_path": "probe",
    "critic_learning_rate": None,
    "beta": 0.03,
    "reward_range": [-0.4, 0.6],
    "positive_lm_coef": 0.0,
    "policy_lambda": 0.5,
}


def probe_trainer(model_dir, folder, **settings):
    return make_trainer(model_dir, folder, **{**OWN, **settings})


def passes(module) -> list[int]:
    """A list that grows by the tokens of every forward pass."""
    seen = []
    module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    return seen


class Reading(vapo_runs.Watched):
    """Keeps what the probe critic has read of each rollout."""

    @property
    def of_critic(self):
        probe = super().of_critic
        if "asked_seen" not in self.__dict__ and self.critic_kind == "probe":
            self.asked_seen, learn = [], probe.learn

            def keep_and_learn(rollout, targets, steps, mode):
                self.asked_seen.append((rollout, self.critic_reader.ask(rollout), targets, steps))
                learn(rollout, targets, steps, mode)

            probe.learn = keep_and_learn
        return probe


# --- What it reads


@pytest.mark.parametrize("adapters", [False, True])
def test_features_are_the_start_policys_however_far_the_policy_has_moved(adapters, model_dir, tmp_path):
    peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if adapters else None
    settings = {"probe_layers": [0, 1, -1], "probe_uncertainty": True, "probe_boundaries": "tokens"}
    trainer = probe_trainer(
        model_dir, tmp_path, trainer=Reading, peft_config=peft, learning_rate=0.3, max_steps=3, **settings
    )
    trainer.train()
    start = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    rollout, asked, _, _ = trainer.asked_seen[-1]
    ids, mask = (
        torch.cat([rollout[f"prompt_{what}"], rollout[f"completion_{what}"]], dim=1) for what in ("ids", "mask")
    )
    with torch.no_grad():
        out = start(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        now = trainer.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    rows, columns = asked.starts.nonzero(as_tuple=True)
    before = columns + rollout["prompt_ids"].shape[1] - 1
    width = start.config.hidden_size
    for i, layer in enumerate((0, 1, -1)):
        found = asked.features[:, i * width : (i + 1) * width]
        assert torch.allclose(found, out.hidden_states[layer][rows, before], atol=1e-5)
    assert (now.hidden_states[-1] - out.hidden_states[-1])[mask.bool()].abs().mean() > 1e-3
    logps = out.logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)[rows, before]
    assert torch.allclose(asked.features[:, -1], entropy, atol=1e-4)
    chosen = logps[rows, (before - 1).clamp(min=0)].gather(1, ids[rows, before].unsqueeze(1)).squeeze(1)
    expected = torch.where(columns == 0, 0, chosen)
    assert torch.allclose(asked.features[:, -3], expected, atol=1e-4)
    prompt = rollout["prompt_ids"].shape[1]
    own = logps[:, prompt - 1 : -1].gather(2, ids[:, prompt:].unsqueeze(2)).squeeze(2) * asked.starts
    assert torch.allclose(asked.features[:, -2], (own.cumsum(1) - own)[rows, columns], atol=1e-3)


def test_it_costs_no_pass_of_its_own(model_dir, tmp_path):
    seen = []
    for name, own in (("probe", {}), ("full", {"critic_model_name_or_path": None, "reward_range": None})):
        settings = {"probe_layers": [0, -1], "max_steps": 2} if name == "probe" else {"max_steps": 2}
        trainer = probe_trainer(model_dir, tmp_path / name, **{**settings, **own})
        counted = [passes(trainer.ref_model), passes(trainer.model)]
        trainer.train()
        seen.append([len(tokens) for tokens in counted])
    assert seen[0] == seen[1] and seen[0][0] == 2


def test_nothing_of_a_rollout_is_kept_on_the_device_or_beyond_its_credit(model_dir, tmp_path):
    room = 6 * (2 * (16 + 3 + 3) + 4)  # for six states of width 16, three numbers on the position and three on doubt
    trainer = probe_trainer(model_dir, tmp_path, probe_buffer_rollouts=2, probe_buffer_memory=room / 2**30, max_steps=4)
    trainer.train()
    assert trainer._reading is None and trainer.critic_reader._latest is None
    kept = trainer.engine.learner.buffer.state_dict()["rollouts"]
    assert [len(targets) for _, targets in kept] == [3, 3]
    assert sum(x.untyped_storage().nbytes() for pair in kept for x in pair) == room


def test_states_of_any_completion_are_read_as_those_of_the_rollout(model_dir, tmp_path):
    trainer = probe_trainer(model_dir, tmp_path, max_steps=2, probe_layers=[1], probe_uncertainty=True)
    trainer.train()
    rollout = trainer.rollouts_seen[-1]
    read = trainer.read_with_reference(rollout)
    start = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    alone = read_with(start, (1,), 1.0, rollout)
    there = rollout["completion_mask"].bool()
    for found, expected in (
        (read.logps, alone.logps),
        (read.entropy, alone.entropy),
        (read.states[1], alone.states[1]),
    ):
        assert torch.allclose(found[there], expected[there], atol=1e-5)


def test_without_a_penalty_there_is_nothing_to_listen_to(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path)
    with pytest.raises(ValueError, match="no reference model to listen to with `beta=0.0`"):
        trainer.listen_to_reference((0,))


# --- Where it is asked


def ends_of_threes(token_ids, tokenizer, trainable=None):
    return [*range(3, len(token_ids), 3), len(token_ids)] if token_ids else []


def test_boundaries_are_those_asked_for(model_dir, tmp_path):
    starts = {}
    for kind in ("tokens", "turns", "segments", "entropy"):
        trainer = probe_trainer(model_dir, tmp_path / kind, trainer=Reading, probe_boundaries=kind)
        if kind == "segments":
            trainer.of_critic.segmenter = ends_of_threes
            trainer._critic_reader = None
        trainer.train()
        rollout, asked, _, _ = trainer.asked_seen[0]
        starts[kind] = asked.starts
    trained = (rollout["completion_mask"] * rollout["tool_mask"]).bool()
    assert torch.equal(starts["tokens"], trained)
    for row, there in enumerate(trained.tolist()):
        first_of_turns = [t for t, x in enumerate(there) if x and (t == 0 or not there[t - 1])]
        assert starts["turns"][row].nonzero().squeeze(1).tolist() == first_of_turns
        columns = [t for t, x in enumerate(there) if x]
        first_of_threes = [min(t for t in columns if t // 3 == k) for k in sorted({t // 3 for t in columns})]
        assert starts["segments"][row].nonzero().squeeze(1).tolist() == first_of_threes
    share = starts["entropy"].sum() / trained.sum()
    assert 0.4 < share < 0.8  # above the median, and the first of each row
    assert not torch.equal(starts["entropy"], trained)


def test_a_value_holds_up_to_the_next_state_and_none_is_given_after_the_end(model_dir, tmp_path):
    trainer = probe_trainer(model_dir, tmp_path, probe_boundaries="turns", max_steps=2)
    trainer.train()
    rollout = trainer.rollouts_seen[-1]
    values = trainer.state_values(rollout)
    assert values.shape == (4, rollout["completion_ids"].shape[1] + 1) and values.dtype == torch.float32
    for row, length in enumerate(rollout["completion_mask"].sum(1).tolist()):
        assert values[row, :length].isfinite().all() and values[row, length:].isnan().all()
        trained = rollout["tool_mask"][row, :length].tolist()
        changes = [t for t in range(1, length) if values[row, t] != values[row, t - 1]]
        assert all(trained[t] and not trained[t - 1] for t in changes)
    assert ((values[values.isfinite()] > -0.4) & (values[values.isfinite()] < 0.6)).all()


# --- How far it is leant on: planted critics


FLIPS = 8


def coin_flips(prompts, trainer):
    """Eight tokens of equal chance, even or odd, however the policy feels."""
    tokenizer, seen = trainer.processing_class, Counter()
    completions = []
    for prompt in prompts:
        rng = random.Random(f"{prompt} {seen[prompt]} {trainer.state.global_step}")
        seen[prompt] += 1
        completions.append([rng.randrange(64, 96) for _ in range(FLIPS)])
    ids = tokenizer(list(prompts))["input_ids"]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * FLIPS for _ in completions]}


def share_of_even(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / FLIPS for ids in completion_ids]


def exact_values(rollout):
    even = (rollout["completion_ids"] % 2 == 0).float()
    so_far = torch.nn.functional.pad(even.cumsum(1), (1, 0))
    return (so_far + 0.5 * (FLIPS - torch.arange(FLIPS + 1.0))) / FLIPS


def guessed_values(rollout):
    return torch.rand(len(rollout["completion_ids"]), FLIPS + 1, generator=torch.Generator().manual_seed(5))


def with_planted(values, model_dir, folder, **settings):
    settings = {"num_generations": 4, "reward_range": [0.0, 1.0], "policy_lambda": 0.0, **settings}
    settings = {"reward": share_of_even, **settings}
    trainer = probe_trainer(
        model_dir,
        folder,
        rollout=coin_flips,
        per_device_train_batch_size=128,
        probe_boundaries="tokens",
        max_steps=2,
        learning_rate=0.0,
        **settings,
    )
    trainer.critic_reader.state_values = values
    trainer.train()
    return trainer, trainer.rollouts_seen[-1], trainer.rewards_seen[-1], trainer.state.log_history[-2]["critic/trust"]


@pytest.fixture(autouse=True)
def many_prompts(monkeypatch):
    """`make_trainer` has eight prompts of its own, of which a rollout here needs more."""
    monkeypatch.setattr(vapo_runs, "PROMPTS", [*vapo_runs.PROMPTS, *(str(i) for i in range(120))])


@pytest.mark.parametrize("generations", [1, 4])
def test_a_perfect_critic_is_trusted_and_gives_the_exact_credit(generations, model_dir, tmp_path):
    _, rollout, rewards, trust = with_planted(exact_values, model_dir, tmp_path, num_generations=generations)
    assert trust > 0.9
    groups = rewards.view(-1, generations if generations > 1 else len(rewards))
    baseline = (groups - groups.mean(1, keepdim=True)).flatten()
    exact = exact_values(rollout).diff(dim=1)
    expected = (1 - trust) * baseline.unsqueeze(1) + trust * exact
    assert torch.allclose(rollout["advantages"], expected, atol=1e-5)
    assert torch.corrcoef(torch.stack([rollout["advantages"].flatten(), exact.flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize("generations", [1, 4])
def test_a_critic_that_guesses_is_not_and_leaves_the_groups_or_the_rollouts_mean(generations, model_dir, tmp_path):
    _, rollout, rewards, trust = with_planted(guessed_values, model_dir, tmp_path, num_generations=generations)
    assert trust < 0.06
    groups = rewards.view(-1, generations if generations > 1 else len(rewards))
    baseline = (groups - groups.mean(1, keepdim=True)).flatten().unsqueeze(1)
    error = (rollout["advantages"] - baseline).abs().mean()
    assert error < 0.06 * 0.5  # guesses differ by a third of the range


def test_trust_is_a_number_if_that_is_asked_for_and_at_0_the_credit_is_the_baselines_to_the_bit(model_dir, tmp_path):
    _, rollout, rewards, trust = with_planted(
        exact_values, model_dir, tmp_path, num_generations=1, critic_trust="0.0", policy_lambda=1.0
    )
    assert trust == 0
    assert torch.equal(rollout["advantages"], (rewards - rewards.mean()).unsqueeze(1).expand(-1, FLIPS))


def even_prompts_are_easy(prompts, completion_ids, **kwargs):
    return [0.5 * even + 0.5 * (len(p) % 2) for p, even in zip(prompts, share_of_even(completion_ids), strict=True)]


def noise(shape, seed: int):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lambda_of(values, model_dir, folder, **settings) -> tuple[float, float]:
    trainer, *_, trust = with_planted(values, model_dir, folder, policy_lambda="measured", **settings)
    return trainer.state.log_history[-2]["policy_lambda/mean"], trust


def test_measured_lambda_leans_on_changes_of_value_as_far_as_they_come_true(model_dir, tmp_path):
    """Of exact values all is right, of guesses nothing, and of exact ones with as much noise as they change, half."""
    exact, _ = lambda_of(exact_values, model_dir, tmp_path / "exact")
    assert exact < 0.1
    guessed, _ = lambda_of(guessed_values, model_dir, tmp_path / "guessed")
    assert guessed > 0.9
    # Of hardly any change too, though the last step, to the reward itself, is a large one that comes true.
    flat, _ = lambda_of(
        lambda rollout: 0.5 + 0.5 * noise((len(rollout["completion_ids"]), FLIPS + 1), 11), model_dir, tmp_path / "flat"
    )
    assert flat > 0.8
    change = 0.5 / FLIPS  # and a change has the noise of two states

    def noisy_values(rollout):
        return exact_values(rollout) + change / 2**0.5 * noise((len(rollout["completion_ids"]), FLIPS + 1), 3) / 0.1

    half, _ = lambda_of(noisy_values, model_dir, tmp_path / "noisy")
    assert half == pytest.approx(0.5, abs=0.12)


def test_a_critic_that_knows_the_prompts_alone_is_trusted_and_its_changes_are_not(model_dir, tmp_path):
    def values(rollout):
        easy = rollout["prompt_mask"].sum(1, keepdim=True) % 2
        return 0.25 + 0.5 * easy + noise((len(easy), FLIPS + 1), 7)

    lam, trust = lambda_of(values, model_dir, tmp_path, reward=even_prompts_are_easy)
    assert trust > 0.7 and lam > 0.85


# --- The run


def test_it_learns_from_a_rollout_after_valuing_it_and_not_from_evaluations(model_dir, tmp_path):
    held_out = Dataset.from_dict({"prompt": vapo_runs.PROMPTS[:4]})
    trainer = probe_trainer(
        model_dir, tmp_path, trainer=Reading, eval_dataset=held_out, per_device_eval_batch_size=4, max_steps=3
    )
    trainer.train()
    learner = trainer.engine.learner
    assert learner.steps == 3 * 32
    first = trainer.rollouts_seen[0]["values"]
    assert first[first != 0].unique().tolist() == pytest.approx([0.1])  # the middle of the range, before any reward
    state = json.dumps(learner.state_dict(), default=lambda x: x.tolist() if torch.is_tensor(x) else list(x))
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_critic/value_mean"])
    after = json.dumps(learner.state_dict(), default=lambda x: x.tolist() if torch.is_tensor(x) else list(x))
    assert state == after


def test_token_rewards_are_earned_where_they_fall(model_dir, tmp_path):
    trainer = probe_trainer(
        model_dir, tmp_path, trainer=Reading, reward=vapo_runs.even_tokens, probe_boundaries="turns", critic_lambda=1.0
    )
    trainer.train()
    rollout, _, targets, steps = trainer.asked_seen[0]
    trained = (rollout["completion_mask"] * rollout["tool_mask"]).bool()
    earned = torch.where(trained, 0.1 * (rollout["completion_ids"] % 2 == 0) - 0.05, 0)
    # A reward on a tool's token goes to the last trained one before it: all are rewards of the state's own turn.
    on_tools = torch.where(
        rollout["completion_mask"].bool() & ~trained, 0.1 * (rollout["completion_ids"] % 2 == 0) - 0.05, 0
    )
    to_go = (earned + on_tools).flip(1).cumsum(1).flip(1)
    assert torch.allclose(targets[steps], to_go[steps], atol=1e-6)


def test_a_completion_without_a_reward_has_no_credit_and_teaches_nothing(model_dir, tmp_path):
    def scored_now_and_then(completion_ids, **kwargs):
        return [None if i % 2 else share_of_even([ids])[0] - 0.4 for i, ids in enumerate(completion_ids)]

    trainer = probe_trainer(model_dir, tmp_path, trainer=Reading, reward=scored_now_and_then, probe_boundaries="tokens")
    trainer.train()
    rollout, asked, _, steps = trainer.asked_seen[0]
    assert asked.starts[1].any() and not steps[1::2].any()
    credited, rewards = trainer.rollouts_seen[0], trainer.rewards_seen[0]
    assert (credited["advantages"][1::2] == 0).all() and not credited["critic_mask"][1::2].any()
    assert len(trainer.engine.learner.buffer) == steps.sum() == asked.starts[::2].sum()
    mean = rewards[::2].mean()
    there = steps[::2]
    # At the start values are equal, w is 0, and the credit is the reward less the mean of those that there are.
    assert torch.allclose(
        credited["advantages"][::2][there], (rewards[::2, None] - mean).expand_as(there)[there], atol=1e-6
    )


def test_options_reach_the_head_and_what_teaches_it(model_dir, tmp_path):
    trainer = probe_trainer(
        model_dir,
        tmp_path,
        critic_head_learning_rate=1e-3,
        probe_hidden_size=7,
        probe_updates=3,
        probe_batch_size=5,
        probe_buffer_rollouts=2,
        probe_layers=[0, 1],
        max_steps=3,
    )
    learner, drawn = trainer.engine.learner, []
    draw = learner.buffer.draw
    learner.buffer.draw = lambda count, generator: drawn.append(count) or draw(count, generator)
    trainer.train()
    assert learner.optimizer.param_groups[0]["lr"] == 1e-3
    assert trainer.critic.head[0].weight.shape == (7, 2 * 16 + 6)
    assert drawn == [5] * 9 and learner.steps == 9
    assert len(learner.buffer._rollouts) == 2
    assert trainer.critic.length == vapo_runs.LENGTH


def test_the_best_policy_comes_with_its_head(model_dir, tmp_path):
    trainer = probe_trainer(model_dir, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    last = {name: x.clone() for name, x in trainer.critic.state_dict().items()}
    trainer.load_networks(tmp_path / "checkpoint-1")
    saved = load_file(tmp_path / "checkpoint-1" / "critic" / "probe.safetensors")
    now = trainer.critic.state_dict()
    assert all(torch.equal(now[name], x) for name, x in saved.items())
    assert not torch.equal(now["head.2.weight"], last["head.2.weight"])
    assert trainer.engine.steps == 64  # as many as were made


def settings_of_a_resumed_run():
    return {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 5, "optim": "adamw_torch"}


@pytest.mark.slow
def test_a_resumed_run_is_the_run_to_the_bit(model_dir, tmp_path):
    settings = {**settings_of_a_resumed_run(), "rollout": None, "num_generations": 2, "policy_lambda": "measured"}
    whole = probe_trainer(model_dir, tmp_path / "whole", **settings)
    whole.train()
    resumed = probe_trainer(model_dir, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))  # amid a rollout
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    states = [
        torch.load(tmp_path / name / "checkpoint-5" / "probe_state.pt", weights_only=True)
        for name in ("whole", "resumed")
    ]
    texts = [json.dumps(s, default=lambda x: x.tolist() if torch.is_tensor(x) else list(x)) for s in states]
    assert texts[0] == texts[1]
    assert states[0]["learner"]["steps"] == 3 * 32 and len(states[0]["changes"]) == 3


def test_a_checkpoint_without_its_state_is_refused(model_dir, tmp_path):
    settings = settings_of_a_resumed_run()
    probe_trainer(model_dir, tmp_path, **settings).train()
    for name in ("probe_state.pt", "manifest.json"):
        (tmp_path / "checkpoint-3" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"no state of a probe critic \(probe_state.pt\)"):
        probe_trainer(model_dir, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# --- Saved


@pytest.fixture(scope="module")
def saved(model_dir, tmp_path_factory):
    """A trainer that has saved its critic."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = probe_trainer(model_dir, folder, max_steps=2, probe_layers=[0, 1], probe_boundary_quantile=0.3)
    trainer.train()
    trainer.save_model()
    return trainer, folder / "critic"


def test_a_critic_by_its_folder_alone_values_what_its_trainer_does(saved):
    trainer, folder = saved
    rollout = {name: x for name, x in trainer.rollouts_seen[-1].items() if name != "tool_mask"}
    critic = load_critic(str(folder), trainer.processing_class)
    assert critic.kind == "probe" and critic.question == Question("entropy", [0, 1], True)
    found, expected = critic.state_values(rollout), trainer.state_values(rollout)
    assert found.isfinite().sum() == expected.isfinite().sum() == rollout["completion_mask"].sum()
    assert torch.allclose(found, expected, atol=1e-5, equal_nan=True)


def test_its_facts_and_its_card_say_what_it_is(saved, model_dir):
    _, folder = saved
    facts = json.loads((folder / "critic.json").read_text())
    assert facts["kind"] == "probe" and facts["updates"] == 64
    assert facts["reads"] == {"model": str(model_dir), "temperature": 1.0}
    assert facts["settings"]["probe_layers"] == [0, 1]
    card = (folder / "README.md").read_text()
    assert "A probe critic: a small head" in card and "`probe_boundary_quantile` | `0.3`" in card
    assert "critic_warmup_steps" not in card


def test_a_later_run_goes_on_with_a_saved_head_asked_the_same(saved, model_dir, tmp_path):
    _, folder = saved
    later = probe_trainer(model_dir, tmp_path, critic_model_name_or_path=str(folder))
    assert later.critic_kind == "probe" and later.args.probe_layers == [0, 1]
    first = saved[0].critic.head[0].weight
    assert torch.equal(later.critic.head[0].weight, first)
    later.train()
    assert later.of_critic.critic_facts().updates == 64 + 32
    with pytest.raises(
        ValueError, match=r"`probe_layers=\[-1\]` is asked for, but the critic .* was trained with \[0, 1\]"
    ):
        probe_trainer(model_dir, tmp_path, critic_model_name_or_path=str(folder), probe_layers=[-1])


# --- Refused


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.0}, "`beta=0.0` makes none"),
        ({"sync_ref_model": True}, "sync_ref_model=True"),
        ({"critic_learning_rate": 1e-4}, "`critic_learning_rate=0.0001` has no effect on a probe critic"),
        ({"critic_lr_scheduler_type": "linear"}, "`critic_lr_scheduler_type='linear'` has no effect"),
        ({"critic_clip_range": 0.2}, "`critic_clip_range=0.2` has no effect"),
        ({"critic_initial_value": 0.5}, "`critic_initial_value=0.5` has no effect"),
        ({"critic_pretraining_steps": 7}, "`critic_pretraining_steps=7` has no effect"),
        ({"critic_share_base": True}, "`critic_share_base=True` has no effect"),
        ({"gamma": 0.9}, "`gamma=0.9` cannot be had"),
        ({"truncation": "bootstrap"}, "`truncation='bootstrap'` cannot be had"),
        ({"probe_boundaries": "tokens", "probe_boundary_quantile": 0.9}, "no effect with `probe_boundaries='tokens'`"),
        ({"probe_buffer_memory": 0.0}, "`probe_buffer_memory` must be a finite number above 0, got 0.0"),
        ({"probe_layers": [9]}, "has layers 0 .* to 2; 9 is asked for"),
        ({"reward_range": [1, 0]}, "the lower one first"),
        ({"critic_trust": "some"}, "a number in \\[0, 1\\] or 'measured'"),
    ],
)
def test_what_has_no_effect_is_refused_by_name(settings, message, model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        probe_trainer(model_dir, tmp_path, **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"critic_trust": 0.5}, "`critic_trust=0.5` has no effect: the critic is no probe critic"),
        ({"probe_layers": [1]}, "`probe_layers=\\[1\\]` has no effect"),
        ({"probe_updates": 64}, "`probe_updates=64` has no effect"),
        ({"policy_lambda": "measured"}, "`policy_lambda='measured'` is for a probe critic"),
    ],
)
def test_options_of_a_probe_critic_are_refused_without_one(settings, message, model_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(model_dir, tmp_path, **settings)


def test_a_segmenter_that_nobody_asks_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="`segmenter` has no effect"):
        VAPOTrainer(
            str(model_dir),
            vapo_runs.share_of_even,
            VAPOConfig(str(tmp_path), critic_model_name_or_path="probe", beta=0.1, bf16=False, use_cpu=True),
            Dataset.from_dict({"prompt": ["a"]}),
            segmenter=ends_of_threes,
        )


def test_rewards_outside_the_range_are_refused_with_both(model_dir, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"outside `reward_range=\[0.5, 1.0\]`.* Set `reward_range` to them, or take another critic than",
    ):
        probe_trainer(model_dir, tmp_path, reward_range=[0.5, 1.0]).train()


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_method_whose_critic_writes_says_so(is_saved, model_dir, saved, tmp_path):
    critic, message = (
        (saved[1], "is a probe critic, as its") if is_saved else ("probe", "for critics that give numbers")
    )
    with pytest.raises(ValueError, match=message):
        GenACTrainer(
            str(model_dir),
            vapo_runs.share_of_even,
            GenACConfig(str(tmp_path), bf16=False, use_cpu=True),
            Dataset.from_dict({"prompt": ["a"]}),
            critic=critic,
        )


def test_a_probe_critic_has_no_pretraining(model_dir, tmp_path):
    with pytest.raises(ValueError, match="has no pretraining"):
        probe_trainer(model_dir, tmp_path).pretrain_critic()


def test_the_command_line_takes_it():
    arguments = (
        "--output_dir out --model_name_or_path m --critic_model_name_or_path probe --beta 0.03 --critic_trust 0.5"
    )
    _, config, *_ = grpo_parser(VAPOConfig).parse_args_and_config(
        f"{arguments} --probe_layers 0 -1 --policy_lambda measured --bf16 False".split()
    )
    assert config.critic_trust == 0.5 and config.probe_layers == [0, -1] and config.policy_lambda == "measured"
