"""Three training steps of many small models, in one process and in several; started by test_equivalence.py.

Each case is trained on a mesh, and its losses, first and last gradients and final weights are saved whole. Every
process takes its part of each batch, and the routing groups are such that they lie within a part.
"""

import json
import sys
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before the processes are forked, so that it is imported once; so is open_clip
import torch.multiprocessing as mp
from open_clip.loss import ClipLoss, SigLipLoss
from torch import nn

import vmoe
from vmoe.distributed.mesh import MeshSize, make_meshes
from vmoe.distributed.parallelize import (
    clip_grad_norm,
    parallelize,
    set_gradient_sync,
    split_groups,
    synchronize_scalars,
)
from vmoe.evaluation.inference import arithmetic
from vmoe.training.large_batch import LargeBatch
from vmoe.training.lora import add_lora
from vmoe.training.optim import create_ema

STEPS, BATCH = 3, 8
TINY = {"num_experts": 4, "noise_std": 0.0}
VMOE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, **TINY}
# A group is an image with its class token, so that it lies in one process whatever their number.
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
    "deepseek": ("vmoe", {"router_preset": "deepseek", "expert_mlp": "swiglu"}),
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
        model = vmoe.create_model("limoe_tiny_patch8_48", **{**LIMOE, **settings})
    else:
        model = vmoe.create_model("vmoe_tiny_patch8_48", **{**VMOE, **settings})
    with torch.no_grad():
        for parameter in model.parameters():  # a head starts with zeros, through which no gradient comes
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batches(kind: str) -> list[dict[str, torch.Tensor]]:
    """The same whole batches in every run."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(2 * STEPS):
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


def loss_of(module: nn.Module, batch: dict[str, torch.Tensor], criterion: nn.Module) -> torch.Tensor:
    """The loss of the process's part of a batch, as `vmoe.training.objectives` computes it."""
    if "label" in batch:
        return nn.functional.cross_entropy(module(batch["image"]), batch["label"])
    return criterion(*module(batch["image"], batch["text"]))


def outputs_of(module: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a contrastive loss compares, by name."""
    return dict(zip(("image_features", "text_features", "logit_scale", "logit_bias"), module(**batch)))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def train(case: str, size: MeshSize | None, options: list[str]) -> dict[str, torch.Tensor]:
    """Losses, gradients of the first and the last step, and weights after that, whole."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if size else (0, 1)
    # The weights are those of the first process.
    with nullcontext() if rank == 0 or size.is_plain else torch.device("meta"):
        model = make_model(case).train()
    if "lora" in options:
        add_lora(model, ["attention", "experts", "router"], r=2, alpha=4)
    if "checkpointing" in options:
        model.set_grad_checkpointing()
    precision = "bf16" if "bf16" in options else "float32"
    accumulate = 2 if {"accumulate", "features"} & {*options} else 1
    spread, ema = None, None
    if size:
        spread = partial(parallelize, meshes=make_meshes(size, torch.device("cpu")), device=torch.device("cpu"))
    if "ema" in options:
        ema = create_ema(model, 0.5, None if size is None or size.is_plain else spread)
    module = spread(model) if spread else model
    if "compile" in options:
        module = torch.compile(module, backend="aot_eager")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, fused="fused" in options)
    split_groups(optimizer)
    criterion = ClipLoss(local_loss=world > 1, gather_with_grad=True, rank=rank, world_size=world)
    if case.endswith("sigmoid"):
        criterion = SigLipLoss(rank=rank, world_size=world)
    result, losses, data = {}, [], batches(MODELS[case][0])
    for step in range(STEPS):
        total, together = 0.0, None
        parts = data[step * accumulate : (step + 1) * accumulate]
        parts = [{name: tensor.tensor_split(world)[rank] for name, tensor in batch.items()} for batch in parts]
        if "features" in options:
            with torch.no_grad():
                outputs = [outputs_of(module, batch) for batch in parts]
            together = LargeBatch(outputs, lambda whole: criterion(**whole))
        for part, batch in enumerate(parts):
            set_gradient_sync(module, part == accumulate - 1)
            with vmoe.record_routing(model) as record, arithmetic(precision, torch.device("cpu")):
                if together is None:
                    loss = loss_of(module, batch, criterion)
                else:
                    loss = together.loss(part, outputs_of(module, batch))
            loss = (loss + record.auxiliary_loss()) / accumulate
            loss.backward()
            total += loss.detach()
        synchronize_scalars(model)
        norm = clip_grad_norm(parameters, 1.0)
        if world > 1:
            dist.all_reduce(total)
        losses.append(torch.stack([total / world, norm]))
        if step in (0, STEPS - 1):
            trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
            result |= {f"gradient {step} of {name}": whole(p.grad) for name, p in trained}
        optimizer.step()
        optimizer.zero_grad()
        vmoe.update_expert_bias(model)
        if ema is not None:
            ema.update(model, step=step)
    if ema is not None:
        result |= {f"average {name}": whole(p) for name, p in ema.module.named_parameters()}
    result |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    result |= {f"weight {name}": whole(p) for name, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():  # evaluation, where batches differ in size
        few = {name: tensor[: 1 + rank] for name, tensor in data[0].items() if name != "label"}
        output = model(*few.values())
        result["output"] = (output[0] if isinstance(output, tuple) else output)[:1]
    return {**result, "losses": torch.stack(losses)}


def process(rank: int, world: int, runs: list, file: str) -> None:
    """One of `world` processes: trains each case on its mesh; the first saves what came out."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}.join", rank=rank, world_size=world)
    results = {}
    for case, sizes, options in runs:
        results[json.dumps([case, sizes, options])] = train(case, MeshSize(*sizes) if sizes else None, options)
    if rank == 0:
        torch.save(results, file)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Arguments: a folder, and JSON {number of processes: [[case, mesh sizes or null, options], ...]}."""
    folder, jobs = sys.argv[1], json.loads(sys.argv[2])
    if any("lora" in options for runs in jobs.values() for _, _, options in runs):
        import peft  # noqa: F401
    for world, runs in jobs.items():  # forked, so that the libraries are imported once
        arguments = (int(world), runs, f"{folder}/{world}.pt")
        mp.start_processes(process, arguments, nprocs=int(world), start_method="fork")


if __name__ == "__main__":
    main()
