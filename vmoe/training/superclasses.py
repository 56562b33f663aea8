"""Super-classes (`train.superclasses`): classes that a model confuses share an expert, and the gates learn which.

Daxberger et al., Mobile V-MoEs (arXiv 2309.04354, section 2.2). The paper's single gate routes for all sparse layers;
here each layer has its own, and the loss is their mean.

Shapes, by suffix: B images, of an ensemble all their copies, T tokens, C classes, E super-classes, as many as experts.
"""

import csv
import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.data.images import file_errors
from vmoe.evaluation.class_names import check_same_classes
from vmoe.moe import LayerRouting, RoutingRecord, SparseMoE
from vmoe.moe.layer import routers_where
from vmoe.training.config import SuperclassConfig
from vmoe.utils.config import ConfigError
from vmoe.utils.files import parse_json, read_text

SOURCE = "train.superclasses.source"
SOURCE_REMEDY = "give the FILE_confusion.csv of eval.py --output FILE.json, or a JSON file of super-classes"


def cluster_classes(confusion_CC: Tensor, number: int) -> list[int]:
    """The super-class of each class: communities of the graph whose edges are shares of confused images, both ways, by
    greedy modularity maximisation (networkx), numbered by their first class. ValueError: they cannot be that many."""
    from networkx import Graph
    from networkx.algorithms.community import greedy_modularity_communities

    C = len(confusion_CC)
    share_CC = confusion_CC.double() / confusion_CC.sum(1, keepdim=True).clamp(min=1)
    weight_CC = (share_CC + share_CC.T).fill_diagonal_(0)
    if not 1 <= number <= C:
        raise ValueError(f"{C} classes cannot be {number} super-classes, as many as experts; set num_experts")
    graph = Graph()
    graph.add_nodes_from(range(C))
    graph.add_weighted_edges_from((a, b, weight_CC[a, b].item()) for a, b in weight_CC.triu().nonzero().tolist())
    if not graph.edges:
        raise ValueError("no image is taken for another class, so nothing says which classes are alike")
    groups = greedy_modularity_communities(graph, "weight", cutoff=number, best_n=number)
    ordered = sorted(map(sorted, groups))
    return [next(index for index, group in enumerate(ordered) if label in group) for label in range(C)]


def read_superclasses(source: str, classes: Sequence[str], number: int) -> list[int]:
    """The super-class of each class by the setting `source`; ConfigError: it does not say it for these classes."""
    where = f"{SOURCE} {source}"
    with file_errors(where, f"; {SOURCE_REMEDY}", ConfigError):
        text = read_text(source)
    with file_errors(where, kind=ConfigError):
        if source.endswith(".csv"):
            return cluster_classes(_confusion(text, classes), number)
        return _given(parse_json(text), classes, number)


def _confusion(text: str, classes: Sequence[str]) -> Tensor:
    """The matrix of a table that eval.py wrote."""
    header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    if header[:1] != ["class"] or [row[:1] for row in rows] != [[name] for name in header[1:]]:
        raise ValueError("is no confusion matrix of eval.py, whose rows and columns are the same classes")
    check_same_classes(SOURCE, header[1:], "data.train", classes)
    try:
        confusion_CC = torch.tensor([[int(count) for count in row[1:]] for row in rows]).view(len(rows), len(rows))
    except (ValueError, RuntimeError):  # no numbers, or rows of other lengths
        raise ValueError("is no confusion matrix of eval.py: a count is missing or no whole number") from None
    if (confusion_CC < 0).any():
        raise ValueError("is no confusion matrix of eval.py: a count is negative")
    return confusion_CC


def _given(of_class: object, classes: Sequence[str], number: int) -> list[int]:
    """The super-classes of a JSON file."""
    if not isinstance(of_class, dict) or any(type(index) is not int for index in of_class.values()):
        raise ValueError("must be a JSON object {class: number of its super-class}")
    if wrong := sorted(set(classes) ^ of_class.keys()):
        raise ValueError(f"must name the classes of data.train, and only one of them has {wrong[0]!r}")
    if (found := set(of_class.values())) != set(range(number)):
        raise ValueError(f"super-classes must be 0..{number - 1}, one for each expert, got {sorted(found)}")
    return [of_class[name] for name in classes]


class SuperclassLoss:
    """The cross-entropy of the gates and the super-classes of the labels.

    Attributes:
        of_class: the super-class of each class, which is the index of its expert.
    """

    def __init__(self, settings: SuperclassConfig, model: nn.Module, classes: Sequence[str]) -> None:
        self.weight, self.classes = settings.weight, classes
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseMoE)}
        sizes = {layer.num_experts // layer.ensemble_size for layer in layers.values()}
        if len(sizes) != 1 or not all(layer.per_token for layer in layers.values()):
            needed = f"{routers_where('per_token', True)} and one number of experts"
            raise ConfigError(f"{SOURCE} needs sparse layers with {needed}")
        self.of_class = read_superclasses(settings.source, classes, sizes.pop())

    def describe(self) -> str:
        """The super-classes, in words."""
        groups = [[] for _ in range(max(self.of_class) + 1)]
        for name, index in zip(self.classes, self.of_class, strict=True):
            groups[index].append(name)
        return f"super-classes: {' | '.join(', '.join(group) for group in groups)}"

    def __call__(self, record: RoutingRecord, target: Tensor) -> dict[str, Tensor]:
        """{"superclass_loss": mean over the layers, "superclass_top1": how often the largest logit is right}, scalars,
        of a recorded batch and its labels (B,), or the classes' shares in mixed images (B, C)."""
        target_BE = self._target(target)
        found = [self._of_layer(call, target_BE) for _, call in record.calls]
        loss, top1 = (torch.stack(values).mean() for values in zip(*found, strict=True))
        return {"superclass_loss": loss, "superclass_top1": top1}

    def _target(self, target: Tensor) -> Tensor:
        of_class = torch.tensor(self.of_class, device=target.device)
        share_CE = F.one_hot(of_class).float()
        return share_CE[target] if target.ndim == 1 else target.float() @ share_CE

    def _of_layer(self, call: LayerRouting, target_BE: Tensor) -> tuple[Tensor, Tensor]:
        logits_BTE, real_BT = call.tokens(call.routing.logits_GNE), call.tokens(call.mask)
        target_BE = target_BE.repeat_interleave(len(logits_BTE) // len(target_BE), dim=0)
        loss_BT = -(target_BE[:, None] * logits_BTE.log_softmax(-1)).sum(-1)
        right_BT = (logits_BTE.argmax(-1) == target_BE.argmax(-1, keepdim=True)).float()
        share_BT = real_BT / real_BT.sum(1, keepdim=True).clamp(min=1)
        return ((share_BT * loss_BT).sum(1).mean(), (share_BT * right_BT).sum(1).mean())
