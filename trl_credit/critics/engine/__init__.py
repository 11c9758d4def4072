"""A second network trained beside the policy, and how it is split over processes."""

from .engine import CriticEngine, CriticOptimization


__all__ = ["CriticEngine", "CriticOptimization"]
