from .vapo_config import VAPOConfig
from .vapo_trainer import VAPOTrainer


__all__ = ["VAPOConfig", "VAPOTrainer"]
