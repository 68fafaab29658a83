"""The rule by its name: which protocol, and what both of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args

import torch

from locallearn.algorithms.base import Algorithm, Locality, TaskInfo, Update, choices, refuse_dense
from locallearn.algorithms.dry_run import feature_sizes
from locallearn.algorithms.physical_ff._layers import Layer
from locallearn.batch import Batch

Protocol = Literal["phyll", "ffzero"]


class PhysicalFF(Algorithm):
    """Forward-only learning of digital layers between physical devices that can be measured and nothing else.

    ``protocol=phyll`` (Momeni et al., Science 382, 2023, arXiv 2304.11042) makes a
    :class:`~locallearn.algorithms.physical_ff.PhyLL`: a layer's goodness is the cosine of its activity and a fixed random
    direction, and a sample with its true label is to have more of it than with a wrong one. ``protocol=ffzero``
    (arXiv 2603.24790) makes a :class:`~locallearn.algorithms.physical_ff.FFZero`: the output of a layer is compared with fixed
    class prototypes, and its weights move by differences of that loss along random directions.

    Devices are part of the network (``net=physical``). On a network without any this is the ablation, and the record says so.
    Learning runs outside of autocast: weights move within a batch, and autocast would go on with casts from before.

    Args:
        protocol: ``phyll`` or ``ffzero``.
        theta: gain of the contrast (``phyll``).
        inner_steps: K, steps of a layer on one measurement (``phyll``).
        absolute: judge the absolute value of the activity; ``None``: of blocks that end in their linear map (``phyll``).
        label_height: of the label's slot; ``None``: the largest absolute value in the first batch, kept ever after (``phyll``).
        directions: per layer, or output channel of a convolution (``ffzero``).
        step: how far weights are moved along a direction of length 1, both ways (``ffzero``).
        margin: by which the true prototype should be nearer (``ffzero``).
        seed: of what is fixed (directions p, prototypes) and of what is drawn while training.

    Raises:
        ValueError: an unknown protocol, a number out of range, or a setting that belongs to the other protocol.
    """

    kinds: ClassVar[dict[str, type[PhysicalFF]]] = {}
    theirs: ClassVar[tuple[str, ...]] = ()  # settings of the other protocol
    _layers: list[Layer]

    def __init_subclass__(cls, protocol: str | None = None, **kwargs: Any) -> None:
        """Note the class of a protocol."""
        super().__init_subclass__(**kwargs)
        if protocol is not None:
            cls.kinds[protocol] = cls

    def __new__(cls, protocol: str = "phyll", *args: Any, **settings: Any) -> PhysicalFF:
        """Make the class of this protocol."""
        if cls is not PhysicalFF:
            return super().__new__(cls)
        if protocol not in cls.kinds:
            raise ValueError(f"protocol is {protocol!r}, expected one of {', '.join(get_args(Protocol))}")
        return super().__new__(cls.kinds[protocol])

    def __init__(
        self,
        protocol: Protocol = "phyll",
        theta: float = 4.0,
        inner_steps: int = 10,
        absolute: bool | None = None,
        label_height: float | None = None,
        directions: int = 1,
        step: float = 1e-3,
        margin: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        for name, whole in (("inner_steps", inner_steps), ("directions", directions)):
            if type(whole) is not int or whole < 1:
                raise ValueError(f"{name} is {whole!r}, expected a whole number of at least 1")
        for name, value in (("theta", theta), ("step", step), ("margin", margin), ("label_height", label_height)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}, expected a number above 0")
        self.protocol = protocol
        self.theta = theta
        self.inner_steps = inner_steps
        self.absolute = absolute
        self.label_height = label_height
        self.directions = directions
        self.step = step
        self.margin = margin
        told = choices(self, PhysicalFF.__init__, *self.theirs)
        if told is not None:
            raise ValueError(
                f"{told} means nothing with protocol={protocol}: leave it out, or choose the other protocol"
            )

    @property
    def locality(self) -> Locality:
        """Forward-only: gradients of a layer's own loss are written out, or there are none."""
        return Locality.FORWARD_ONLY

    @property
    def variant(self) -> str | None:
        """The protocol, where it is not the usual one, and what makes another rule of it."""
        return choices(self, PhysicalFF.__init__, "protocol", "absolute", "directions")

    @torch.no_grad()
    def updates(self, batch: Batch) -> Iterator[Update]:
        """One layer after another, without autograd and autocast."""
        pieces = self._updates(batch)
        while True:
            # Around each piece: the context must not stay entered where the driver steps.
            with torch.autocast(batch.inputs.device.type, enabled=False):
                update = next(pieces, None)
            if update is None:
                return
            yield update

    @abstractmethod
    def _updates(self, batch: Batch) -> Iterator[Update]:
        """The updates of a protocol."""

    def devices(self) -> dict[str, Any]:
        """Devices by the name of their block."""
        return {layer.name: layer.measured.layer for layer in self._layers if layer.measured is not None}

    def check(self, task: TaskInfo) -> list[int]:
        """Refuse tasks without one class per sample; entries per sample of every block's output.

        Raises:
            ValueError: says what was found and what is wanted.
        """
        owner = type(self).__name__
        if not task.classes or task.outputs < 2:
            raise ValueError(
                f"{owner} tells classes apart, and this task has {task.outputs if task.classes else 'none'}"
            )
        refuse_dense(task, owner)
        if task.example.context:
            raise ValueError(f"{owner} has no use for the context of this task (a graph?): use another algorithm")
        if not task.example.inputs.is_floating_point():
            raise ValueError(
                f"{owner} needs floating point inputs, and these are {task.example.inputs.dtype} (token ids?)"
            )
        return feature_sizes(self.blocks, task.example)

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """How often every layer's device was asked so far, in training and in all, and for how many samples."""
        return {
            name: {
                "device_calls": float(device.calls),
                "device_calls_in_training": float(device.training_calls),
                "device_samples": float(device.samples),
            }
            for name, device in self.devices().items()
        }
