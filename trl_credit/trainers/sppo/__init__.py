from .sppo_config import SPPOConfig
from .sppo_trainer import SPPOTrainer


__all__ = ["SPPOConfig", "SPPOTrainer"]
