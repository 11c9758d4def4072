"""Which versions of TRL this package works with, and all that differs between them."""

import inspect
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from accelerate.logging import get_logger
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .canary import attributes_that_moved, names_that_moved, rollout_that_moved


logger = get_logger(__name__)
TRL_VERSIONS = SpecifierSet(">=1.14.2")
# The newest one that all tests have run with (docs/results/versions.md); patches of it count as tested.
NEWEST_TESTED = Version("1.16")
INSTALLED = Version(version("trl"))
IS_NEWER = INSTALLED.release[:2] > NEWEST_TESTED.release[:2]


def check_trl_version() -> None:
    """
    Raise if an older version of TRL is installed than works, or a newer one that has not what this package builds on.
    """
    if INSTALLED not in TRL_VERSIONS:
        raise ImportError(
            f"trl {INSTALLED} is installed, but trl_credit {version('trl-credit')} works with trl{TRL_VERSIONS}: "
            f"it builds on private names of TRL that move between releases. Run `pip install 'trl{TRL_VERSIONS}'`."
        )
    if IS_NEWER:
        _refuse([*names_that_moved()])


def check_trainer(trainer) -> None:
    """The same for a trainer that was just made, with a warning if a newer version has all of it."""
    if INSTALLED.release[:2] == (1, 15) and _lacks_triton():
        raise ImportError(
            f"trl {INSTALLED} computes log-probabilities with Triton alone, and it is not installed. On a machine "
            "without a GPU take another version: `pip install 'trl!=1.15.*'`."
        )
    if IS_NEWER:
        _refuse([*attributes_that_moved(trainer)])
        logger.warning(
            f"trl {INSTALLED} is newer than {NEWEST_TESTED}, the last version that trl_credit "
            f"{version('trl-credit')} was tested with. All that it builds on is there."
        )


def check_rollout(rollout: dict) -> None:
    """The same for a rollout of TRL's."""
    if IS_NEWER:
        _refuse([*rollout_that_moved(rollout)])


def _refuse(moved: list[str]) -> None:
    if moved:
        raise ImportError(
            f"trl {INSTALLED} is installed, and trl_credit {version('trl-credit')} does not work with it: "
            f"{'; '.join(moved)}. The newest version that works is {NEWEST_TESTED}: run `pip install "
            f"'trl=={NEWEST_TESTED}.*'`."
        )


# --- What differs

# Since 1.15 TRL computes log-probabilities in tiles of the vocabulary, with a language-model head of its own.
HAS_TILED_HEAD = INSTALLED.release >= (1, 15)


def refuse_before_tiles(what: str) -> None:
    """Raise for something that needs the log-probabilities of TRL's own head."""
    if not HAS_TILED_HEAD:
        raise ValueError(f"{what} needs TRL 1.15 or later, and trl {INSTALLED} is installed.")


def _lacks_triton() -> bool:
    """In 1.15 the head needs Triton, which comes with PyTorch for GPUs; since 1.16 it does without on other devices."""
    import trl.trainer.utils as trl_utils

    return trl_utils._ChunkedLogProbFunction is None


def inputs_of_forward() -> set[str]:
    """Keys of a rollout that go into the model beside its tokens, as images do."""
    from trl import GRPOTrainer

    # Until 1.14 the method hands what it is given to another.
    name = "_get_per_token_logps_and_entropies" if HAS_TILED_HEAD else "_full_logits_logps"
    return set(inspect.signature(getattr(GRPOTrainer, name)).parameters)


@contextmanager
def unwrapped_for_generation(module, accelerator, checkpointing_kwargs: dict | None, **settings):
    """TRL's `unwrap_model_for_generation`, after which gradient checkpointing is as it was."""
    from trl.models.utils import unwrap_model_for_generation

    keeps = INSTALLED.release >= (1, 16)  # before, checkpointing went on with transformers' own arguments
    kept: dict[str, Any] = {"gradient_checkpointing_kwargs": checkpointing_kwargs} if keeps else {}
    with unwrap_model_for_generation(module, accelerator, **settings, **kept) as network:
        yield network
    if not keeps and network.is_gradient_checkpointing:
        network.gradient_checkpointing_enable(checkpointing_kwargs)
