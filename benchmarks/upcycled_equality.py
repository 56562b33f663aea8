"""How far upcycled models are from their dense sources before training: `python -m benchmarks.upcycled_equality`.

Published architectures at full size, with random weights, in float32 and eval mode; experts in every second block.
"""

import open_clip
import timm
import torch

import vmoe

TIMM = [
    "vit_small_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "beit3_base_patch16_224",
    "swin_tiny_patch4_window7_224",
]
OPEN_CLIP = ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "EVA02-B-16", "coca_ViT-B-32"]
VMOE = {"vmoe_small_patch32_224": {"num_experts": 0}, "limoe_small_patch32": {"num_experts": 0}}


def difference(name: str, dense: torch.nn.Module) -> None:
    """Print one line of the table."""
    generator = torch.Generator().manual_seed(0)
    for parameter in dense.parameters():  # fresh heads and LayerScales are zero or tiny, and would hide everything
        if parameter.numel() > 1:
            std = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    sparse = vmoe.upcycle(dense.eval(), layers="every2")
    layers = sum(isinstance(module, vmoe.SparseMoE) for module in sparse.modules())
    tower = getattr(dense, "visual", dense)
    size = getattr(tower, "image_size", None) or dense.pretrained_cfg["input_size"][1]
    size = size if isinstance(size, int) else size[0]
    images = torch.randn(2, 3, size, size, generator=generator)
    if hasattr(dense, "encode_text"):
        texts = torch.randint(1, 30000, (2, dense.context_length), generator=generator)
        pairs = [(model.encode_image(images), model.encode_text(texts)) for model in (dense, sparse)]
        first, second = (torch.cat([part.flatten() for part in pair]) for pair in pairs)
    else:
        first, second = dense(images), sparse(images)
    largest, scale = (first - second).abs().max().item(), first.abs().max().item()
    print(f"| {name} | {layers} | {largest:.1e} | {scale:.1f} |", flush=True)


@torch.no_grad()
def main() -> None:
    print("| model | sparse layers | largest difference | largest output |\n| --- | --- | --- | --- |")
    for name in TIMM:
        difference(name, timm.create_model(name))
    for name in OPEN_CLIP:
        difference(f"open_clip {name}", open_clip.create_model(name, pretrained=None, load_weights=False))
    for name, kwargs in VMOE.items():
        difference(f"{name}, dense", vmoe.create_model(name, **kwargs))


if __name__ == "__main__":
    main()
