"""Five training steps of many small models, in one process or in several; run by test_equivalence.py under torchrun.

Each case is trained on a fixed mesh and its losses, first gradients and final weights are saved whole. Every process takes
its part of each batch, and the routing groups are such that they lie within a part.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import vmoe
from vmoe.distributed.mesh import MeshSize, make_meshes
from vmoe.distributed.parallelize import (
    clip_grad_norm,
    parallelize,
    set_gradient_sync,
    split_groups,
    synchronize_numbers,
)

STEPS, BATCH, ACCUMULATE = 5, 8, 2
TINY = {"num_experts": 4, "noise_std": 0.0}
VMOE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, **TINY}
# A group is a picture with its class token, so that it lies in one process whatever their number.
GROUP = {"group_size": 5}
LIMOE = {
    "img_size": 16,
    "patch_size": 8,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "embed_dim": 8,
    "context_length": 6,
    "vocab_size": 32,
    "eot_token_id": 31,
    **TINY,
}
LIMOE_GROUP = {"group_size": 10}
MODELS = {
    "top_1": ("vmoe", {**GROUP, "num_selected_experts": 1, "capacity_factor": 1.0, "capacity_multiple_of": 1}),
    "top_2_bpr": ("vmoe", {**GROUP, "num_selected_experts": 2, "capacity_factor": 0.6, "batch_priority": True}),
    "dropless": ("vmoe", {**GROUP, "num_selected_experts": 2, "capacity_factor": float("inf"), "gshard_loss": 0.01}),
    "dropless_all": ("vmoe", {"num_selected_experts": 2, "capacity_factor": float("inf"), "importance_loss": 0.0}),
    "expert_choice": ("vmoe", {"router": "expert_choice", "capacity_factor": 1.0}),
    "soft": ("vmoe", {"router": "soft", "num_slots": 2}),
    "batch_losses": ("vmoe", {"capacity_factor": float("inf"), "auxiliary_loss_scope": "batch", "gshard_loss": 0.1}),
    "limoe": ("limoe", {**LIMOE_GROUP, "capacity_factor": 1.0, "capacity_multiple_of": 1}),
    "limoe_dropless": ("limoe", {"capacity_factor": float("inf"), "auxiliary_loss_scope": "batch"}),
    "limoe_sigmoid": ("limoe", {**LIMOE_GROUP, "init_logit_bias": -10.0}),
}


def make_model(name: str) -> nn.Module:
    """The model of a case, the same in all processes."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    if kind == "limoe":
        return vmoe.create_model("limoe_tiny_patch8_48", **{**LIMOE, **settings})
    return vmoe.create_model("vmoe_tiny_patch8_48", **{**VMOE, **settings})


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    """The same whole batches in every run."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(STEPS * ACCUMULATE):
        batch = {"image": torch.randn(BATCH, 3, 16, 16, generator=generator)}
        if kind == "limoe":
            text = torch.randint(1, 31, (BATCH, 6), generator=generator)
            # Every caption has a few words, and different numbers of them.
            end = torch.randint(2, 6, (BATCH,), generator=generator)
            batch["text"] = text.scatter(1, end[:, None], 31)
        else:
            batch["label"] = torch.randint(0, 3, (BATCH,), generator=generator)
        result.append(batch)
    return result


def loss_of(module: nn.Module, batch: dict[str, torch.Tensor], sigmoid: bool, rank: int, world: int) -> torch.Tensor:
    """The loss of the process's part of a batch, as `vmoe.training.tasks` computes it."""
    from open_clip.loss import ClipLoss, SigLipLoss

    if "label" in batch:
        return nn.functional.cross_entropy(module(batch["image"]), batch["label"])
    output = module(batch["image"], batch["text"])
    if sigmoid:
        return SigLipLoss(rank=rank, world_size=world)(*output)
    return ClipLoss(local_loss=world > 1, gather_with_grad=True, rank=rank, world_size=world)(*output)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def train(case: str, size: MeshSize | None, options: list[str]) -> dict[str, torch.Tensor]:
    """Losses, gradients of the first step and weights after the last, whole."""
    model = make_model(case).train()
    rank, world = (dist.get_rank(), dist.get_world_size()) if size else (0, 1)
    if "checkpointing" in options:
        model.set_grad_checkpointing()
    module = parallelize(model, make_meshes(size, torch.device("cpu"))) if size else model
    if "compile" in options:
        module = torch.compile(module, backend="aot_eager")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)
    split_groups(optimizer)
    kind, sigmoid = MODELS[case][0], case.endswith("sigmoid")
    result, losses, data = {}, [], batches(kind)
    for step in range(STEPS):
        total = 0.0
        for part in range(ACCUMULATE):
            batch = data[step * ACCUMULATE + part]
            batch = {name: tensor.tensor_split(world)[rank] for name, tensor in batch.items()}
            set_gradient_sync(module, part == ACCUMULATE - 1)
            with vmoe.record_routing(model) as record:
                loss = loss_of(module, batch, sigmoid, rank, world)
            loss = (loss + record.auxiliary_loss()) / ACCUMULATE
            loss.backward()
            total += loss.detach()
        synchronize_numbers(model)
        norm = clip_grad_norm(parameters, 1.0)
        if world > 1:
            dist.all_reduce(total)
        losses.append(torch.stack([total / world, norm]))
        if step == 0:
            result |= {f"gradient of {name}": whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    result |= {f"weight {name}": whole(p) for name, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():  # evaluation, where batches differ in size
        few = {name: tensor[: 1 + rank] for name, tensor in data[0].items() if name != "label"}
        output = module(*few.values()) if size is None or is_plain(size) else model(*few.values())
        result["output"] = (output[0] if isinstance(output, tuple) else output)[:1]
    return {**result, "losses": torch.stack(losses)}


def is_plain(size: MeshSize) -> bool:
    return size.is_plain


def main() -> None:
    """Arguments: the file to save to, and a JSON list of [case, mesh sizes or null, options]."""
    file, runs = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    results = {}
    for case, sizes, options in runs:
        key = json.dumps([case, sizes, options])
        results[key] = train(case, MeshSize(*sizes) if sizes else None, options)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(results, file)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
