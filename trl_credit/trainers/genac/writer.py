"""What writes the critic's answers: transformers, the policy's vLLM, or one of the critic's own."""

import math
from functools import cached_property
from typing import Any

from torch import nn

from ...critics.generative.prefixes import StatePrompt, keeps_prefixes
from ...seam.lent_engine import why_not_lent


# States of a completion from which on answers by transformers take most of a step.
_MANY_STATES = 8


class Writer:
    """
    Writes the critic's answers in a run.

    Args:
        trainer ([`GenACTrainer`]):
            The trainer.
        network (`nn.Module`):
            The critic's network.

    `vllm` is which vLLM writes, as in `critic_vllm_mode`, `None` where transformers does; `context` is what its context
    was limited to.
    """

    def __init__(self, trainer: Any, network: nn.Module):
        self.trainer, self.args = trainer, trainer.args
        self.vllm = self._choose(network)
        self.reads_prefixes_once = self.vllm is not None or keeps_prefixes(network)
        own = self.args.critic_vllm_max_model_length
        self.context: int | None = self.args.vllm_max_model_length if self.vllm == "policy" else own
        self._updates = -1  # of the weights that an engine of the critic's own has

    def _choose(self, network: nn.Module) -> str | None:
        trainer, asked, mode = self.trainer, self.args.critic_use_vllm, self.args.critic_vllm_mode
        if asked is False or (asked is None and mode is None and not trainer.use_vllm):
            return None
        if mode in ("colocate", "server"):
            return mode
        reason: str | None = "the policy does not use vLLM"
        if trainer.use_vllm:
            reason = why_not_lent(trainer.accelerator.unwrap_model(trainer.model), network)
        if reason is None:
            return "policy"
        if mode == "policy":
            raise ValueError(f"`critic_vllm_mode='policy'` cannot be: {reason}. Choose another mode, or leave it out.")
        return None if asked is None and trainer.vllm_mode == "server" else "colocate"

    def warn(self, head: int) -> None:
        """
        Say what the answers will cost where that is much, and what of it cannot be had.

        Args:
            head (`int`):
                Tokens of a question about a completion of none.
        """
        args, warn_once, length = self.args, self.trainer.warn_once, self.trainer.max_completion_length
        states = min(math.ceil(length / args.segment_target_length), args.max_segments or math.inf)
        if self.vllm is None and (self.trainer.use_vllm or states > _MANY_STATES):
            shared, read = "what they share is read once", head + length
            if not self.reads_prefixes_once:
                shared, read = "each reads its prompt in full", states * (head + length / 2)
            warn_once(
                f"The critic's answers are written by transformers, token by token. A completion of {length} tokens "
                f"has about {states} states; {shared}, {read / length:.1f} times its tokens, and up to "
                f"{states * args.critic_max_completion_length / length:.1f} times its tokens are written. This will be "
                "most of a step. With `use_vllm` the policy's engine writes for a critic of its architecture, too; "
                "`critic_vllm_mode` has other ways."
            )
        if self.vllm == "colocate" and self.trainer.use_vllm and args.vllm_enable_sleep_mode:
            warn_once(
                "vLLM lets one engine of a process sleep, and that is the policy's. The critic's holds its share of "
                f"the GPU (`critic_vllm_gpu_memory_utilization={args.critic_vllm_gpu_memory_utilization}`) always."
            )
        if self.vllm == "policy" and self.context and self.context < length + args.critic_max_completion_length:
            warn_once(
                f"The critic writes with the policy's vLLM, whose context is `vllm_max_model_length={self.context}`: "
                f"too short for a question about {length} tokens and an answer of {args.critic_max_completion_length}. "
                "It will not be asked about the last states of long completions. Raise it, or set `critic_vllm_mode`."
            )

    def write(self, prompts: list[StatePrompt]) -> list[list[int]]:
        """Answers to questions, on every process."""
        return self._with_transformers(prompts) if self.vllm is None else self._with_vllm(prompts)

    def _with_transformers(self, prompts: list[StatePrompt]) -> list[list[int]]:
        trainer, engine, critic = self.trainer, self.trainer.engine, self.trainer.critic_reader
        chunks, synced = critic.chunks(prompts), engine.backend.splits_weights
        if synced:
            chunks += [[]] * (trainer.most(len(chunks)) - len(chunks))
        with trainer.unwrapped_for_generation(engine.module, engine.checkpointing_kwargs) as network:
            return engine.evaluate(lambda _: critic.sample(network, prompts, chunks, synced))

    def _with_vllm(self, prompts: list[StatePrompt]) -> list[list[int]]:
        trainer, texts = self.trainer, [prompt.ids for prompt in prompts]
        if self.vllm == "policy" or self._updates != trainer.engine.steps:
            with trainer.engine.backend.turn():
                self.generation.sync_weights()
            self._updates = trainer.engine.steps
        filler = [[trainer.critic_processing_class.eos_token_id]] * (trainer.most(len(texts)) - len(texts))
        _, answers, *_ = self.generation.generate(texts + filler, None, num_generations=1)
        return [list(answer) for answer in answers[: len(prompts)]]

    @cached_property
    def generation(self) -> Any:
        """TRL's `VLLMGeneration` with the critic's network, made when the critic has its place in memory."""
        trainer, args = self.trainer, self.args
        network, tokenizer = trainer.engine.network, trainer.critic_processing_class
        answers = {
            "temperature": args.critic_temperature,
            "max_completion_length": args.critic_max_completion_length,
            "generation_kwargs": {"stop_token_ids": sorted(trainer.critic_reader.ends)},
        }
        if self.vllm == "policy":
            return trainer.vllm_of_policy(network, tokenizer, **answers)
        return trainer.vllm_beside(
            network,
            tokenizer,
            mode=self.vllm,
            server_base_url=args.critic_vllm_server_base_url,
            group_port=args.critic_vllm_group_port,
            gpu_memory_utilization=args.critic_vllm_gpu_memory_utilization,
            max_model_length=args.critic_vllm_max_model_length,
            **answers,
        )
