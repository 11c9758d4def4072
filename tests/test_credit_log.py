"""The tables that `log_credit=True` writes hold what each token was given, and change nothing else of a run."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from genac_runs import make_trainer as make_genac_trainer
from tiny import tiny_tokenizer
from vapo_runs import SETTINGS, make_trainer

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer, VAPOConfig, adjoint_trace
from trl_credit.credit_log import read_completions
from trl_credit.credit_log.log import token_texts
from trl_credit.credit_log.reader import CREDIT_FOLDER


LOGGED = {"log_credit": True, "log_credit_steps": 1}
TOKENIZER = tiny_tokenizer()


def tables(folder) -> dict[str, list[dict]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((folder / CREDIT_FOLDER).glob("*"))}


def letters(completions, **kwargs):
    return [len(set(text)) / 10 for text in completions]


def none_for_short(completions, **kwargs):
    return [1.0 if len(text) > 3 else None for text in completions]


class Seen(GRPOLambdaTrainer):
    """Keeps the terms of its losses, and its rollouts as they were sampled."""

    def assign_credit(self, rollout, rewards, mode):
        rollout = super().assign_credit(rollout, rewards, mode)
        self.__dict__.setdefault("rollouts_seen", []).append(rollout)
        return rollout

    def shape_loss(self, terms, mode):
        self.__dict__.setdefault("terms_seen", []).append((self._loss.inputs["completion_ids"], terms))
        return super().shape_loss(terms, mode)


def grpo_lambda(model_dir, folder, resume=None, trainer=Seen, **settings):
    config = {
        **{name: value for name, value in SETTINGS.items() if not name.startswith("critic")},
        "num_generations": 2,
        "trace_lambda": 0.9,
        "learning_rate": 1e-1,
        **settings,
    }
    trainer = trainer(
        model=str(model_dir),
        reward_funcs=[letters, none_for_short],
        args=GRPOLambdaConfig(str(folder), **config),
        train_dataset=Dataset.from_dict({"prompt": ["ab", "cd ef", "a", "b c d"]}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# --- What a table holds


def test_a_table_of_vapo_holds_values_and_advantages_of_trained_tokens_and_nothing_of_tool_tokens(model_dir, tmp_path):
    trainer = make_trainer(model_dir, tmp_path, critic_pretraining_steps=1, **LOGGED)
    trainer.train()
    ((name, rows),) = tables(tmp_path).items()
    assert (name, len(rows), [row["row"] for row in rows]) == ("step_0000000.parquet", 4, [0, 1, 2, 3])
    rollout, rewards = trainer.rollouts_seen[-1], trainer.rewards_seen[-1]  # the one before was the pretraining's
    assert len(trainer.rollouts_seen) == 2
    tools = 0
    for i, row in enumerate(rows):
        length = int(rollout["completion_mask"][i].sum())
        assert row["token_ids"] == rollout["completion_ids"][i, :length].tolist()
        assert "".join(row["tokens"]) == trainer.processing_class.decode(row["token_ids"])
        assert row["prompt"] == trainer.processing_class.decode(
            rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()]
        )
        assert row["reward"] == pytest.approx(rewards[i].item()) == row["rewards"]["share_of_even"]
        assert row["trained"] == trainer.trained_tokens(rollout)[i, :length].tolist()
        assert (row["method"], row["step"]) == ("VAPO", 0)
        for column, expected in (("value", rollout["values"]), ("advantage", rollout["advantages"])):
            for t, number in enumerate(row[column]):
                assert (number == pytest.approx(expected[i, t].item())) if row["trained"][t] else number != number
        tools += row["trained"].count(False)
        assert all((x == x) == trained for x, trained in zip(row["logp"], row["trained"], strict=True))
    assert tools >= 2


def test_numbers_of_the_loss_are_those_of_the_last_update_on_the_rollout(model_dir, tmp_path):
    trainer = grpo_lambda(model_dir, tmp_path, num_iterations=2, max_steps=2, **LOGGED)
    ((name, rows),) = tables(tmp_path).items()
    assert name == "step_0000000.parquet"
    rollout = trainer.rollouts_seen[0]
    ids, terms = trainer.terms_seen[-1]
    weights = adjoint_trace(torch.ones(terms.mask.shape), terms.mask, 0.9)
    moved = 0
    for i, row in enumerate(rows):
        length = len(row["token_ids"])
        (k,) = [k for k in range(4) if ids[k].equal(rollout["completion_ids"][i])]
        assert row["logp"] == pytest.approx(terms.logps[k, :length].tolist())
        assert row["ratio"] == pytest.approx(terms.log_ratio[k, :length].exp().tolist())
        assert row["weight"] == pytest.approx(weights[k, :length].tolist())
        assert row["advantage"] == [pytest.approx(rollout["advantages"][i].item())] * length
        assert all(0 <= x <= torch.tensor(float(len(TOKENIZER))).log() for x in row["entropy"])
        moved = max(moved, *(abs(x - 1) for x in row["ratio"]))
        assert row["rewards"]["letters"] == pytest.approx(
            len(set(TOKENIZER.decode(row["token_ids"], skip_special_tokens=True))) / 10
        )
    assert moved > 1e-3  # the second update saw another policy
    assert len({tuple(ids.tolist()) for ids in rollout["completion_ids"]}) == 4


def test_a_function_that_gave_no_reward_is_nan_and_the_others_count(model_dir, tmp_path):
    grpo_lambda(model_dir, tmp_path, **LOGGED)
    for row in tables(tmp_path)["step_0000000.parquet"]:
        long = len(TOKENIZER.decode(row["token_ids"], skip_special_tokens=True)) > 3
        assert (row["rewards"]["none_for_short"] == 1.0) == long
        assert row["reward"] == pytest.approx(row["rewards"]["letters"] + long)


def test_a_masked_truncated_completion_is_shown_and_not_credited(model_dir, tmp_path):
    grpo_lambda(
        model_dir, tmp_path, mask_truncated_completions=True, generation_kwargs={"min_new_tokens": 12}, **LOGGED
    )
    for row in tables(tmp_path)["step_0000000.parquet"]:
        assert len(row["tokens"]) == 12
        assert not any(row["trained"]) and all(x != x for x in row["advantage"])


def test_values_of_prompts_and_segments_of_completions_reach_the_reader(model_dir, tmp_path):
    class WithSegments(Seen):
        def assign_credit(self, rollout, rewards, mode):
            rollout = super().assign_credit(rollout, rewards, mode)
            self.add_credit("value", torch.arange(len(rewards)) / 4)
            ends = rollout["completion_mask"].sum(1).tolist()
            segment = {"value": 0.5, "advantage": -0.5, "reasoning": "<b>So far\x00 so good.</b>"}
            self.add_credit("segments", [[{"start": 0, "end": end, **segment}] for end in ends])
            return rollout

    grpo_lambda(model_dir, tmp_path, trainer=WithSegments, **LOGGED)
    completions, number = read_completions(tmp_path)
    assert number == 4 and [c.right for c in completions] == [c.reward > 0 for c in completions]
    for i, c in enumerate(completions):
        assert c.columns["value"] == [i / 4] * len(c.tokens)
        assert c.columns["value_change"] == [*[0.0] * (len(c.tokens) - 1), pytest.approx(c.reward - i / 4)]
        ((start, end, *_, reasoning),) = [list(segment.values()) for segment in c.segments]
        assert (start, end, reasoning) == (0, len(c.tokens), "<b>So far\x00 so good.</b>")
        assert c.method == "GRPO-λ" and c.rewards.keys() == {"letters", "none_for_short"} and not c.facts


def test_a_table_of_genac_has_the_critics_reasoning_and_the_value_of_each_segment(model_dir, tmp_path):
    trainer = make_genac_trainer(model_dir, tmp_path, max_steps=1, **LOGGED)
    trainer.train()
    completions, number = read_completions(tmp_path)
    assert number == 4
    for c in completions:
        assert [0, *(s["end"] for s in c.segments)] == [*(s["start"] for s in c.segments), len(c.tokens)]
        assert any(s["reasoning"] for s in c.segments)
        for s in c.segments:
            for t in range(s["start"], s["end"]):
                if c.trained[t] and s["value"] is not None:
                    assert c.columns["value"][t] == pytest.approx(s["value"])
                    assert c.columns["advantage"][t] == pytest.approx(s["advantage"])


@pytest.mark.parametrize("text", ["1+2=3", "héllo 🌍\x00<|im_end|>", "日本語", "e\u0301\u0323 \u202eabc"])
def test_tokens_joined_are_the_text_though_characters_span_tokens(text):
    ids = TOKENIZER(text)["input_ids"]
    texts = token_texts(TOKENIZER, ids)
    assert len(texts) == len(ids) and "".join(texts) == TOKENIZER.decode(ids)
    cut = token_texts(TOKENIZER, ids[:-1])
    assert "".join(cut) == TOKENIZER.decode(ids[:-1])


# --- How much is written, and when


def test_tables_are_bounded_by_steps_and_completions(model_dir, tmp_path):
    grpo_lambda(model_dir, tmp_path, max_steps=5, log_credit=True, log_credit_steps=3, log_credit_completions=3)
    assert {name: len(rows) for name, rows in tables(tmp_path).items()} == {
        "step_0000000.parquet": 3,
        "step_0000003.parquet": 3,
    }


def test_a_rollout_that_covers_several_steps_is_written_when_one_of_them_is_due(model_dir, tmp_path):
    settings = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = grpo_lambda(model_dir, tmp_path, max_steps=7, log_credit=True, log_credit_steps=3, **settings)
    # Rollouts are made at 0, 2, 4 and 6: the second one covers step 3, and the last was cut short.
    assert {name: len(rows) for name, rows in tables(tmp_path).items()} == {
        "step_0000000.parquet": 8,
        "step_0000002.parquet": 8,
        "step_0000006.parquet": 8,
    }
    last = tables(tmp_path)["step_0000006.parquet"]
    assert sum(row["logp"] is not None for row in last) == 4
    assert len(trainer.rollouts_seen) == 4


@pytest.mark.slow
def test_a_run_with_a_log_is_the_run_without_to_the_bit(model_dir, tmp_path):
    histories = []
    for name, log in (("with", LOGGED), ("without", {})):
        trainer = make_trainer(model_dir, tmp_path / name, critic_pretraining_steps=1, max_steps=3, rollout=None, **log)
        trainer.train()
        kept = [
            {k: v for k, v in entry.items() if "time" not in k and "runtime" not in k and "per_second" not in k}
            for entry in trainer.state.log_history
        ]
        histories.append((json.dumps(kept), [p.tolist() for p in trainer.model.parameters()]))
    assert histories[0] == histories[1]
    assert len(tables(tmp_path / "with")) == 3 and not (tmp_path / "without" / CREDIT_FOLDER).exists()


def test_a_resumed_run_leaves_earlier_tables_as_they_are_and_writes_each_later_one_once(model_dir, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", **LOGGED}
    grpo_lambda(model_dir, tmp_path, max_steps=4, **saved)
    before = tables(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / CREDIT_FOLDER).iterdir()}
    grpo_lambda(model_dir, tmp_path, resume=str(tmp_path / "checkpoint-2"), max_steps=4, **saved)
    assert json.dumps(tables(tmp_path)) == json.dumps(before)
    written = {path.name for path in (tmp_path / "_credit").iterdir() if path.stat().st_mtime_ns != times[path.name]}
    assert written == {"step_0000002.parquet", "step_0000003.parquet"}
    assert [path.name for path in tmp_path.glob("_credit*")] == ["_credit"]


def test_a_run_from_the_start_puts_the_tables_of_an_earlier_one_aside(model_dir, tmp_path):
    for steps in (2, 1, 1):
        grpo_lambda(model_dir, tmp_path, max_steps=steps, **LOGGED)
    assert {path.name: len(list(path.iterdir())) for path in tmp_path.glob("_credit*")} == {
        "_credit": 1,
        "_credit-1": 2,
        "_credit-2": 1,
    }


# --- Options


@pytest.mark.parametrize("config", [GRPOLambdaConfig, VAPOConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_credit": True, "log_credit_steps": 0}, "`log_credit_steps` must be a whole number of at least 1, got 0"),
        ({"log_credit": True, "log_credit_completions": 1.5}, "`log_credit_completions` must be a whole number of at"),
        ({"log_credit_steps": 5}, "`log_credit_steps=5` has no effect with `log_credit=False`"),
        ({"log_credit_completions": 5}, "`log_credit_completions=5` has no effect with `log_credit=False`"),
    ],
)
def test_bad_options_are_refused(config, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), bf16=False, **settings)
