from .sao_config import SAOConfig
from .sao_trainer import SAOTrainer


__all__ = ["SAOConfig", "SAOTrainer"]
