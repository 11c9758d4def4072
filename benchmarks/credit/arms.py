"""Every way to train that the benchmark knows, by name."""

from typing import NamedTuple

from trl import GRPOConfig, GRPOTrainer

from trl_credit import GRPOLambdaConfig, GRPOLambdaTrainer, SPPOConfig, SPPOTrainer, VAPOConfig, VAPOTrainer
from trl_credit.seam import CreditConfig
from trl_credit.trainers.vineppo import VinePPOConfig

from .trainers import (
    BatchMeanTrainer,
    OracleConfig,
    OracleTrainer,
    PositionWeightsConfig,
    PositionWeightsTrainer,
    TaskVAPOTrainer,
    TaskVinePPOTrainer,
)


class Arm(NamedTuple):
    """A trainer with its config, the settings that make it what it is, and whether it must know the task."""

    config: type[GRPOConfig]
    trainer: type[GRPOTrainer]
    settings: dict = {}
    knows_task: bool = False


# PPO is a setting of VAPO's trainer, as its config says.
_PPO = {"critic_pretraining_steps": 0, "policy_lambda": 0.95, "critic_lambda": 0.95}
_PROBE = {
    "critic_model_name_or_path": "probe",
    "probe_boundaries": "segments",
    "policy_lambda": 0.5,
    "epsilon_high": 0.2,
    "positive_lm_coef": 0.0,
    "beta": 0.03,  # without a penalty there is no pass of the reference
    "num_generations": 1,
}
ARMS = {
    # TRL, unmodified
    "grpo": Arm(GRPOConfig, GRPOTrainer),
    "dr_grpo": Arm(GRPOConfig, GRPOTrainer, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "rloo": Arm(GRPOConfig, GRPOTrainer, {"scale_rewards": "none"}),  # up to a factor of N / (N - 1)
    # Baselines and null hypotheses
    "batch_mean": Arm(CreditConfig, BatchMeanTrainer, {"num_generations": 1}),
    "position_weights": Arm(PositionWeightsConfig, PositionWeightsTrainer),
    # Ours
    "grpo_lambda": Arm(GRPOLambdaConfig, GRPOLambdaTrainer),
    "vapo": Arm(VAPOConfig, VAPOTrainer),
    "ppo": Arm(VAPOConfig, VAPOTrainer, {**_PPO, "epsilon_high": 0.2, "positive_lm_coef": 0.0}),
    "sppo": Arm(SPPOConfig, SPPOTrainer, {"num_generations": 1}),
    "vineppo": Arm(VinePPOConfig, TaskVinePPOTrainer, {"num_generations": 1}, knows_task=True),
    "probe": Arm(VAPOConfig, TaskVAPOTrainer, _PROBE, knows_task=True),
    # What cannot be bettered
    "oracle": Arm(OracleConfig, OracleTrainer, {"num_generations": 1}, knows_task=True),
}
