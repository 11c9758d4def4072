from .grpo_lambda_config import GRPOLambdaConfig
from .grpo_lambda_trainer import GRPOLambdaTrainer


__all__ = ["GRPOLambdaConfig", "GRPOLambdaTrainer"]
