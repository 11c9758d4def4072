"""Credit assignment for language-model RL: drop-in trainers for HuggingFace TRL."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from . import moved


moved.install()
__version__ = version("trl-credit")

# Public names and where they live. Nothing is imported before it is asked for, so that `import trl_credit` is instant.
_LAZY = {
    "GRPOLambdaConfig": "trl_credit.trainers.grpo_lambda.grpo_lambda_config",
    "GRPOLambdaTrainer": "trl_credit.trainers.grpo_lambda.grpo_lambda_trainer",
    "CriticEngine": "trl_credit.critics.engine.engine",
    "GenACConfig": "trl_credit.trainers.genac.genac_config",
    "GenACTrainer": "trl_credit.trainers.genac.genac_trainer",
    "SPPOConfig": "trl_credit.trainers.sppo.sppo_config",
    "SPPOTrainer": "trl_credit.trainers.sppo.sppo_trainer",
    "CriticProbeCallback": "trl_credit.critic_report",
    "VAPOConfig": "trl_credit.trainers.vapo.vapo_config",
    "VAPOTrainer": "trl_credit.trainers.vapo.vapo_trainer",
    "VinePPOConfig": "trl_credit.trainers.vineppo.vineppo_config",
    "VinePPOTrainer": "trl_credit.trainers.vineppo.vineppo_trainer",
    "adjoint_trace": "trl_credit.credit.traces",
    "binary_cross_entropy": "trl_credit.credit.value_loss",
    "brier_score": "trl_credit.credit.calibration",
    "calibration_sums": "trl_credit.credit.calibration",
    "eligibility_trace": "trl_credit.credit.traces",
    "evaluate_critic": "trl_credit.critic_report",
    "expected_calibration_error": "trl_credit.credit.calibration",
    "gae": "trl_credit.credit.gae",
    "length_adaptive_lambda": "trl_credit.credit.gae",
    "linear_recurrence": "trl_credit.credit.recurrence",
    "monte_carlo_returns": "trl_credit.credit.gae",
    "relative_position_lambda": "trl_credit.credit.gae",
    "trace_weights": "trl_credit.credit.traces",
    "value_gap_bound": "trl_credit.credit.lemma",
    "whiten": "trl_credit.credit.gae",
}

__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
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
    from .trainers.genac.genac_config import GenACConfig as GenACConfig
    from .trainers.genac.genac_trainer import GenACTrainer as GenACTrainer
    from .trainers.grpo_lambda.grpo_lambda_config import GRPOLambdaConfig as GRPOLambdaConfig
    from .trainers.grpo_lambda.grpo_lambda_trainer import GRPOLambdaTrainer as GRPOLambdaTrainer
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
