"""One contract for critics: the trainer, the report and the callback ask the same, and a saved critic says what."""

import json
import math
from pathlib import Path

import genac_runs
import pytest
import sppo_runs
import torch
import vapo_runs
from datasets import Dataset, load_dataset
from sppo_runs import CONVERSATIONS, critic_dir
from tiny import tiny_tokenizer

from trl_credit import CriticProbeCallback
from trl_credit.critic_report import (
    GenerativeCritic,
    ProbeSettings,
    PromptCritic,
    TokenCritic,
    draw_probes,
    load_policy,
)
from trl_credit.critics.critic import PROMPTS
from trl_credit.critics.facts import FACTS_FILE, CriticFacts
from trl_credit.critics.loading import load_critic
from trl_credit.scripts.genac_sft import CriticSFTTrainer, GenACSFTConfig
from trl_credit.segmenting import DelimiterSegmenter
from trl_credit.trainers.genac.traces import GenACTracesConfig, TraceCollector


@pytest.fixture(scope="module")
def critics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critics")
    return {"sppo": critic_dir(folder / "sppo"), "genac": genac_runs.fit_critic(folder / "genac")}


def eval_data(prompts=vapo_runs.PROMPTS):
    return Dataset.from_dict({"prompt": prompts})


def runs_of(name, model_dir, critics, folder, **settings):
    settings = {"eval_dataset": eval_data(), "per_device_eval_batch_size": 8, "num_generations_eval": 1, **settings}
    if name == "vapo":
        data = settings.pop("eval_dataset")
        trainer = vapo_runs.make_trainer(model_dir, folder, critic_initial_value=0.3, **settings)
        trainer.eval_dataset = data
        return trainer
    module = {"sppo": sppo_runs, "genac": genac_runs}[name]
    return module.make_trainer(model_dir, folder, critic=settings.pop("critic", critics[name]), **settings)


def seen(trainer):
    """A rollout of an evaluation as the trainer saw it, and with it as anyone would give it."""
    trainer.evaluate()
    rollout = trainer.rollouts_seen[-1]
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
    given = {name: rollout[name] for name in names if name in rollout}
    return rollout, {**given, PROMPTS: [row["prompt"] for row in trainer.rollout_rows]}


def beyond(rollout):
    columns = torch.arange(rollout["completion_ids"].shape[1] + 1)
    return columns > rollout["completion_mask"].sum(1, keepdim=True)


# --- The values


def test_the_values_of_vapo_are_those_that_its_credit_is_made_of(model_dir, critics, tmp_path):
    trainer = runs_of("vapo", model_dir, critics, tmp_path, max_steps=2, critic_learning_rate=1e-2)
    trainer.train()
    rollout, given = seen(trainer)
    values = trainer.state_values(given)
    assert values.shape == (8, rollout["completion_ids"].shape[1] + 1) and values.dtype == torch.float32
    assert torch.equal(values.isnan(), beyond(rollout)) and beyond(rollout).any()
    mask = rollout["critic_mask"]
    assert torch.equal(values[:, :-1][mask], rollout["values"][mask]) and len(values[~values.isnan()].unique()) > 8


def test_the_values_of_sppo_are_those_that_its_credit_is_made_of(model_dir, critics, tmp_path):
    trainer = runs_of("sppo", model_dir, critics, tmp_path, reward_range=[-1, 1])
    trainer.train()
    rollout, given = seen(trainer)
    values = trainer.state_values(given)
    assert torch.equal(values[:, 0], rollout["values"]) and len(values[:, 0].unique()) > 1
    held = torch.where(beyond(rollout), torch.nan, rollout["values"].unsqueeze(1))
    assert torch.allclose(values, held, rtol=0, atol=0, equal_nan=True)


def test_the_values_of_genac_hold_up_to_the_next_state_and_are_nan_where_nothing_was_read(model_dir, critics, tmp_path):
    trainer = runs_of("genac", model_dir, critics, tmp_path)
    rollout, given = seen(trainer)
    values = trainer.state_values(given)
    read = unread = 0
    for row, reading in zip(values, rollout["readings"], strict=True):
        bounds = [*reading.starts, reading.ends[-1] + 1]
        for score, start, end in zip(reading.scores, bounds, bounds[1:], strict=False):
            if score is None:
                assert row[start:end].isnan().all()
                unread += 1
            else:
                assert row[start:end].tolist() == pytest.approx([score] * (end - start))
                read += 1
        assert row[bounds[-1] :].isnan().all()
    assert read > 8 and unread > 0
    state = torch.random.get_rng_state()
    assert torch.allclose(trainer.state_values(given), values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert trainer.critic_reader.parse_rate == pytest.approx(read / (read + unread))


# --- Another who loads the critic


def saved(trainer):
    trainer.save_model()
    return f"{trainer.args.output_dir}/critic"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vapo", {}),
        ("sppo", {"reward_range": [-1, 2], "prompts": CONVERSATIONS, "eval_dataset": eval_data(CONVERSATIONS)}),
        ("sppo", {"critic_loss": "mse", "critic": None}),
        ("genac", {"actor_description": "Somebody", "critic_temperature": 0.7, "seed": 5}),
    ],
)
def test_a_critic_by_its_folder_alone_is_asked_what_the_trainer_asked(name, settings, model_dir, critics, tmp_path):
    trainer = runs_of(name, model_dir, critics, tmp_path, **settings)
    trainer.train()
    _, given = seen(trainer)
    expected = trainer.state_values(given)
    again = load_critic(saved(trainer), tiny_tokenizer(), dtype="float32")
    assert type(again) is {"vapo": TokenCritic, "sppo": PromptCritic, "genac": GenerativeCritic}[name]
    if name == "genac":
        again.seed = trainer.args.seed
        assert again.success_rate == trainer.success_rate.value > 0
    assert torch.allclose(again.state_values(given), expected, rtol=0, atol=1e-6, equal_nan=True)


def test_a_saved_critic_says_what_it_is(model_dir, critics, tmp_path):
    trainer = runs_of("genac", model_dir, critics, tmp_path / "one", max_segments=4)
    trainer.train()
    facts = json.loads(Path(saved(trainer), FACTS_FILE).read_text())
    assert facts["kind"] == "generative" and facts["updates"] == 1 and facts["vocabulary_size"] == 259
    assert facts["settings"] == {
        "critic_template": genac_runs.TEMPLATE,
        "actor_description": trainer.question.actor_description,
        "reward_range": [0.0, 1.0],
        "segment_min_length": 1,
        "segment_target_length": 3,
        "segment_max_length": 5,
        "max_segments": 4,
        "hint_momentum": 0.9,
        "critic_temperature": 1.0,
        "critic_max_completion_length": 24,
    }
    assert facts["hint"]["success_rate"] == list(trainer.success_rate)
    assert facts["context"] == 512 and facts["tokenizer"]["size"] == len(tiny_tokenizer())
    later = runs_of("genac", model_dir, critics, tmp_path / "two", critic=saved(trainer))
    later.train()
    assert json.loads(Path(saved(later), FACTS_FILE).read_text())["updates"] == 2


def test_a_later_stage_asks_the_same_question_or_says_why_not(model_dir, critics, tmp_path):
    first = runs_of("genac", model_dir, critics, tmp_path / "one", actor_description="A pupil", max_segments=3)
    first.train()
    folder = saved(first)
    defaults = {
        name: getattr(type(first.args)("x", use_cpu=True, bf16=False), name)
        for name in ("segment_min_length", "segment_target_length", "segment_max_length", "critic_template")
    }
    defaults["critic_max_completion_length"] = 1024
    later = runs_of("genac", model_dir, critics, tmp_path / "two", critic=folder, **defaults)
    assert later.question.template == genac_runs.TEMPLATE and later.question.actor_description == "A pupil"
    assert later.question.segmenter == DelimiterSegmenter(1, 3, 5, 3)
    assert later.args.critic_max_completion_length == 24
    assert later.success_rate == first.success_rate and later.mean_value == first.mean_value
    for option, other in (
        ("critic_template", "{problem} {success_rate} {partial_solution}?"),
        ("segment_target_length", 4),
        ("critic_temperature", 0.5),
        ("hint_momentum", None),
    ):
        others = {option: other}
        if option == "hint_momentum":
            others["critic_template"] = None
        with pytest.raises(ValueError, match=rf"`{option}=.*is asked for, but the critic .*was trained with"):
            runs_of("genac", model_dir, critics, tmp_path / "three", critic=folder, **others)
    with pytest.raises(ValueError, match="is now to be asked about segments by `test_critic_contract.whole`"):
        runs_of("genac", model_dir, critics, tmp_path / "three", critic=folder, segmenter=whole)
    with pytest.raises(ValueError, match="`critic_max_completion_length=9` is asked for"):
        GenerativeCritic.from_pretrained(folder, tiny_tokenizer(), max_completion_length=9)


def whole(token_ids, tokenizer, trainable=None):
    return [len(token_ids)] if len(token_ids) else []


def test_a_critic_of_another_kind_is_refused_by_both_names(model_dir, critics, tmp_path):
    trainer = runs_of("sppo", model_dir, critics, tmp_path / "one")
    trainer.train()
    folder = saved(trainer)
    message = r"a critic of prompts \(SPPO\), as its critic.json says, and a critic of tokens \(VAPO, PPO\) is needed"
    with pytest.raises(ValueError, match=message):
        runs_of("vapo", model_dir, critics, tmp_path / "two", critic=folder)
    with pytest.raises(ValueError, match=message):
        TokenCritic.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"a critic of prompts \(SPPO\), .* a generative critic \(GenAC\) is needed"):
        load_critic(folder, tiny_tokenizer(), kind="generative")
    with pytest.raises(ValueError, match=r"`reward_range=\[0.0, 2.0\]` is asked for, but .* with \[0.0, 1.0\]"):
        PromptCritic.from_pretrained(folder, reward_range=[0.0, 2.0])


def test_a_checkpoint_of_0_2_0_and_a_model_that_is_no_critic_have_no_facts(model_dir):
    assert CriticFacts.load(model_dir) is None and CriticFacts.load(torch.nn.Linear(1, 1)) is None


# --- The callback


@pytest.mark.slow
def test_the_callback_measures_a_critic_that_writes_and_changes_nothing(model_dir, critics, tmp_path):
    rows = [{"prompt": prompt} for prompt in vapo_runs.PROMPTS[:2]]
    settings = ProbeSettings(completions=1, continuations=2, candidates=0, max_completion_length=8)
    probes = draw_probes(tmp_path / "probes", load_policy(str(model_dir)), rows, sppo_runs.share_of_even, settings)
    logs = []
    for callback in (True, False):
        trainer = runs_of("genac", model_dir, critics, tmp_path / str(callback), max_steps=3)
        if callback:
            trainer.add_callback(CriticProbeCallback(trainer, probes, every_n_steps=1))
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    with_it, without = logs
    assert all(0 < entry["critic_probe/parse_rate"] <= 1 for entry in with_it)
    assert all(math.isfinite(entry["critic_probe/mse"]) for entry in with_it)
    for one, other in zip(with_it, without, strict=True):
        assert {k: v for k, v in one.items() if "probe" not in k and "time" not in k} == {
            k: v for k, v in other.items() if "time" not in k
        }


# --- From stage to stage


def test_what_stage_1_asks_the_oracle_goes_on_to_the_stages_after_it(model_dir, critics, tmp_path, monkeypatch):
    settings = {**vapo_runs.SETTINGS, **genac_runs.GENAC, "max_steps": -1, "critic_max_completion_length": 80}
    traces = TraceCollector(
        model=str(model_dir),
        reward_funcs=genac_runs.share_of_even,
        args=GenACTracesConfig(str(tmp_path), actor_description="A pupil", **settings),
        train_dataset=eval_data(),
        rollout_func=vapo_runs.fixed_rollout,
        oracle=lambda state: f"Well. <score>{round(10 * state.success_rate)}</score>",
    )
    traces.train()
    folder = tmp_path / "dataset"
    rate = traces.states()[0].success_rate
    data = load_dataset(str(folder), split="train")
    assert data.column_names == ["prompt", "completion"] and len(data) == len(traces.states())

    monkeypatch.setattr(CriticSFTTrainer, "traces", str(folder))
    common = {"bf16": False, "use_cpu": True, "report_to": [], "max_steps": 1, "gradient_checkpointing": False}
    sft = CriticSFTTrainer(critics["genac"], GenACSFTConfig(str(tmp_path / "sft"), **common), train_dataset=data)
    sft.save_model()
    later = genac_runs.make_trainer(
        model_dir,
        tmp_path / "two",
        critic=str(tmp_path / "sft"),
        critic_template=None,
        critic_max_completion_length=1024,
    )
    assert later.question.template == genac_runs.TEMPLATE and later.question.actor_description == "A pupil"
    assert later.args.critic_max_completion_length == 80
    assert later.success_rate.value == pytest.approx(rate) and later.mean_value.weight == 0
