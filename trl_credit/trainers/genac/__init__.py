from .genac_config import GenACConfig
from .genac_trainer import GenACTrainer


__all__ = ["GenACConfig", "GenACTrainer"]
