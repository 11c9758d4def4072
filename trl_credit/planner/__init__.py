"""How much memory a run will take, and where its time will go, before it is started."""

from .memory import GIB, Plan, make_plan
from .setup import Setup
from .shape import ModelShape, read_config, shape_of


__all__ = ["GIB", "ModelShape", "Plan", "Setup", "make_plan", "read_config", "shape_of"]
