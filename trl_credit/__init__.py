"""Credit assignment for language-model RL: drop-in trainers for HuggingFace TRL."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from . import moved
from .methods import METHODS


moved.install()
__version__ = version("trl-credit")

# Public names beside those of the methods, by where they live. Nothing is imported before it is asked for, so that
# `import trl_credit` is instant.
_OTHERS = {
    "credit.calibration": ("brier_score", "calibration_sums", "expected_calibration_error"),
    "credit.gae": ("gae", "length_adaptive_lambda", "monte_carlo_returns", "relative_position_lambda", "whiten"),
    "credit.lemma": ("value_gap_bound",),
    "credit.recurrence": ("linear_recurrence",),
    "credit.traces": ("adjoint_trace", "eligibility_trace", "trace_weights"),
    "credit.value_loss": ("binary_cross_entropy",),
    "critic_report": ("CriticProbeCallback", "evaluate_critic"),
    "critics.engine.engine": ("CriticEngine",),
}
_LAZY = {name: module for method in METHODS.values() for name, module in method.places.items()}
_LAZY |= {name: f"trl_credit.{module}" for module, names in _OTHERS.items() for name in names}

__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:  # for mypy and editors; `tests/test_package.py` holds it to `_LAZY`
    from .credit.calibration import brier_score as brier_score
    from .credit.calibration import calibration_sums as calibration_sums
    from .credit.calibration import expected_calibration_error as expected_calibration_error
    from .credit.gae import gae as gae
    from .credit.gae import length_adaptive_lambda as length_adaptive_lambda
    from .credit.gae import monte_carlo_returns as monte_carlo_returns
    from .credit.gae import relative_position_lambda as relative_position_lambda
    from .credit.gae import whiten as whiten
    from .credit.lemma import value_gap_bound as value_gap_bound
    from .credit.recurrence import linear_recurrence as linear_recurrence
    from .credit.traces import adjoint_trace as adjoint_trace
    from .credit.traces import eligibility_trace as eligibility_trace
    from .credit.traces import trace_weights as trace_weights
    from .credit.value_loss import binary_cross_entropy as binary_cross_entropy
    from .critic_report import CriticProbeCallback as CriticProbeCallback
    from .critic_report import evaluate_critic as evaluate_critic
    from .critics.engine.engine import CriticEngine as CriticEngine
    from .trainers.bpco.bpco_config import BPCOConfig as BPCOConfig
    from .trainers.bpco.bpco_trainer import BPCOTrainer as BPCOTrainer
    from .trainers.genac.genac_config import GenACConfig as GenACConfig
    from .trainers.genac.genac_trainer import GenACTrainer as GenACTrainer
    from .trainers.grpo_lambda.grpo_lambda_config import GRPOLambdaConfig as GRPOLambdaConfig
    from .trainers.grpo_lambda.grpo_lambda_trainer import GRPOLambdaTrainer as GRPOLambdaTrainer
    from .trainers.sao.sao_config import SAOConfig as SAOConfig
    from .trainers.sao.sao_trainer import SAOTrainer as SAOTrainer
    from .trainers.sppo.sppo_config import SPPOConfig as SPPOConfig
    from .trainers.sppo.sppo_trainer import SPPOTrainer as SPPOTrainer
    from .trainers.vapo.vapo_config import VAPOConfig as VAPOConfig
    from .trainers.vapo.vapo_trainer import VAPOTrainer as VAPOTrainer
    from .trainers.vineppo.vineppo_config import VinePPOConfig as VinePPOConfig
    from .trainers.vineppo.vineppo_trainer import VinePPOTrainer as VinePPOTrainer


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'trl_credit' has no attribute {name!r}; it offers {', '.join(__all__)}.")


def __dir__():
    return __all__
