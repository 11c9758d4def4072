from .bpco_config import BPCOConfig
from .bpco_trainer import BPCOTrainer


__all__ = ["BPCOConfig", "BPCOTrainer"]
