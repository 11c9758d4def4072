"""GenAC as a trainer, against the paper's equations written as loops in float64."""

import pytest
import torch
from datasets import Dataset
from genac_oracle import Oracle, Sample
from genac_runs import fit_critic, make_trainer, share_of_even
from tiny import tiny_model

from trl_credit import GenACTrainer


@pytest.fixture(scope="module")
def critic_dir(tmp_path_factory):
    return fit_critic(tmp_path_factory.mktemp("critic"))


def unscored_now_and_then(completion_ids, **kwargs):
    rewards = share_of_even(completion_ids)
    return [None if len(ids) % 5 == 4 else reward for ids, reward in zip(completion_ids, rewards, strict=True)]


def samples_of(tokenizer, rollout, rewards):
    """A rollout without its padding, for the oracle."""
    samples = []
    for row, reward in enumerate(rewards.tolist()):
        prompt_ids = rollout["prompt_ids"][row][rollout["prompt_mask"][row].bool()].tolist()
        completion = rollout["completion_ids"][row][rollout["completion_mask"][row].bool()].tolist()
        trained = rollout["tool_mask"][row][: len(completion)].bool().tolist()
        reading = rollout["readings"][row]
        heard = (reading.texts, reading.ends, reading.answers) if reading else ([], [], [])
        reward = None if reward != reward else reward
        samples.append(Sample(tokenizer.decode(prompt_ids), prompt_ids, completion, trained, reward, *heard))
    return samples


SCENARIOS = {
    "lambda 1": {},
    "lambda 0.95": {"segment_lambda": 0.95},
    "naive": {"segment_lambda": 0.5, "critic_packing": False, "critic_update_batch_tokens": 200},
    "leave one out": {"critic_baseline": "leave_one_out", "critic_temperature": 1.3},
    "unscored": {"reward": unscored_now_and_then, "hint_momentum": 0.5},
    "groups of 4": {"num_generations": 4, "num_iterations": 2, "max_segments": 2},
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_steps_are_the_papers(name, model_dir, critic_dir, tmp_path):
    """Hints, states, advantages, losses, gradient norms and the weights of both networks over three rollouts."""
    passes = SCENARIOS[name].get("num_iterations", 1)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 3 * passes, "learning_rate": 0.3, **SCENARIOS[name]}
    trainer = make_trainer(model_dir, tmp_path, critic=critic_dir, **settings)
    tokenizer = trainer.critic_processing_class
    oracle = Oracle(model_dir, trainer.critic, tokenizer, trainer.args)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(trainer.rollouts_seen) == 3 and len(log) == 3 * passes

    failed = 0
    for number, (rollout, rewards) in enumerate(zip(trainer.rollouts_seen, trainer.rewards_seen, strict=True)):
        samples = samples_of(tokenizer, rollout, rewards)
        assert len(samples) == 8 and any(not all(sample.trained) for sample in samples)
        assert rewards.isnan().any() == (name == "unscored")
        hint = oracle.hint(samples)
        assert log[number * passes]["critic/hint"] == pytest.approx(hint, rel=1e-6)
        credit = oracle.judge(samples, hint)
        for row, sample in enumerate(samples):
            if sample.answers:
                states = [oracle.state(sample, k, hint) for k in range(len(sample.ends))]
                assert rollout["readings"][row].query.prompts() == states
                assert states[0] == oracle.state(Sample(sample.prompt, *[[]] * 7), 0, hint), "the prompt alone"
                failed += rollout["readings"][row].scores.count(None)
            expected = torch.zeros(rollout["advantages"].shape[1])
            for t, advantage in credit[row][0].items():
                expected[t] = advantage
            torch.testing.assert_close(rollout["advantages"][row], expected, rtol=1e-5, atol=1e-5)

        with torch.no_grad():
            for sample in samples:
                sample.old_logps = oracle.policy_logps(sample).tolist()
        for step in range(passes):
            entry = log[number * passes + step]
            _, norm = oracle.step(oracle.policy_loss(samples, credit), oracle.policy)
            assert entry["grad_norm"] == pytest.approx(norm, rel=1e-4)
            assert ("critic/loss" in entry) == (step == 0), "each answer is trained on once"
        loss, norm = oracle.step(oracle.critic_loss(samples, credit, hint), oracle.critic)
        entry = log[number * passes]
        assert entry["critic/loss"] == pytest.approx(loss, rel=1e-4)
        assert entry["critic/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert failed > 0, "some answers have no score"

    for ours, theirs in ((trainer.model, oracle.policy), (trainer.critic, oracle.critic)):
        for (parameter_name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-5, msg=parameter_name)


@pytest.mark.slow
def test_pretraining_ends_when_the_error_on_the_evaluation_data_no_longer_falls(model_dir, critic_dir, tmp_path):
    """With a learning rate of 0 it never does: the third evaluation is the second that is not below the first."""
    trainer = make_trainer(
        model_dir,
        tmp_path,
        critic=critic_dir,
        rollout=None,
        critic_template="{problem}: {partial_solution} =",
        hint_momentum=None,
        critic_learning_rate=0.0,
        critic_pretraining_steps=20,
        critic_pretraining_patience=2,
        critic_validation_steps=3,
        eval_dataset=Dataset.from_dict({"prompt": ["ab", "q", "x y", "fgh"]}),
        per_device_eval_batch_size=2,
    )
    policy = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    assert trainer.pretrain_critic() == {"pretraining_steps": 7, "pretraining_rollouts": 7, "pretraining_done": 1}
    assert all(torch.equal(p, policy[name]) for name, p in trainer.model.state_dict().items())
    evaluations = [entry for entry in trainer.state.log_history if "eval_critic_pretraining/mse" in entry]
    errors = [entry["eval_critic_pretraining/mse"] for entry in evaluations]
    assert len(errors) == 3 and errors[0] == min(errors)
    # The same completions and answers each time. (What stands in for a value that is missing has moved.)
    parsed = {entry["eval_critic_pretraining/mse_of_parsed"] for entry in evaluations}
    assert len(parsed) == 1 and 0 < parsed.pop() < 1
    evaluated = [rollout for rollout in trainer.rollouts_seen if len(rollout["completion_ids"]) == 2]
    assert len(evaluated) == 2, "two batches, which the policy wrote once"
    assert (tmp_path / "critic" / "model.safetensors").is_file()


def test_the_pretraining_keeps_the_critic_with_the_lowest_error_and_no_copy_of_it(model_dir, critic_dir, tmp_path):
    errors = iter([0.2, 0.1, 0.3, 0.4])
    kept, copied = {}, []
    copy = tmp_path / "_best_critic"
    copy.mkdir()  # of an earlier run

    class Scripted(GenACTrainer):
        def validation_error(self):
            copied.append(copy.exists())
            super().validation_error()
            error = next(errors)
            kept[error] = {name: p.clone() for name, p in self.critic.state_dict().items()}
            return error

    trainer = make_trainer(
        model_dir,
        tmp_path,
        trainer=Scripted,
        critic=critic_dir,
        critic_pretraining_steps=20,
        critic_pretraining_patience=2,
        critic_validation_steps=1,
        eval_dataset=Dataset.from_dict({"prompt": ["ab", "q"]}),
        per_device_eval_batch_size=2,
        num_generations_eval=1,
    )
    trainer.pretrain_critic()
    assert copied == [False, True, True, True] and not copy.exists()
    for name, p in trainer.critic.state_dict().items():
        assert torch.equal(p, kept[0.1][name])
    assert any(not torch.equal(p, kept[0.4][name]) for name, p in trainer.critic.state_dict().items())
    saved = type(trainer.critic).from_pretrained(tmp_path / "critic").state_dict()
    assert all(torch.equal(p, kept[0.1][name]) for name, p in saved.items())


def test_the_age_of_answers_is_counted_in_updates(model_dir, critic_dir, tmp_path):
    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 4}
    trainer = make_trainer(model_dir, tmp_path, critic=critic_dir, **settings)
    trainer.train()
    ages = [entry["critic/answer_age"] for entry in trainer.state.log_history if "critic/answer_age" in entry]
    assert ages == [0, 1, 0, 1]


def test_a_critic_that_packing_cannot_serve_is_refused_and_trained_naively_when_asked(model_dir, tmp_path):
    critic = tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match="in one sequence"):
        make_trainer(model_dir, tmp_path, critic=critic)
    assert make_trainer(model_dir, tmp_path, critic=critic, critic_packing=False).critic is critic
