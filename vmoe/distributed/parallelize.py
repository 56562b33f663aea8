"""Makes a model parallel: DDP, FSDP2 and expert parallelism.

Every process has its own part of the batch, so the gradient of the mean loss is the mean of the processes' gradients.
An expert that is in one of P processes gets the gradients of all P through the exchange;
`vmoe.moe.grouped.local_experts` divides them by P, and FSDP2 averages over the expert's replicas.
"""

import math
from collections.abc import Iterable
from functools import partial
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vmoe.distributed.expert_parallel import ExpertExchange
from vmoe.distributed.mesh import Meshes
from vmoe.models.upcycle import block_mlps
from vmoe.moe.experts import Experts
from vmoe.utils.config import ConfigError

# Methods by which models are called, beside forward().
FORWARD_METHODS = (
    *("encode_image", "encode_text", "forward_features", "forward_head", "forward_intermediates", "member_logits"),
)


def parallelize(model: nn.Module, meshes: Meshes, device: torch.device) -> nn.Module:
    """Replicates or shards a model over several processes, with the weights of process 0; returns the module to call.

    That is a DistributedDataParallel if every process holds all weights. Else it is the model, whose parameters become
    DTensors; in all processes but the first it may be on the meta device before. Only process 0 ever holds the whole
    model, and whole parameters are on the device one at a time. They stay float32 whatever the forward pass computes
    in: the router, the norms and evaluation need that. ConfigError: the experts cannot be sharded evenly.
    """
    if meshes.size.is_plain:
        # Buffers are not broadcast: the balancing bias is equal everywhere, and its counts are each process's own.
        names = signature(DistributedDataParallel).parameters  # PyTorch 2.15 renames it
        quiet = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        return DistributedDataParallel(model.to(device), gradient_as_bucket_view=True, **{quiet: False})
    whole = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    model.to("meta")
    ep, dp_shard = meshes.size.ep, meshes.size.dp_shard
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    if ep > 1 and not experts:
        raise ConfigError(f"parallel.ep is {ep}, but the model has no experts; set it to 1")
    for name, module in experts.items():
        if ep > 1:
            _shard_experts(name, module, meshes.world["ep"])
        mesh = meshes.dense if ep == 1 else meshes.copies_of_experts
        fully_shard(module, mesh=mesh, shard_placement_fn=partial(_placement, dp_shard, ep))
    # FSDP2 cannot shard a scalar; those (the logit scale) are replicated, see `synchronize_scalars`, and so are
    # modules that say so.
    whole_everywhere = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for module in model.modules():
        whole_everywhere.update(module.parameters() if getattr(module, "replicate", False) else ())
    for name in block_mlps(model):
        fully_shard(model.get_submodule(name.removesuffix(".mlp")), mesh=meshes.dense, ignored_params=whole_everywhere)
    # The root is resharded too, so that a parameter is a DTensor whenever it is read.
    fully_shard(model, mesh=meshes.dense, ignored_params=whole_everywhere, reshard_after_forward=True)
    for name in FORWARD_METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    model.to_empty(device=device)
    _scatter_weights(model, whole, device)
    return model


@torch.no_grad()
def _scatter_weights(model: nn.Module, whole: dict[str, Tensor], device: torch.device) -> None:
    """Gives each process its part of process 0's weights, tensor by tensor."""
    first = dist.get_rank() == 0
    for name, target in [*model.named_parameters(), *model.named_buffers()]:
        value = whole.pop(name)  # freed as soon as it is sent
        value = value.to(device) if first else torch.empty(value.shape, dtype=value.dtype, device=device)
        dist.broadcast(value, 0)
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).to_local()
            target = target.to_local()
        target.copy_(value)


def _shard_experts(name: str, experts: Experts, mesh: DeviceMesh) -> None:
    """Keeps this process's share of the experts, and exchanges rows with the others."""
    P = mesh.size()
    if experts.num_experts % P:
        raise ConfigError(
            f"parallel.ep is {P}, and {name} has {experts.num_experts} experts; it must be a divisor of that number"
        )
    if next(experts.act.parameters(), None) is not None:
        raise ConfigError(f"parallel.ep is {P}, and all experts of {name} share a learned activation; set it to 1")
    for module in experts.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(shard, requires_grad=parameter.requires_grad))
    experts.exchange = ExpertExchange(mesh.get_group())


def _placement(dp_shard: int, ep: int, parameter: nn.Parameter) -> Shard:
    """The axis along which FSDP2 shards a stacked parameter: the width with `ep`, else the experts if that is even."""
    # FSDP2 pads what is not even: with more processes than experts most would hold, and gather, nothing but padding.
    sizes = (*parameter.shape, 1)  # a learned activation has one axis
    if ep > 1 and sizes[1] % dp_shard:
        raise ConfigError(
            f"parallel.dp_shard is {dp_shard}, and the experts' width {sizes[1]} is no multiple of it; choose a divisor"
        )
    return Shard(1 if ep > 1 or (sizes[0] % dp_shard and sizes[1] % dp_shard == 0) else 0)


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameters are sharded over processes, so that these must call the model together."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def set_gradient_sync(module: nn.Module, sync: bool) -> None:
    """Whether the next backward pass of DDP averages gradients: with accumulation only the last one of a step has to.

    Sharded models always do (else FSDP2 would keep the whole gradient), and compiled ones (else they compile twice).
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = sync


def synchronize_scalars(model: nn.Module) -> None:
    """Averages the gradients of what is not sharded, which FSDP2 does not, after a sharded model's backward pass."""
    if not is_sharded(model):
        return
    grads = [p.grad for p in model.parameters() if not isinstance(p, DTensor) and p.grad is not None]
    if grads:
        mean = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(mean)
        for grad, value in zip(grads, (mean / dist.get_world_size()).split([grad.numel() for grad in grads])):
            grad.copy_(value.view_as(grad))


def split_groups(optimizer: Optimizer) -> None:
    """Splits parameter groups by their mesh, before the first step: lists of tensors cannot mix them."""
    groups = []
    for group in optimizer.param_groups:
        kinds: dict[object, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            kind = parameter.device_mesh if isinstance(parameter, DTensor) else None
            kinds.setdefault(kind, []).append(parameter)
        groups += [{**group, "params": parameters} for parameters in kinds.values()]
    optimizer.param_groups[:] = groups


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of parameters on different meshes too. Infinity only measures the norm."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if max_norm < math.inf:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm
    world = dist.get_world_size()
    squares, locals_ = [], []
    for parameter in parameters:
        grad, parts = parameter.grad, 1
        if isinstance(grad, DTensor):
            sizes = zip(grad.placements, grad.device_mesh.shape)
            parts = torch.Size(size for placement, size in sizes if placement.is_shard()).numel()
            grad = grad.to_local()
        locals_.append(grad)
        # A part that several processes hold counts once.
        squares.append(torch.linalg.vector_norm(grad, dtype=torch.float32).square() * (parts / world))
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    if max_norm < math.inf:
        torch._foreach_mul_(locals_, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
