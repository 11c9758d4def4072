"""Which completions were cut off: those without room for another token, not all that end without EOS."""

import importlib.resources
import json
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from test_models import noisy_critic, ones
from test_trl_options import multiply
from tiny import tiny_model_dir
from vapo_runs import LENGTH, SETTINGS, Watched, make_trainer

from trl_credit import VAPOConfig
from trl_credit.seam.user_functions import stop_token_ids


def writes(completions, prompt_tokens=3, **more):
    """A rollout function that answers with these."""

    def rollout(prompts, trainer):
        ids = completions(trainer.processing_class.eos_token_id)
        return {
            "prompt_ids": [[65] * prompt_tokens for _ in prompts],
            "completion_ids": ids,
            "logprobs": [[0.0] * len(row) for row in ids],
            **more,
        }

    return rollout


def run(model_dir, folder, rollout, **settings):
    trainer = make_trainer(model_dir, folder, ones, rollout, critic=noisy_critic(), **settings)
    trainer.train()
    (credited,) = trainer.rollouts_seen
    return trainer, credited


# A stop string of vLLM leaves tokens like those of a rollout function that ends by itself: the last is no EOS.
ENDED, STOPPED, CUT, EXACT = range(4)


def four_ends(eos):
    return [[66, 67, eos], [66, 67, 68], [67] * LENGTH, [68] * (LENGTH - 1) + [eos]]


@pytest.mark.parametrize("truncation", ["bootstrap", "terminal"])
def test_only_what_has_no_room_left_goes_on_with_the_critics_value(truncation, model_dir, tmp_path):
    settings = {"policy_lambda": 0.0, "truncation": truncation}
    trainer, rollout = run(model_dir, tmp_path, writes(four_ends), **settings)
    assert trainer.is_cut_off(rollout).tolist() == [False, False, True, False]
    # λ = 0: the last advantage is the reward less the value of the last state, where nothing comes after it.
    last = rollout["critic_mask"].sum(1, keepdim=True) - 1
    after = (rollout["advantages"] + rollout["values"]).gather(1, last).squeeze(1) - 1
    assert after[[ENDED, STOPPED, EXACT]].abs().max() < 1e-6
    assert (after[CUT].abs() > 1e-3) == (truncation == "bootstrap")


def test_masking_truncated_completions_is_trls_and_masks_what_a_stop_string_ended(model_dir, tmp_path):
    trainer, rollout = run(model_dir, tmp_path, writes(four_ends), mask_truncated_completions=True)
    assert rollout["completion_mask"].any(1).tolist() == [True, False, False, True]
    assert not trainer.is_cut_off(rollout).any()
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == 0.5


@pytest.mark.parametrize(("prompt_tokens", "is_cut_off"), [(504, False), (505, True)])
def test_the_end_of_the_context_is_want_of_room(prompt_tokens, is_cut_off, model_dir, tmp_path):
    rollout = writes(lambda eos: [[66] * 7] * 4, prompt_tokens)
    trainer, rollout = run(model_dir, tmp_path, rollout)
    assert trainer.model.config.max_position_embeddings == 512
    assert trainer.is_cut_off(rollout).tolist() == [is_cut_off] * 4


def test_a_smaller_room_for_vllm_is_vllms(model_dir, tmp_path):
    trainer, rollout = run(model_dir, tmp_path, writes(lambda eos: [[66] * 7] * 4), vllm_max_model_length=10)
    assert not trainer.is_cut_off(rollout).any()
    trainer.use_vllm = True  # the tokens are those that vLLM would stop at
    assert trainer.is_cut_off(rollout).all()


def test_without_a_limit_all_that_lacks_eos_is_cut_off(model_dir, tmp_path):
    trainer, rollout = run(model_dir, tmp_path, writes(four_ends), max_completion_length=None)
    assert trainer.is_cut_off(rollout).tolist() == [False, True, True, False]


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens"])
def test_a_limit_in_generation_kwargs_is_the_room(name, model_dir, tmp_path):
    rollout = writes(lambda eos: [[66] * 3, [66] * 4, [66] * 5, [66, eos]])
    trainer = make_trainer(model_dir, tmp_path, ones, rollout, critic=noisy_critic())
    trainer.args.generation_kwargs = {name: 4}
    trainer.train()
    assert trainer.is_cut_off(trainer.rollouts_seen[0]).tolist() == [False, True, True, False]


# --- Tokens of the user's that end completions


def test_a_token_that_generation_stops_at_is_an_end_and_no_padding_is_trained(model_dir, tmp_path):
    stops = list(range(60))
    trainer, rollout = run(model_dir, tmp_path, None, generation_kwargs={"eos_token_id": stops})
    eos, pad = trainer.processing_class.eos_token_id, trainer.processing_class.pad_token_id
    assert trainer.eos_token_ids == [eos, *stops] and pad not in trainer.eos_token_ids
    mask = rollout["completion_mask"].bool()
    assert not mask.all() and (rollout["completion_ids"][mask] != pad).all()
    last = rollout["completion_ids"].gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1).tolist()
    assert any(token in stops for token in last)
    assert trainer.is_cut_off(rollout).tolist() == [token not in (eos, *stops) for token in last]


def test_stop_tokens_are_read_by_both_names():
    assert stop_token_ids({"eos_token_id": 5, "temperature": 1.0}) == [5]
    assert stop_token_ids({"stop_token_ids": [6, 7]}) == [6, 7]
    assert stop_token_ids({"eos_token_id": None}) == stop_token_ids(None) == []


# --- Tools


@pytest.mark.slow
def test_a_tool_whose_answer_fits_exactly_leaves_no_room_and_one_that_does_not_fit_is_left_out(tmp_path):
    template = (importlib.resources.files("trl") / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
    model_dir = str(tiny_model_dir(tmp_path, chat_template=template, max_position_embeddings=2048))
    call, tool_end = calls_a_tool(model_dir, tmp_path / "1", room=400)[1:]
    assert 0 < call < tool_end < 400
    for room, is_cut_off, length in (
        (400, False, tool_end + 4),
        (tool_end, True, tool_end),
        (tool_end - 1, False, call),
    ):
        trainer, *_ = calls_a_tool(model_dir, tmp_path / "2", room)
        (rollout,) = trainer.rollouts_seen
        assert rollout["completion_mask"].sum(1).tolist() == [length] * 4
        assert trainer.is_cut_off(rollout).tolist() == [is_cut_off] * 4


def calls_a_tool(model_dir, folder, room):
    """A step on completions that call a tool and then say no; tokens up to the call's end, and to its answer's."""
    config = VAPOConfig(str(folder), **{**SETTINGS, "max_completion_length": room})
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Go."}]] * 4})
    trainer = Watched(model_dir, ones, config, train_dataset=prompts, tools=[multiply])
    tokenizer = trainer.processing_class
    call = json.dumps({"name": "multiply", "arguments": {"a": 6, "b": 7}})
    said = iter([f"<tool_call>\n{call}\n</tool_call><|im_end|>", "No.<|im_end|>"])

    def write(input_ids, **kwargs):
        return torch.cat([input_ids, torch.tensor([tokenizer(next(said))["input_ids"]] * len(input_ids))], 1)

    with patch.object(trainer.model, "generate", write):
        trainer.train()
    is_tool = (trainer.rollouts_seen[0]["tool_mask"][0] == 0).nonzero()[:, 0].tolist()
    return trainer, is_tool[0] if is_tool else 0, is_tool[-1] + 1 if is_tool else 0
