"""The state of a dense model's optimizer, carried over to the model that was upcycled from it.

Adam's moments are running means of the gradients; a run that goes on with them needs no new warm-up (arXiv 2212.05055,
appendix B).
"""

import copy

import torch
from torch import nn
from torch.optim import Optimizer

from vmoe.models.dense_mlp import UpcycledFrom, UpcycleError, to_experts
from vmoe.moe import SparseMoE

NOT_PER_WEIGHT = (
    "this optimizer keeps state that is not one number per weight, which has no copy per expert; use Adam or a "
    "relative, or start its state anew"
)


def upcycle_optimizer(
    dense_optimizer: Optimizer, dense_model: nn.Module, sparse_model: nn.Module, sparse_optimizer: Optimizer
) -> None:
    """Carry an optimizer's state over to the upcycled model, so that a run goes on without a new warm-up of it.

    Every expert gets the moments of the MLP that it was copied from, all else its own by name; a router, and whatever
    the dense model does not have, starts fresh. Learning rates and other settings stay those of the new optimizer.

    Args:
        dense_optimizer: of the dense model; both optimizers of the same kind, with state for each element of a tensor
            (SGD, Adam and its relatives, Lion).
        dense_model: as it was upcycled.
        sparse_model: what `upcycle` made of it; also another dense model with the same names, to go on with.
        sparse_optimizer: its new optimizer, before the first step; changed in place.

    Raises:
        UpcycleError: if the optimizers differ, or keep state that is no tensor of a parameter's shape.
    """
    if type(dense_optimizer) is not type(sparse_optimizer):
        raise UpcycleError(
            f"the state of {type(dense_optimizer).__name__} is of no use to {type(sparse_optimizer).__name__}; take "
            "the same optimizer for both models"
        )
    kind = type(dense_optimizer).__name__
    for key in ("momentum", "amsgrad", "centered"):
        old, new = (
            [group.get(key) for group in each.param_groups if group.get(key)]
            for each in (dense_optimizer, sparse_optimizer)
        )
        if new and not old:
            raise UpcycleError(
                f"{kind} with {key}={new[0]} needs state that the dense model's {kind} does not keep ({key} is off); "
                f"take the same {key} for both models, or start the state anew"
            )
    dense_state = {}
    known = {id(parameter) for group in dense_optimizer.param_groups for parameter in group["params"]}
    for name, parameter in dense_model.named_parameters():
        if id(parameter) in known and dense_optimizer.state.get(parameter):
            dense_state[name] = (parameter, dense_optimizer.state[parameter])
    if not dense_state and isinstance(dense_optimizer, torch.optim.SGD) and not dense_optimizer.defaults["momentum"]:
        raise UpcycleError("SGD without momentum keeps no state, so there is nothing to carry over; leave it out")
    if not dense_state:
        raise UpcycleError("the dense optimizer has no state for the dense model's parameters: it made no step yet")
    new = {id(parameter) for group in sparse_optimizer.param_groups for parameter in group["params"]}
    for name, state in _expert_state(dense_state, sparse_model).items():
        parameter = sparse_model.get_parameter(name)
        if id(parameter) in new:
            sparse_optimizer.state[parameter] = state
    # Its own rules say what lies on which device and in which type (Adam's step counts, for example).
    sparse_optimizer.load_state_dict(sparse_optimizer.state_dict())


def _expert_state(dense_state: dict, sparse_model: nn.Module) -> dict[str, dict]:
    """{name of a parameter of the sparse model: its optimizer state}."""
    layers = {name: layer for name, layer in sparse_model.named_modules() if isinstance(layer, SparseMoE)}
    own = dict(sparse_model.named_parameters())
    carried = {}
    for name, (parameter, state) in dense_state.items():
        if name in own and own[name].shape == parameter.shape:
            carried[name] = {key: copy.deepcopy(value) for key, value in state.items()}
    for name, layer in layers.items():
        origin = getattr(layer, "upcycled_from", None)
        if origin is None:
            continue
        part = {key.removeprefix(f"{name}."): pair for key, pair in dense_state.items() if key.startswith(f"{name}.")}
        if f"{origin.layout.fc2}.weight" not in part:
            continue  # the MLP was frozen
        keys = [set(state) for _, state in part.values()]
        if any(each != keys[0] for each in keys):
            raise UpcycleError(NOT_PER_WEIGHT)
        for key in keys[0]:
            values = {own_name: (parameter, state[key]) for own_name, (parameter, state) in part.items()}
            for own_name, value in _copies(values, origin, layer.num_experts).items():
                carried.setdefault(f"{name}.experts.{own_name}", {})[key] = value
        for own_name, (_, state) in part.items():
            if own_name.startswith(f"{origin.layout.act}."):  # of a learned activation, which all experts share
                carried[f"{name}.experts.act.{own_name.removeprefix(f'{origin.layout.act}.')}"] = copy.deepcopy(state)
    return carried


def _copies(values: dict, origin: UpcycledFrom, num_experts: int) -> dict:
    """One entry of the state of an MLP's tensors, as its experts have it."""
    flat = all(not torch.is_tensor(value) or value.numel() == 1 for _, value in values.values())
    if not flat and any(value.shape != parameter.shape for parameter, value in values.values()):
        raise UpcycleError(NOT_PER_WEIGHT)
    if not flat:
        tensors = {name: value for name, (_, value) in values.items()}
        return to_experts(origin.layout, tensors, num_experts, origin.granularity)
    # A number for the whole tensor, such as Adam's step: the same for all tensors that were updated together.
    shapes = to_experts(origin.layout, {name: p.detach() for name, (p, _) in values.items()}, num_experts)
    number = next(iter(values.values()))[1]
    return {name: copy.deepcopy(number) for name in shapes}
