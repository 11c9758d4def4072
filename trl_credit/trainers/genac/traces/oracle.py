"""The oracle that reasons about the states: a function, or a model behind an OpenAI-compatible endpoint."""

import email.utils
import http.client
import importlib
import inspect
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class OracleError(RuntimeError):
    """The oracle cannot be asked, now or at all: ends the run."""


class Unavailable(OracleError):
    """The oracle may answer later: down, busy, too slow, or it sent what is not an answer."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class Refused(OracleError):
    """The oracle will not answer this query, but perhaps others."""


@dataclass(frozen=True)
class State:
    """
    What the oracle is asked about.

    Args:
        query (`str`):
            The critic's prompt, as rendered from the template.
        problem, partial_solution (`str`):
            What it speaks of.
        success_rate (`float`):
            The hint: how much of the dataset the actor solves.
        reward (`float`):
            Mean reward of the solutions that went through this state. An oracle must not look at it.
    """

    query: str
    problem: str = ""
    partial_solution: str = ""
    success_rate: float = float("nan")
    reward: float = float("nan")


@dataclass(frozen=True)
class Answer:
    """The oracle's trace, and what it said about it."""

    trace: str
    cut_off: bool = False
    usage: dict = field(default_factory=dict)


class FunctionOracle:
    """
    A function of the user's, from a [`State`] to a trace, or to `None` where it has nothing to say.

    Args:
        function (`Callable` or `str`):
            The function, or its name: `"module:function"`, seen from the working directory as well.
    """

    concurrency = 1

    def __init__(self, function: Callable[[State], str | None] | str):
        self.function = _import(function) if isinstance(function, str) else function
        if not callable(self.function) or inspect.iscoroutinefunction(self.function):
            raise ValueError(f"The oracle {function!r} must be a plain function, got {self.function!r}.")

    def __call__(self, state: State) -> Answer:
        trace = self.function(state)
        if trace is None:
            raise Refused("the function returned None")
        if not isinstance(trace, str):
            raise TypeError(f"The oracle must return a string or None, got {trace!r}.")
        return Answer(trace)


def _import(name: str) -> Callable:
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The oracle {name!r} could not be imported: {error}.") from error
    finally:
        sys.path.remove(os.getcwd())


@dataclass(frozen=True)
class Endpoint:
    """
    A model behind the chat completions of an OpenAI-compatible server.

    Args:
        url (`str`):
            Base URL, e.g. `"https://api.openai.com/v1"` or that of a vLLM server.
        model (`str`):
            Its name there.
        api_key (`str`, *optional*):
            Sent as a bearer token.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds without a sign of life after which a request counts as failed.
        request (`dict`, *optional*):
            Further fields of the request, e.g. `{"max_completion_tokens": 1024, "temperature": 0.7}`.
    """

    url: str
    model: str
    api_key: str | None = None
    timeout: float = 600.0
    request: dict = field(default_factory=dict)
    concurrency = 8

    def __call__(self, state: State) -> Answer:
        """
        Ask once.

        Raises:
            Unavailable: For whatever may pass: no connection, a time-out, HTTP 408, 409, 425, 429 and 5xx, and what is
                not a chat completion.
            Refused: For HTTP 400, 413 and 422, by which servers say that they do not like this very query.
            OracleError: For any other status.
        """
        messages = [{"role": "user", "content": state.query}]
        headers = {"Content-Type": "application/json", "User-Agent": "trl-credit"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            json.dumps({"model": self.model, "messages": messages, **self.request}).encode(),
            headers,
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            raise _of_status(error) from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut short
            raise Unavailable(f"{self.url}: {getattr(error, 'reason', None) or repr(error)}") from error
        try:
            completion = json.loads(body)
            choice = completion["choices"][0]
            trace = choice["message"]["content"]
            cut_off = choice.get("finish_reason") == "length"
            if not isinstance(trace, str) and not (trace is None and cut_off):
                raise TypeError(f"the content is {trace!r}")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Unavailable(f"{self.url} sent what is not a chat completion ({error!r}): {_excerpt(body)}") from error
        return Answer(trace or "", cut_off, completion.get("usage") or {})


def _of_status(error: urllib.error.HTTPError) -> OracleError:
    try:
        body = error.read()
    except (OSError, http.client.HTTPException):
        body = b""
    message = f"HTTP {error.code} {error.reason}: {_excerpt(body)}"
    if error.code in (408, 409, 425, 429) or error.code >= 500:
        return Unavailable(message, _seconds(error.headers.get("Retry-After")))
    return (Refused if error.code in (400, 413, 422) else OracleError)(message)


def _excerpt(body: bytes) -> str:
    return " ".join(body[:500].decode("utf-8", "replace").split())


def _seconds(retry_after: str | None) -> float:
    """A `Retry-After` header: seconds, or a date."""
    if retry_after is None:
        return 0.0
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def make_oracle(name: str, **endpoint: Any) -> FunctionOracle | Endpoint:
    """
    The oracle of a name: `"http://…"` or `"https://…"` is an [`Endpoint`], `"module:function"` a [`FunctionOracle`].
    """
    if name.startswith(("http://", "https://")):
        return Endpoint(name, **endpoint)
    return FunctionOracle(name)
