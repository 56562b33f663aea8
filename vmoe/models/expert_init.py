"""How the experts of an upcycled layer come to differ: noise, units drawn again, clusters of a calibration set.

Shapes, by suffix: E experts, C clusters, N tokens, D model width, F hidden width, I inputs and O outputs of a matrix.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.models.calls import call, evaluation_mode
from vmoe.models.dense_mlp import UpcycleError
from vmoe.models.naflex import pass_padding_on
from vmoe.moe import SparseMoE
from vmoe.moe.backends.reference import activate
from vmoe.moe.experts import Experts
from vmoe.moe.layer import routers_where

STEPS = 100  # of k-means at most; it mostly ends by itself before
TOKENS = 16384  # compared at a time


@torch.no_grad()
def redraw_units(experts: Experts, share: float) -> None:
    """Draws a share of the hidden units again, different ones for each expert."""
    fc1, fc2 = experts.fc1, experts.fc2
    F = fc2.weight.shape[2]
    for expert in range(len(fc2.weight) if share > 0 else 0):
        units = torch.randperm(F, device=fc2.weight.device)[: round(share * F)]
        for rows in (units, units + F) if experts.gated else (units,):
            _redraw(fc1.weight[expert], rows, 0)
            if fc1.bias is not None:
                _redraw(fc1.bias[expert], rows, 0)
        _redraw(fc2.weight[expert], units, 1)


@torch.no_grad()
def add_noise(experts: Experts, share: float) -> None:
    """Adds normal noise, with this share of the standard deviation of each expert's weights."""
    for weight in (experts.fc1.weight, experts.fc2.weight) if share > 0 else ():
        std_E11 = weight.float().flatten(1).std(dim=1)[:, None, None].to(weight.dtype)
        weight.add_(torch.randn_like(weight) * std_E11 * share)


def _redraw(tensor: Tensor, index: Tensor, dim: int) -> None:
    """Replaces some rows (dim 0) or columns (dim 1) by normal numbers of the same mean and standard deviation."""
    old = tensor.index_select(dim, index).float()
    if old.numel() > 1:
        tensor.index_copy_(dim, index, (torch.randn_like(old) * old.std() + old.mean()).to(tensor.dtype))


class Clusters:
    """Cluster-aware upcycling (arXiv 2604.13508): each expert starts from a cluster of what its dense MLP sees.

    The inputs of each MLP over a calibration set, except padding at native resolution, are clustered by spherical
    k-means; with `per_image` the mean of each image, whose tokens follow, as in the router. The unit centroids become
    the rows of the router, so that a token's largest logit is that of its cluster. Each matrix of the cluster's expert
    becomes the matrix of lowest rank whose outputs on the cluster's tokens keep `energy` of their squared length: its
    projection on their first principal directions, the data-aware truncated SVD.

    Our reading where the paper's abstract does not say: the rank follows from `energy`, rows have length 1, the second
    matrix sees what the truncated first one gives, and biases stay. The paper's self-distillation loss is not part of
    this.

    Memory: every token of every chosen layer is kept (3.7 GB for a ViT-B, 512 images at 224 px and 12 layers).
    """

    def __init__(self, model: nn.Module, mlps: Iterable[str], batches: Any, energy: float) -> None:
        if isinstance(batches, (Tensor, tuple, Mapping)) or not isinstance(batches, Iterable):
            batches = [batches]
        dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
        self.model, self.energy, self.batches = model, energy, [_checked(batch, dtype) for batch in batches]
        found: dict[str, list[Tensor]] = {name: [] for name in mlps}
        self.sizes: dict[str, list[int]] = {name: [] for name in found}  # tokens of each image

        def keep(name: str, _: nn.Module, args: tuple) -> tuple[Tensor]:
            tokens, mask = (*args, None)[:2]  # a mask is of `pass_padding_on`, and not for the MLP itself
            found[name].append(tokens.flatten(0, -2) if mask is None else tokens[mask])
            own = [tokens[0, ..., 0].numel()] * len(tokens) if mask is None else mask.flatten(1).sum(1).tolist()
            self.sizes[name] += own
            return (tokens,)

        seen = [model.get_submodule(name) for name in found]
        hooks = [mlp.register_forward_pre_hook(partial(keep, name)) for name, mlp in zip(found, seen, strict=True)]
        try:
            pass_padding_on(model, seen)
            self.outputs = self._outputs(model)
        finally:
            pass_padding_on(model)
            for hook in hooks:
                hook.remove()
        if not self.batches:
            raise ValueError("calibration is empty; give a batch of images, or a loader of some")
        if unused := [name for name, parts in found.items() if not parts]:
            raise UpcycleError(f"the calibration set does not reach {unused[0]}; give images and texts as tuples")
        self.inputs = {name: torch.cat(found.pop(name)) for name in list(found)}
        for name, x_ND in self.inputs.items():
            if not x_ND.isfinite().all():
                raise ValueError(
                    f"calibration: {name} sees values that are not finite; check the images, or use float32"
                )

    def _outputs(self, model: nn.Module) -> list[list[Tensor]]:
        with evaluation_mode(model):
            return [_tensors(call(model, batch)) for batch in self.batches]

    @torch.no_grad()
    def specialise(self, layer: SparseMoE, name: str, granularity: int) -> None:
        """Gives a layer of copies the router and the experts of its clusters."""
        if not layer.per_token or layer.settings.gate == "cosine":
            needed = f"{routers_where('per_token', True)} and a linear gate"
            raise ValueError(f"calibration needs {needed}: its rows are the clusters' centroids")
        x_ND = self.inputs[name].float()
        seen_ND = torch.stack([x.mean(0) for x in x_ND.split(self.sizes[name])]) if layer.settings.per_image else x_ND
        try:
            centroid_CD = spherical_k_means(seen_ND, layer.num_experts // granularity)
        except ValueError as error:
            raise ValueError(f"calibration: {name} {error}; give more images, or set fewer experts") from None
        layer.router.weight.copy_(centroid_CD.repeat_interleave(granularity, dim=0))
        cluster_N = (seen_ND @ centroid_CD.T).argmax(1)
        if layer.settings.per_image:  # its tokens follow
            cluster_N = cluster_N.repeat_interleave(torch.tensor(self.sizes[name], device=x_ND.device))
        for expert in range(layer.num_experts if self.energy < 1 else 0):
            self._truncate(layer.experts, expert, x_ND[cluster_N == expert // granularity])

    def _truncate(self, experts: Experts, expert: int, x_ND: Tensor) -> None:
        fc1, fc2 = experts.fc1, experts.fc2
        fc1.weight[expert] = _truncated(fc1.weight[expert].float(), x_ND, self.energy)
        bias = None if fc1.bias is None else fc1.bias[expert].float()
        hidden_NF = activate(experts.act, experts.gated, F.linear(x_ND, fc1.weight[expert].float(), bias))
        if experts.norm is not None:
            count_E = torch.zeros(experts.num_experts, dtype=torch.long, device=x_ND.device)
            count_E[expert] = len(x_ND)
            hidden_NF = experts.norm(hidden_NF, count_E)
        fc2.weight[expert] = _truncated(fc2.weight[expert].float(), hidden_NF, self.energy)

    def differences(self, sparse: nn.Module) -> dict[str, float]:
        """How far the sparse model is from the dense one on the calibration set, |difference| / |dense|: of each
        layer's output for the dense model's tokens, {its name: number}, and of the whole model's, {"output": number},
        unless the dense model's is zero, as that of a new head may be."""
        found = {}
        with evaluation_mode(self.model), evaluation_mode(sparse):
            for name, x_ND in self.inputs.items():
                layers = [model.get_submodule(name) for model in (sparse, self.model)]
                parts = x_ND.split(self.sizes[name] if layers[0].settings.per_image else TOKENS)
                found[name] = _relative([[layer(part) for layer in layers] for part in parts])
        if any(tensor.any() for batch in self.outputs for tensor in batch):
            pairs = zip(self._outputs(sparse), self.outputs, strict=True)
            found["output"] = _relative([pair for batch in pairs for pair in zip(*batch, strict=True)])
        return found


def spherical_k_means(x_ND: Tensor, C: int) -> Tensor:
    """(C, D) unit centroids of the directions of N vectors, by Lloyd's steps from a k-means++ start (Arthur and
    Vassilvitskii, 2007), random by torch's generator. ValueError: there are fewer directions than clusters."""
    x_ND = F.normalize(x_ND, dim=1)
    chosen = torch.randint(len(x_ND), (1,), device=x_ND.device)
    nearest_N = 1 - x_ND @ x_ND[chosen[0]]
    for _ in range(C - 1):
        nearest_N = nearest_N.clamp(min=0).where(nearest_N > 1e-6, 0)
        if not nearest_N.any():
            raise ValueError(f"sees fewer than {C} different tokens")
        chosen = torch.cat([chosen, torch.multinomial(nearest_N, 1)])
        nearest_N = torch.minimum(nearest_N, 1 - x_ND @ x_ND[chosen[-1]])
    centroid_CD, previous_N = x_ND[chosen], None
    for _ in range(STEPS):
        similarity_N, cluster_N = (x_ND @ centroid_CD.T).max(1)
        if previous_N is not None and torch.equal(cluster_N, previous_N):
            break
        member_NC = F.one_hot(cluster_N, C).to(x_ND.dtype)
        centroid_CD = F.normalize(member_NC.T @ x_ND, dim=1)
        empty = (member_NC.sum(0) == 0).nonzero()[:, 0]
        centroid_CD[empty] = x_ND[similarity_N.argsort()[: len(empty)]]  # those that fit their cluster least
        previous_N = cluster_N
    return centroid_CD


def _truncated(weight_OI: Tensor, x_NI: Tensor, energy: float) -> Tensor:
    """The matrix of lowest rank whose outputs for some inputs keep a share of their squared length."""
    if wide := weight_OI.shape[0] > weight_OI.shape[1]:  # find the outputs' directions in the smaller of two spaces
        values_I, vectors_II = torch.linalg.eigh(x_NI.T @ x_NI)
        outputs = weight_OI @ (vectors_II * values_I.clamp(min=0).sqrt())  # of vectors with the same second moments
    else:
        outputs = x_NI @ weight_OI.T
    if not outputs.any():  # nothing to say of them
        return weight_OI
    energies, directions = (each.flip(-1) for each in torch.linalg.eigh(outputs.T @ outputs))  # largest first
    energies = energies.clamp(min=0)
    rank = int((energies.cumsum(0) < energy * energies.sum()).sum()) + 1
    if wide:
        directions = F.normalize(outputs @ directions[:, :rank], dim=0)
    directions_OR = directions[:, :rank]
    return directions_OR @ (directions_OR.T @ weight_OI)


def _checked(batch: Any, dtype: torch.dtype) -> Any:
    """A batch in a form of `call`, its floating tensors in the model's dtype; ValueError: it has another form."""
    first, *rest = batch if isinstance(batch, (tuple, list)) and batch else (batch,)
    if isinstance(first, Mapping):
        if not first.keys() & {"image", "text", "patches"}:
            raise ValueError(f"calibration: a batch must have 'image', 'text' or 'patches', got the keys {list(first)}")
        first = first.get("image")
    if first is not None and not isinstance(first, Tensor):
        raise ValueError(f"calibration: a batch must be a tensor, tuple or mapping, got {type(first).__name__}")
    has_coordinates = any(getattr(each, "ndim", 0) > 1 for each in rest)
    if first is not None and not (first.ndim == 3 and has_coordinates):  # such are patches
        if first.ndim != 4 or not len(first):
            raise ValueError(f"calibration: images must be (B, C, H, W) with B > 0, got {tuple(first.shape)}")
        if not first.is_floating_point():
            raise ValueError(f"calibration: images must be floating point, as transforms give them, got {first.dtype}")
    return _cast(batch, dtype)


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Mapping):
        return {key: _cast(part, dtype) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_cast(part, dtype) for part in batch)
    return batch.to(dtype) if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def _tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs that hold a result for each input, not numbers such as the logit scale."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.ndim > 1 else []
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _relative(pairs: Sequence[Sequence[Tensor]]) -> float:
    """|ours - theirs| / |theirs|; 0 if both are 0."""
    ours, theirs = (torch.cat([pair[side].flatten().float() for pair in pairs]) for side in (0, 1))
    return ((ours - theirs).norm() / theirs.norm().clamp(min=torch.finfo(theirs.dtype).tiny)).item()
