import os
from dataclasses import dataclass, field
from typing import Any

from ....options import above, at_least, between
from ..genac_config import GenACConfig


@dataclass
class GenACTracesConfig(GenACConfig):
    r"""
    Configuration class for the [`TraceCollector`].

    This class includes only what concerns the oracle and its traces. The parameters of [`GenACConfig`] set what the
    critic will be asked, such as segments and template; those of [`~trl.GRPOConfig`] set how solutions are sampled.
    Nothing is trained: loss and optimizer parameters have no effect.

    Args:
        oracle (`str`, *optional*):
            Who is asked about the states: the base URL of an OpenAI-compatible endpoint (`"https://…/v1"`), a function
            (`"module:function"`) from a [`~trl_credit.trainers.genac.traces.oracle.State`] to a trace, or a file of
            traces (`"….jsonl"`, rows with `query` and `trace`), in which case nothing is sampled. Default: nobody; only
            `states.jsonl` is written.
        oracle_model (`str`, *optional*):
            Name of the model at the endpoint.
        oracle_api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the endpoint's key. Without it no key is sent.
        oracle_request (`dict`, *optional*):
            Further fields of the requests to the endpoint, e.g. `{"max_completion_tokens": 1024}`.
        oracle_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds of silence after which a request to the endpoint counts as failed.
        oracle_concurrency (`int`, *optional*):
            Number of queries in flight at a time. Default: 8 for an endpoint, 1 for a function.
        oracle_retries (`int`, *optional*, defaults to `8`):
            How often a query is retried when the endpoint cannot be reached, is busy or sends no answer, after 1, 2, 4,
            … and at most 60 seconds.
        max_traces (`int`, *optional*):
            Maximum number of states to ask about, drawn from all. Default: all.
        min_trace_length (`int`, *optional*, defaults to `1`):
            Shortest trace that is kept, in tokens of the critic. The longest is `critic_max_completion_length`.
        max_disagreement (`float`, *optional*):
            Keep a trace only if its value is at most this far from the mean reward of the solutions that went through
            its state. Default: keep all.
        num_generations (`int`, *optional*, defaults to `1`):
            Solutions per prompt.
        num_train_epochs (`float`, *optional*, defaults to `1.0`):
            Passes over the prompts. `max_steps`, if set, bounds the number of rollouts instead.
    """

    _VALID_DICT_FIELDS = GenACConfig._VALID_DICT_FIELDS + ["oracle_request"]

    restricted = GenACConfig.restricted | {"push_to_hub": ((False,), "has no effect: what is made is a data set")}

    oracle: str | None = None
    oracle_model: str | None = None
    oracle_api_key_env: str = "OPENAI_API_KEY"
    oracle_request: dict | str | None = None
    oracle_timeout: float = field(default=600.0, metadata=above(0))
    oracle_concurrency: int | None = field(default=None, metadata=at_least(1))
    oracle_retries: int = field(default=8, metadata=at_least(0))
    max_traces: int | None = field(default=None, metadata=at_least(1))
    min_trace_length: int = field(default=1, metadata=at_least(0))
    max_disagreement: float | None = field(default=None, metadata=between(0, 1))
    num_generations: int | None = 1
    num_train_epochs: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self._check_oracle()

    def _check_oracle(self) -> None:
        name = self.oracle or ""
        if name and not (self.asks_endpoint or self.is_file or name.count(":") == 1):
            raise ValueError(
                f"GenACTracesConfig: `oracle` must be a URL, a function ('module:function') or a file ('….jsonl'), got "
                f"{name!r}."
            )
        if self.asks_endpoint != (self.oracle_model is not None):
            raise ValueError(
                f"GenACTracesConfig: `oracle_model={self.oracle_model!r}` with `oracle={self.oracle!r}`: an endpoint, "
                "and nothing else, needs the name of its model."
            )
        if self.oracle_request is not None and not self.asks_endpoint:
            raise ValueError("GenACTracesConfig: `oracle_request` has no effect without an endpoint.")

    @property
    def asks_endpoint(self) -> bool:
        """Whether the oracle is an endpoint."""
        return (self.oracle or "").startswith(("http://", "https://"))

    @property
    def is_file(self) -> bool:
        """Whether the oracle is a file of traces."""
        return (self.oracle or "").endswith(".jsonl")

    @property
    def endpoint(self) -> dict[str, Any]:
        """Arguments of the [`~trl_credit.trainers.genac.traces.oracle.Endpoint`]."""
        return {
            "model": self.oracle_model,
            "api_key": os.environ.get(self.oracle_api_key_env),
            "timeout": self.oracle_timeout,
            "request": self.oracle_request or {},
        }
