"""Local losses as modules for any training loop: they need torch and nothing else."""

from locallearn.losses.cafo import SparsemaxLoss
from locallearn.losses.channelwise import ChannelwiseCompetitiveLoss
from locallearn.losses.counter_current import CounterCurrentLoss
from locallearn.losses.emergent import SummedGoodnessLoss
from locallearn.losses.forward_forward import ForwardForwardLoss
from locallearn.losses.layer_collaboration import LayerCollaborationLoss
from locallearn.losses.local_heads import (
    InfoProLoss,
    MovementLoss,
    PredSimLoss,
    ReconstructionLoss,
    SimilarityLoss,
    SupervisedContrastiveLoss,
)
from locallearn.losses.mono_forward import MonoForwardLoss
from locallearn.losses.scalable_ff import ScalableForwardForwardLoss
from locallearn.losses.symba import SymBaLoss

__all__ = [
    "ChannelwiseCompetitiveLoss",
    "CounterCurrentLoss",
    "ForwardForwardLoss",
    "InfoProLoss",
    "LayerCollaborationLoss",
    "MonoForwardLoss",
    "MovementLoss",
    "PredSimLoss",
    "ReconstructionLoss",
    "ScalableForwardForwardLoss",
    "SimilarityLoss",
    "SparsemaxLoss",
    "SummedGoodnessLoss",
    "SupervisedContrastiveLoss",
    "SymBaLoss",
]
