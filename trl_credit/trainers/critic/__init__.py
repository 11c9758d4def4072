from .critic_config import CriticConfig
from .critic_trainer import CriticTrainer


__all__ = ["CriticConfig", "CriticTrainer"]
