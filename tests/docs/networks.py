"""Which rule trains which public network: the table of docs/networks.md, found out by trying.

``python tests/docs/networks.py`` writes the page anew.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch_geometric.nn import models as graphs
from torchvision.models import densenet, resnet, shufflenetv2, squeezenet

from locallearn.batch import Batch
from locallearn.local import attach_cut
from locallearn.nets.cut import Cut, cut_network
from locallearn.nets.trace import preserved

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "networks.md"
RULES = sorted(path.stem for path in (ROOT / "conf" / "algorithm").glob("*.yaml"))
CLASSES = 4
_DRAW = torch.Generator().manual_seed(0)
_IMAGES = torch.randn(6, 3, 32, 32, generator=_DRAW)
_LARGE = torch.randn(6, 3, 64, 64, generator=_DRAW)
_TOKENS = torch.randint(64, (6, 12), generator=_DRAW)
_MASKED = {
    "input_ids": _TOKENS,
    "attention_mask": (torch.arange(12) < torch.tensor([8, 12, 12, 10, 12, 12])[:, None]).long(),
}
_GRAPH = {"x": torch.randn(8, 12, generator=_DRAW), "edge_index": torch.randint(8, (2, 24), generator=_DRAW)}


def _vgg() -> nn.Module:
    """VGG-11 of an eighth of its width. Its head, which is made 25088-4096-4096 at any width, is made smaller."""
    with torch.device("meta"):
        net = torchvision.models.VGG(nn.Identity(), CLASSES, init_weights=False)
    plan = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
    net.features = torchvision.models.vgg.make_layers(plan)
    layers = [nn.Linear(64 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout()]
    net.classifier = nn.Sequential(*layers, nn.Linear(32, CLASSES))
    return net


def _convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(8, 16, 1), block(16, 32, 1), block(32, None, 1)], num_classes=CLASSES)


def _timm(name: str, *args: Any, **settings: Any) -> nn.Module:
    """A class of timm; imported late, which takes seconds."""
    import timm

    net: nn.Module = getattr(timm.models, name)(*args, num_classes=CLASSES, **settings)
    return net


def _timm_resnet() -> nn.Module:
    import timm

    stem = {"stem_width": 8, "stem_type": "deep_tiered", "avg_down": True}
    return _timm("ResNet", timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(8, 16, 32, 64), **stem)


def _transformers(name: str, **settings: Any) -> nn.Module:
    """A sequence classifier of transformers from its configuration: random weights, nothing is loaded."""
    import transformers

    config = getattr(transformers, f"{name}Config")(vocab_size=64, num_labels=CLASSES, pad_token_id=0, **settings)
    net: nn.Module = getattr(transformers, f"{name}ForSequenceClassification")(config)
    return net


class Network(NamedTuple):
    """A public network, small.

    Attributes:
        make: makes it.
        told: what it is, for the page.
        cuts: names of the modules behind which it is cut.
        example: a batch.
        needs: the package that only the tests need.
    """

    make: Callable[[], nn.Module]
    told: str
    cuts: list[str]
    example: Any = _IMAGES
    needs: str = "torch"


NETWORKS: Mapping[str, Network] = {
    "ResNet": Network(
        partial(resnet.ResNet, resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES),
        "torchvision `ResNet(BasicBlock, [1, 1, 1, 1])`",
        ["layer1", "layer2", "layer3"],
    ),
    "VGG": Network(_vgg, "torchvision `VGG`, VGG-11's layers of an eighth of the width", ["features.5", "features.10"]),
    "MobileNetV3": Network(
        partial(torchvision.models.mobilenet_v3_small, num_classes=CLASSES, width_mult=0.25),
        "torchvision `mobilenet_v3_small(width_mult=0.25)`",
        ["features.2", "features.5"],
    ),
    "DenseNet": Network(
        partial(densenet.DenseNet, 8, (1, 1, 1, 1), 16, num_classes=CLASSES),
        "torchvision `DenseNet(8, (1, 1, 1, 1), 16)`",
        ["features.denseblock1", "features.denseblock2"],
    ),
    "SqueezeNet": Network(
        partial(squeezenet.SqueezeNet, "1_1", CLASSES), "torchvision `SqueezeNet('1_1')`", ["features.4", "features.7"]
    ),
    "ShuffleNetV2": Network(
        partial(shufflenetv2.ShuffleNetV2, [1, 1, 1], [8, 16, 32, 64, 64], CLASSES),
        "torchvision `ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64])`",
        ["stage2", "stage3"],
        _LARGE,
    ),
    "ConvNeXt": Network(_convnext, "torchvision `ConvNeXt` of widths 8, 16, 32", ["features.1", "features.3"]),
    "ViT": Network(
        partial(torchvision.models.VisionTransformer, 32, 8, 2, 2, 16, 32, num_classes=CLASSES),
        "torchvision `VisionTransformer(32, 8, 2, 2, 16, 32)`",
        ["encoder.layers.encoder_layer_0"],
    ),
    "GCN": Network(partial(graphs.GCN, 12, 8, 3, CLASSES), "PyG `GCN(12, 8, 3)`", ["convs.0", "convs.1"], _GRAPH),
    "GraphSAGE": Network(
        partial(graphs.GraphSAGE, 12, 8, 3, CLASSES), "PyG `GraphSAGE(12, 8, 3)`", ["convs.0", "convs.1"], _GRAPH
    ),
    "GAT": Network(
        partial(graphs.GAT, 12, 8, 3, CLASSES, heads=2, norm="batch_norm"),
        "PyG `GAT(12, 8, 3, heads=2, norm='batch_norm')`",
        ["norms.0", "norms.1"],
        _GRAPH,
    ),
    "GIN": Network(
        partial(graphs.GIN, 12, 8, 3, CLASSES, jk="cat"),
        "PyG `GIN(12, 8, 3, jk='cat')`",
        ["convs.0", "convs.1"],
        _GRAPH,
    ),
    "ResNet-T": Network(
        _timm_resnet,
        "timm `ResNet(BasicBlock, (1, 1, 1, 1), stem_type='deep_tiered', avg_down=True)`",
        ["layer1", "layer2", "layer3"],
        needs="timm",
    ),
    "MLP-Mixer": Network(
        partial(_timm, "MlpMixer", img_size=32, patch_size=8, num_blocks=3, embed_dim=16),
        "timm `MlpMixer(img_size=32, patch_size=8, num_blocks=3, embed_dim=16)`",
        ["blocks.0", "blocks.1"],
        needs="timm",
    ),
    "Swin": Network(
        partial(*(_timm, "SwinTransformer", 32, 2), window_size=4, depths=(1, 1), embed_dim=16, num_heads=(2, 2)),
        "timm `SwinTransformer(32, 2, window_size=4, depths=(1, 1), embed_dim=16, num_heads=(2, 2))`",
        ["layers.0"],
        needs="timm",
    ),
    "BERT": Network(
        partial(
            *(_transformers, "Bert"), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
        ),
        "transformers `BertForSequenceClassification`, 3 layers of 16; called with `input_ids` and `attention_mask`",
        ["bert.encoder.layer.0", "bert.encoder.layer.1"],
        _MASKED,
        "transformers",
    ),
    "DistilBERT": Network(
        partial(_transformers, "DistilBert", dim=16, n_layers=3, n_heads=2, hidden_dim=32),
        "transformers `DistilBertForSequenceClassification`, 3 layers of 16; called with `input_ids` alone",
        ["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"],
        _TOKENS,
        "transformers",
    ),
    "GPT-2": Network(
        partial(_transformers, "GPT2", n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0),
        "transformers `GPT2ForSequenceClassification`, 3 layers of 16; called with `input_ids`, `attention_mask` and "
        "`use_cache=False`",
        ["transformer.h.0", "transformer.h.1"],
        _MASKED | {"use_cache": False},
        "transformers",
    ),
}


def cut(name: str) -> tuple[nn.Module, Cut]:
    """The network and its pieces."""
    torch.manual_seed(0)
    net = NETWORKS[name].make()
    return net, cut_network(net, NETWORKS[name].cuts, NETWORKS[name].example)


def refusal(rule: str, net: nn.Module, pieces: Cut) -> str:
    """What a rule with its default settings says to a network; empty: it trains it, which a step has shown."""
    net, pieces = copy.deepcopy((net, pieces))
    settings = yaml.safe_load((ROOT / "conf" / "algorithm" / f"{rule}.yaml").read_text(encoding="utf-8"))
    algorithm = instantiate(OmegaConf.create({"seed": 0, "algorithm": settings}).algorithm)
    try:
        task = attach_cut(net, pieces, algorithm)
    except ValueError as error:
        return re.sub("|".join(rf"(?<=block )'{name}'|^'{name}'" for name in pieces.blocks.names), "'…'", str(error))
    main, *context = pieces.arguments.values.values()
    batch = Batch(main, torch.arange(len(main)) % CLASSES, tuple(context))
    stepped = []
    for update in algorithm.train().updates(batch):
        update.backward()
        assert update.loss is None or bool(update.loss.isfinite()), f"{rule}: {update.unit}"
        groups = algorithm.units()[update.unit]
        torch.optim.SGD(groups, lr=1e-3).step()
        algorithm.zero_grad(set_to_none=True)
        stepped.append(update.unit)
    if not algorithm.units():  # a closed form: a pass for everything that is solved for
        while not algorithm.finished:
            list(algorithm.updates(batch))
            algorithm.end_epoch()
            stepped.append("pass")
    assert stepped, f"{rule} has stepped nothing"
    with torch.no_grad(), preserved(net):
        scores: Tensor = algorithm.eval().predict(main, *context)
    assert scores.shape == (len(main), task.outputs), rule
    return ""


def column(name: str, rules: list[str] = RULES) -> dict[str, str]:
    """Refusals of a network by rule."""
    net, pieces = cut(name)
    return {rule: refusal(rule, net, pieces) for rule in rules}


def page(columns: Mapping[str, Mapping[str, str]]) -> str:
    """The page."""
    sentences: list[str] = []
    rows = []
    for rule in RULES:
        cells = []
        for name in NETWORKS:
            said = columns[name][rule]
            if said and said not in sentences:
                sentences.append(said)
            cells.append(f"{sentences.index(said) + 1}" if said else "yes")
        rows.append(f"| [`{rule}`](algorithms/{rule}.md) | {' | '.join(cells)} |")
    listed = [f"{i}. {said}" for i, said in enumerate(sentences, 1)]
    made = [f"| {name} | {one.told} | {', '.join(f'`{c}`' for c in one.cuts)} |" for name, one in NETWORKS.items()]
    return "\n".join(
        [
            *_HEAD,
            f"| rule | {' | '.join(NETWORKS)} |",
            f"|---|{'---|' * len(NETWORKS)}",
            *rows,
            "",
            "## What is said",
            "",
            *listed,
            "",
            "## The networks",
            "",
            "Public classes, unmodified, shrunken by their own arguments.",
            "",
            "| network | made as | cut behind |",
            "|---|---|---|",
            *made,
            "",
        ]
    )


_HEAD = [
    "# Which rule trains which network",
    "",
    "Every rule with the settings of its YAML, on public networks of torchvision, PyG, timm and transformers, cut as",
    "[Your own network](own-network.md) says.",
    "`yes`: it attaches, a step moves every unit, its losses are finite, and it predicts scores of the right shape. That is",
    "less than learning well. A number: it refuses, with that sentence of those below, where '…' is the name of the block that",
    "it is about. Maps are read as (C, H, W): Swin hands over (H, W, C), and rules that read maps take its rows for channels.",
    "The page is made by `tests/docs/networks.py`, and a test compares it with what it finds.",
    "",
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    PAGE.write_text(page({name: column(name) for name in NETWORKS}), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
