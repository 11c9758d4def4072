"""Checks of what continues completions and scores them beside a rollout."""

import contextlib
import importlib
import inspect
from types import SimpleNamespace

from .run import SETTINGS, check, count_letters


@check
def texts_are_continued_by_their_tokens(run):
    trainer, prefixes = run.trainer, [[65, 66], [67]]
    trainer.generation_config.max_new_tokens = 2
    try:
        written, _ = trainer._generate_single_turn(prefixes, None, {}, 1)
    except (AttributeError, TypeError, ValueError) as error:
        raise AssertionError(f"`_generate_single_turn` does not take (texts, None, {{}}, 1): {error}") from error
    finally:
        trainer.generation_config.max_new_tokens = SETTINGS["max_completion_length"]
    assert [len(list(tokens)) <= 2 for tokens in written] == [True, True], (
        "`_generate_single_turn` does not return the ids of at most `max_new_tokens` of `generation_config`"
    )


@check
def vllm_is_asked_in_the_same_place(run):
    trainer, asked, synced = run.trainer, [], []

    def generate(prompts, **kwargs):
        asked.append(prompts)
        return None, [[68], [69]], [[[0.0]], [[0.0]]], None

    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = SimpleNamespace(generate=generate, sync_weights=lambda: synced.append(True))
    try:
        written, _ = trainer._generate_single_turn([[65, 66], [67]], None, {}, 1)
        trainer._generate_single_turn([[68]], None, {}, 1)
    except AttributeError as error:
        raise AssertionError(
            f"`vllm_generation` and `_last_loaded_step` are not what a run with vLLM asks: {error}"
        ) from error
    finally:
        trainer.use_vllm = False
        del trainer.vllm_generation
    assert asked == [[[65, 66], [67]], [[68]]], "`use_vllm` does not say whether `vllm_generation` is asked"
    assert synced == [True], "`_last_loaded_step` does not say whether vLLM has the policy's weights"
    assert written == [[68], [69]], "`_generate_single_turn` does not return what vLLM wrote"


@check
def vllm_is_given_the_policy_again_when_it_may_have_lost_it(run):
    trainer, synced = run.trainer, []
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = SimpleNamespace(
        generate=lambda prompts, **kwargs: (None, [[68]], [[[0.0]]], None), sync_weights=lambda: synced.append(True)
    )
    try:
        trainer._generate_single_turn([[65, 66]], None, {}, 1)
    finally:
        trainer.use_vllm = False
        del trainer.vllm_generation
    assert synced, "`_last_loaded_step` does not say whether vLLM is given the policy's weights"


@check
def vllm_can_be_lent():
    source = inspect.getsource(importlib.import_module("trl.generation.vllm_generation").VLLMGeneration)
    for name in ("def _init_vllm(self)", "self.llm = ", "self.tp_group, ", "self.vllm_client = "):
        assert name in source, f"`VLLMGeneration` does not have its engine by `{name}`"
    assert "self._llm_weights_sleeping = True" in source, "`VLLMGeneration` does not know that its weights are lost"


@check
def vllm_reads_its_limit_when_it_is_asked():
    source = inspect.getsource(importlib.import_module("trl.generation.vllm_generation").VLLMGeneration.generate)
    assert "self.max_completion_length" in source, "`max_completion_length` of `VLLMGeneration` is not read there"


@check
def completions_of_a_rollout_function_become_what_rewards_are_given(run):
    trainer = run.trainer
    ids = {"prompt_ids": [[65], [66]], "completion_ids": [[67, 68], [69]], "logprobs": None}
    trainer.rollout_func = lambda prompts, trainer: ids
    try:
        results = trainer._generate(["a", "b"])
    except AttributeError as error:
        raise AssertionError(f"`_generate` is gone: {error}") from error
    finally:
        trainer.rollout_func = None
    expected = [trainer.processing_class.decode(row) for row in ids["completion_ids"]]
    assert isinstance(results, tuple) and len(results) > 3 and results[3] == expected, (
        "`_generate` does not return the completions as fourth"
    )
    assert trainer.reward_funcs == [count_letters]


@check
def gradient_checkpointing_can_be_off_for_a_while():
    function = getattr(importlib.import_module("trl.models.utils"), "disable_gradient_checkpointing", None)
    assert function is not None, "`trl.models.utils` has no `disable_gradient_checkpointing` any more"
    try:
        context = function(SimpleNamespace(is_gradient_checkpointing=False), None)
    except TypeError as error:
        raise AssertionError(f"`disable_gradient_checkpointing` does not take (model, kwargs): {error}") from error
    assert isinstance(context, contextlib.AbstractContextManager), "`disable_gradient_checkpointing` is no context"
