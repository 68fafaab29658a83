"""Local losses as modules for any training loop: they need torch and nothing else."""

from locallearn.losses.counter_current import CounterCurrentLoss
from locallearn.losses.emergent import SummedGoodnessLoss
from locallearn.losses.forward_forward import ForwardForwardLoss
from locallearn.losses.mono_forward import MonoForwardLoss

__all__ = ["CounterCurrentLoss", "ForwardForwardLoss", "MonoForwardLoss", "SummedGoodnessLoss"]
