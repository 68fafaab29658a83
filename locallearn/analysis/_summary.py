"""Everything about a trained network's representations in one pass over the data, small enough to be kept in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from locallearn.algorithms.base import Algorithm
from locallearn.analysis._collect import Label, Representations, passes, representations
from locallearn.analysis._ensembles import activation_map, ensembles, overlaps, sharing, spread
from locallearn.analysis._similarity import BatchCKA, rsa
from locallearn.analysis._sparsity import hoyer, mean_sparsity
from locallearn.batch import Batch
from locallearn.probe import ridge_probe

_PROBED = 200  # samples of every class


class LayerStatistics:
    """Sparsity, class means and activity of one layer, from batch after batch.

    Attributes:
        signed: whether any activation was negative; class means are then of magnitudes.
    """

    def __init__(self, classes: int) -> None:
        self.signed = False
        self._classes = classes
        self._hoyer: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._sums = torch.zeros(classes, 0, dtype=torch.float64)
        self._largest = torch.zeros(0)

    def update(self, activations: Tensor, labels: Tensor) -> None:
        """Take in ``(n, ...)`` activations with their class ids ``(n,)``."""
        flat, labels = activations.flatten(1).float().cpu(), labels.cpu()
        if not len(flat):
            return
        if not self._sums.shape[1]:
            self._sums = torch.zeros(self._classes, flat.shape[1], dtype=torch.float64)
            self._largest = torch.zeros(flat.shape[1])
        self._hoyer.append(hoyer(flat))
        self._labels.append(labels)
        self.signed = self.signed or bool((flat < 0).any())
        magnitudes = flat.abs()
        self._sums.index_add_(0, labels, magnitudes.double())
        self._largest = torch.maximum(self._largest, magnitudes.amax(0))

    @property
    def counts(self) -> Tensor:
        """Samples of every class, ``(C,)`` int64."""
        labels = torch.cat(self._labels) if self._labels else torch.zeros(0, dtype=torch.int64)
        return torch.bincount(labels, minlength=self._classes)

    @property
    def means(self) -> Tensor:
        """Mean magnitude of every unit on every class, ``(C, d)``; ``nan`` for a class without samples."""
        return self._sums / self.counts.unsqueeze(1)

    def figures(self, tau: float, units: int) -> dict[str, Any]:
        """What is said of the layer, as plain numbers; ``None`` is unknown.

        Args:
            tau: of the ensembles.
            units: so many columns of the class-mean profile, evenly spread.
        """
        values, labels = torch.cat(self._hoyer), torch.cat(self._labels)
        whole = mean_sparsity(values)
        by_class = [mean_sparsity(values[labels == c]) for c in range(self._classes)]
        members = ensembles(self.means, tau)
        split = sharing(members)
        columns = spread(members.shape[1], units)
        profile = self.means[:, columns].nan_to_num(0)
        return {
            "units": members.shape[1],
            "signed": self.signed,
            "hoyer": plain(whole.mean),
            "undefined": whole.undefined,
            "hoyer_by_class": [plain(one.mean) for one in by_class],
            "undefined_by_class": [one.undefined for one in by_class],
            "maximum": plain(float(self._largest.max())),
            "never_active": float((self._largest == 0).double().mean()),
            "sizes": members.sum(1).tolist(),
            "overlap": overlaps(members).tolist(),
            "unique": split.unique.tolist(),
            "shared": split.shared,
            "unassigned": split.unassigned,
            "columns": columns.tolist(),
            "profile": percent(profile),
            "profile_top": plain(float(profile.max())),
            "members": members[:, columns].int().tolist(),
        }


def analyse(
    algorithm: Algorithm,
    batches: Sequence[Batch],
    classes: int,
    *,
    tau: float = 1.0,
    only_right: bool = True,
    unseen: Sequence[int] = (),
    per_class: int = 20,
    units: int = 200,
) -> dict[str, Any]:
    """Return what can be said of a trained network's representations, as plain numbers, lists and text.

    Args:
        algorithm: attached and trained, on the device of the batches; it is left untouched.
        batches: samples with class labels, gone through once for every pass.
        classes: C.
        tau: of the ensembles.
        only_right: leave samples out that are classified wrongly, as the paper does.
        unseen: classes that training never saw. All of their samples are taken, none counts in the accuracy, and linear probes
            say how well these classes can be told from what the network gives for them.
        per_class: rows of every class in the activation map.
        units: columns of the activation map and of the class-mean profile.

    Returns:
        ``accuracy`` and ``samples`` over all samples given, ``tau``, ``only_right``, and ``passes``: by the label shown
        (see :func:`passes`), how many samples of every class went in (``counts``), and by ``layers`` their figures in order;
        with unseen classes, in a pass that does not tell the class, also ``probe``: share of the samples of all classes, seen
        and unseen, that a linear probe on the layer classifies rightly, and ``probe_unseen``: of the unseen ones alone. Probes
        are fitted on one half of at most 200 samples of every class and judged on the other.

    Raises:
        ValueError: there is no sample; samples of a graph or without classes; a class of which no sample is left, or a tau
            that is negative.
    """
    if not batches or not sum(len(batch.inputs) for batch in batches):
        raise ValueError("there is no sample to analyse")
    known = passes(algorithm, batches[0])
    found: dict[str, Any] = {}
    right = samples = 0
    for label in known:
        statistics: dict[str, LayerStatistics] = {}
        shown: list[Representations] = []
        probed: list[Representations] = []
        taken = torch.zeros(classes, dtype=torch.int64)
        probe_taken = torch.zeros(classes, dtype=torch.int64)
        right = samples = 0
        for piece in representations(algorithm, batches, label):
            new = torch.isin(piece.labels, torch.tensor(list(unseen), dtype=torch.int64, device=piece.labels.device))
            right, samples = right + int((piece.right & ~new).sum()), samples + int((~new).sum())
            kept = piece.chosen(piece.right | new) if only_right else piece
            for name, layer in kept.layers.items():
                if layer[:1].numel() == 1:
                    raise ValueError(
                        f"block {name!r} has one unit, of which neither sparsity nor an ensemble can be told"
                    )
                statistics.setdefault(name, LayerStatistics(classes)).update(layer, kept.labels)
            shown.append(first_of_each(kept, per_class - taken))
            taken += torch.bincount(shown[-1].labels, minlength=classes)
            if unseen and label != "true":
                probed.append(first_of_each(piece, _PROBED - probe_taken))
                probe_taken += torch.bincount(probed[-1].labels, minlength=classes)
        _check_classes(next(iter(statistics.values())).counts, samples, only_right)
        rows = joined(shown)
        found[label] = {
            "counts": next(iter(statistics.values())).counts.tolist(),
            "layers": [
                {
                    **{"name": name, **one.figures(tau, units), "map": _map(rows.layers[name], rows.labels, units)},
                    **(_probes(joined(probed), name, unseen) if probed else {}),
                }
                for name, one in statistics.items()
            ],
        }
    return {
        "accuracy": right / samples,
        "samples": samples,
        "tau": tau,
        "only_right": only_right,
        "unseen": list(unseen),
        "passes": found,
    }


def similarity(
    networks: Mapping[str, tuple[Algorithm, Sequence[Batch]]],
    classes: int,
    *,
    only_right: bool = True,
    per_class: int = 20,
) -> dict[str, Any]:
    """Return CKA and RSA between all layers of some trained networks, on the samples that all of them classify rightly.

    Args:
        networks: by a name each, an attached and trained algorithm, and the samples as it takes them (normalised as its
            training data were), on its device: the same samples in the same batches for all.
        classes: C.
        only_right: leave samples out that any of them classifies wrongly.
        per_class: samples of every class of whose pairs RSA is made.

    Returns:
        ``rows``: ``(name, layer)`` of every row and column; ``cka``: linear, unbiased, over batches; ``rsa``: Spearman's;
        ``samples`` and ``pairs_of``: how many each of them is made of; ``shown``: the label shown to every network.

    Raises:
        ValueError: as :func:`analyse`; or the samples differ.
    """
    shown: dict[str, Label] = {name: passes(one, batches[0])[0] for name, (one, batches) in networks.items()}
    streams = [representations(one, batches, shown[name]) for name, (one, batches) in networks.items()]
    sizes = {sum(len(batch.inputs) for batch in batches) for _, batches in networks.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"the networks were given {' and '.join(map(str, sorted(sizes)))} samples: give them the same ones"
        )
    cka = BatchCKA()
    few: list[Representations] = []
    taken = torch.zeros(classes, dtype=torch.int64)
    rows: list[tuple[str, str]] = []
    for pieces in zip(*streams, strict=True):
        labels = pieces[0].labels.cpu()
        if any(not torch.equal(piece.labels.cpu(), labels) for piece in pieces):
            raise ValueError(
                "the networks were given samples of different labels: give them the same ones in the same batches"
            )
        right = torch.stack([piece.right.cpu() for piece in pieces]).all(0)
        rows = [(name, layer) for name, piece in zip(networks, pieces, strict=True) for layer in piece.layers]
        layers = [layer.cpu() for piece in pieces for layer in piece.layers.values()]
        whole = Representations({str(i): layer for i, layer in enumerate(layers)}, labels, labels)
        kept = whole.chosen(right) if only_right else whole
        cka.update(list(kept.layers.values()))
        few.append(first_of_each(kept, per_class - taken))
        taken += torch.bincount(few[-1].labels, minlength=classes)
    chosen = list(joined(few).layers.values())
    ranked = [[1.0] * len(chosen) for _ in chosen]
    for i, one in enumerate(chosen):
        for j in range(i + 1):
            ranked[i][j] = ranked[j][i] = rsa(one, chosen[j])
    aligned = cka.result()
    return {
        "rows": rows,
        "cka": [[plain(value) for value in row] for row in aligned.tolist()] or [[None] * len(rows) for _ in rows],
        "rsa": [[plain(value) for value in row] for row in ranked],
        "samples": cka.samples,
        "pairs_of": int(taken.sum()),
        "shown": dict(shown),
        "only_right": only_right,
    }


def first_of_each(piece: Representations, wanted: Tensor) -> Representations:
    """The first ``wanted[c]`` samples of every class c, on the CPU."""
    labels = piece.labels.cpu()
    rank = torch.zeros_like(labels)
    for c in set(labels.tolist()):
        mine = labels == c
        rank[mine] = torch.arange(int(mine.sum()))
    rows = (rank < wanted[labels]).nonzero().squeeze(1).to(piece.labels.device)
    few = piece.chosen(rows)
    return Representations(
        {name: layer.float().cpu() for name, layer in few.layers.items()}, few.labels.cpu(), few.predictions.cpu()
    )


def joined(pieces: Sequence[Representations]) -> Representations:
    """Several pieces as one."""
    return Representations(
        {name: torch.cat([piece.layers[name] for piece in pieces]) for name in pieces[0].layers},
        torch.cat([piece.labels for piece in pieces]),
        torch.cat([piece.predictions for piece in pieces]),
    )


def plain(value: float) -> float | None:
    """A number for JSON, which has none for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def percent(values: Tensor) -> list[list[int]]:
    """Hundredths of the largest value, which is what a picture can show."""
    largest = float(values.max()) if values.numel() else 0.0
    scaled = values / largest if largest > 0 and math.isfinite(largest) else torch.zeros_like(values)
    whole: list[list[int]] = (100 * scaled).round().nan_to_num(0).int().tolist()
    return whole


def _map(layer: Tensor, labels: Tensor, units: int) -> dict[str, Any]:
    chart = activation_map(layer.abs(), labels, units=units)
    return {"labels": chart.labels.tolist(), "values": percent(chart.values)}


def _probes(samples: Representations, name: str, unseen: Sequence[int]) -> dict[str, float | None]:
    rank = torch.zeros_like(samples.labels)
    for c in set(samples.labels.tolist()):
        mine = samples.labels == c
        rank[mine] = torch.arange(int(mine.sum()))
    fit, judge = rank % 2 == 0, rank % 2 == 1
    new = judge & torch.isin(samples.labels, torch.tensor(list(unseen)))
    layer, labels = samples.layers[name], samples.labels

    def share(rows: Tensor) -> float | None:
        if not bool(rows.any()):
            return None
        return plain(ridge_probe(layer[fit], labels[fit], layer[rows], labels[rows], int(labels.max()) + 1))

    return {"probe": share(judge), "probe_unseen": share(new)}


def _check_classes(counts: Tensor, samples: int, only_right: bool) -> None:
    missing = (counts == 0).nonzero().squeeze(1).tolist()
    if not missing:
        return
    which = f"class {missing[0]}" if len(missing) == 1 else f"classes {', '.join(map(str, missing))}"
    if only_right:
        raise ValueError(
            f"not one sample of {which} is classified rightly (of {samples} samples in all), so there is no mean of theirs: "
            "train longer, or take wrongly classified samples in, too (only_right=False; analyze.only_right=false)"
        )
    raise ValueError(f"there is no sample of {which} among the {samples} given: take another part of the data")
