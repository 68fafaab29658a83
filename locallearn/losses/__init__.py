"""Local losses as modules for any training loop: they need torch and nothing else."""

from locallearn.losses.counter_current import CounterCurrentLoss
from locallearn.losses.forward_forward import ForwardForwardLoss
from locallearn.losses.local_heads import (
    MovementLoss,
    PredSimLoss,
    ReconstructionLoss,
    SimilarityLoss,
    SupervisedContrastiveLoss,
)
from locallearn.losses.mono_forward import MonoForwardLoss
from locallearn.losses.scalable_ff import ScalableForwardForwardLoss

__all__ = [
    "CounterCurrentLoss",
    "ForwardForwardLoss",
    "MonoForwardLoss",
    "MovementLoss",
    "PredSimLoss",
    "ReconstructionLoss",
    "ScalableForwardForwardLoss",
    "SimilarityLoss",
    "SupervisedContrastiveLoss",
]
