"""A trained network, its layers replaced from one end to every depth: what is lost, and what is gained, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from locallearn.cost import bytes_of, counting
from locallearn.distillation import Distiller, Fit, Inputs, Recipe, Site, find_sites, replaced
from locallearn.nets.random_features import RandomFeatureLayer
from locallearn.study.bench import _alternate, _Contender, _now

Order = Literal["first", "last"]


@dataclass
class Student:
    """The teacher with some of its layers replaced.

    Attributes:
        recipe: of the replaced layers; ``None``: the teacher itself.
        depth: how many layers are replaced.
        layers: replacements by site.
        fits: how they were found, by path.
        figures: figures of the task by part of the data.
        costs: parameters, bytes, operations and time of inference.
    """

    recipe: Recipe | None
    depth: int
    layers: Mapping[Site, nn.Module] = field(default_factory=dict)
    fits: Mapping[str, Fit] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, float | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its row."""
        return "teacher" if self.recipe is None else f"{self.recipe.method} {self.recipe.share:g} of {self.depth}"

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            "recipe": None if self.recipe is None else asdict(self.recipe),
            "depth": self.depth,
            "layers": {name: asdict(fit) for name, fit in self.fits.items()},
            **self.figures,
            **self.costs,
        }


def choose_sites(
    net: nn.Module,
    predict: Callable[[Tensor], Tensor],
    example: Tensor,
    recipes: Sequence[Recipe],
    names: Sequence[str] | None = None,
) -> tuple[list[Site], dict[str, str]]:
    """Layers that every recipe can replace, and of all others why not.

    Args:
        net: the teacher's network.
        predict: runs it.
        example: inputs, ``(N, ...)``.
        recipes: what layers are to be replaced with.
        names: paths of layers; ``None``: all but the readout.

    Raises:
        ValueError: a name that is no layer that can be replaced, or no layer is left.
    """
    found, left = find_sites(net, predict, example)
    known = [site.name for site in found]
    chosen = []
    for site in found:
        small = [recipe for recipe in recipes if recipe.size(net.get_submodule(site.name)) < 1]  # type: ignore[arg-type]
        if small:
            numbers = sum(p.numel() for p in net.get_submodule(site.name).parameters())
            left[site.name] = (
                f"{small[0].method} does not fit into a share of {small[0].share:g} of its {numbers:,} numbers"
            )
        elif names is None and site.readout:
            left[site.name] = "it is the readout: name it in distill.layers to replace it, too"
        elif names is not None and site.name not in names:
            left[site.name] = "it is not among distill.layers"
        else:
            chosen.append(site)
    for name in names or ():
        if name not in [site.name for site in chosen]:
            raise ValueError(
                f"layer {name!r} cannot be replaced: {left.get(name, 'there is no such layer')}; layers that inference calls "
                f"are {', '.join(known) or 'none'}"
            )
    if not chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in left.items())
        raise ValueError(f"the network has no layer that can be replaced ({reasons})")
    return chosen, left


def make_students(
    net: nn.Module,
    predict: Callable[[Tensor], Tensor],
    batches: Sequence[Tensor],
    sites: Sequence[Site],
    recipes: Sequence[Recipe],
    *,
    order: Order = "first",
    depths: Sequence[int] | None = None,
    inputs: Inputs = "student",
    penalties: Sequence[float],
    positions: int,
) -> list[Student]:
    """The teacher, and for every recipe and depth a student, none of them judged yet.

    Args:
        net: the teacher's network.
        predict: runs it.
        batches: inputs to calibrate on.
        sites: layers in the order of inference.
        recipes: what they are replaced with.
        order: replace the ``first`` layers, or the ``last`` ones.
        depths: how many of them, one student each; ``None``: 1 up to all.
        inputs: see :class:`~locallearn.distillation.Distiller`.
        penalties: the same.
        positions: the same.
    """
    places = {site.name: number for number, site in enumerate(sites)}
    students = [Student(None, 0)]
    for recipe in recipes:
        distiller = Distiller(net, predict, batches, recipe, inputs, penalties, positions)
        for depth in depths or range(1, len(sites) + 1):
            chosen = sites[:depth] if order == "first" else sites[len(sites) - depth :]
            layers = distiller.students(chosen, places)
            students.append(Student(recipe, depth, layers, distiller.fits(chosen)))
    return students


def judge(
    net: nn.Module,
    students: Sequence[Student],
    evaluate: Callable[[str], dict[str, float]],
    parts: Sequence[str] = ("validation", "test"),
) -> None:
    """Have every student evaluated on parts of the data, each once."""
    for student in students:
        with replaced(net, student.layers):
            for part in parts:
                student.figures[part] = evaluate(part)


def measure(
    net: nn.Module,
    predict: Callable[[Tensor], Tensor],
    students: Sequence[Student],
    sample: Tensor,
    rounds: int,
    steps: int,
) -> None:
    """Parameters, bytes, operations and time of every student's inference.

    Time is measured as ``bench`` does: after a round that warms up, in every round each contender runs once, in an order that
    turns, and ratios to the teacher are taken within the round.

    Args:
        net: the teacher's network.
        predict: runs it.
        students: the teacher first.
        sample: inputs of one inference, ``(N, ...)``.
        rounds: counted rounds.
        steps: inferences per round.
    """

    def one_round(student: Student) -> float:
        with replaced(net, student.layers):
            start = _now(sample.device)
            for _ in range(steps):
                predict(sample)
            return _now(sample.device) - start

    for student in students:
        with replaced(net, student.layers):
            with counting() as counter:
                predict(sample)
            student.costs |= {
                **numbers_of(net),
                "bytes": bytes_of([*net.parameters(), *net.buffers()]),
                "flops": None if counter.uncounted else counter.total / len(sample),
            }
    contenders = [_Contender(student.name, "teacher", partial(one_round, student)) for student in students]
    for student, timing in zip(students, _alternate(contenders, rounds), strict=True):
        told = timing.to_dict()
        student.costs |= {
            "latency_s": sorted(timing.seconds)[rounds // 2] / steps,
            "latency_ratio": told["ratio"],
            "latency_ratio_min": told["ratio_min"],
            "latency_ratio_max": told["ratio_max"],
        }


def numbers_of(net: nn.Module) -> dict[str, int]:
    """``params``: all that inference multiplies with or adds, maps of random features included; ``learned``: without those."""
    maps = sum(m.numbers - m.learned for m in net.modules() if isinstance(m, RandomFeatureLayer))
    learned = sum(parameter.numel() for parameter in net.parameters())
    return {"params": learned + maps, "learned": learned}
