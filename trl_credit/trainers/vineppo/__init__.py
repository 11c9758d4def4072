from .vineppo_config import VinePPOConfig
from .vineppo_trainer import VinePPOTrainer


__all__ = ["VinePPOConfig", "VinePPOTrainer"]
