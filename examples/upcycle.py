"""Upcycle a dense timm model: its MLPs become experts, its outputs stay the same, then training goes on.

    python examples/upcycle.py --photos FOLDER --model vit_small_patch16_224.augreg_in21k --pretrained

--pretrained downloads timm's weights; without it the dense model is trained on the photos first. See docs/upcycling.md.
"""

import argparse
import copy

import timm
import torch
from emoji_photos import emoji_photos, photo_folder
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder

import vmoe
from vmoe.models.flops import model_profile

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--photos", type=photo_folder, help="folder with a folder for each class; without it: emoji")
parser.add_argument("--model", default="test_vit", help="any ViT of timm")
parser.add_argument("--pretrained", action="store_true", help="with timm's weights")
parser.add_argument("--image_size", type=int, default=48)
parser.add_argument("--experts", type=int, default=4)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--per_class", type=int, default=60, help="emoji of each class")
parser.add_argument("--output", default="upcycled.safetensors")
args = parser.parse_args()
torch.manual_seed(0)

folder = args.photos or emoji_photos("runs/emoji_photos", args.per_class)
classes = ImageFolder(folder).classes
settings = {"num_classes": len(classes), "img_size": args.image_size, "pretrained": args.pretrained}
dense = timm.create_model(args.model, **settings)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(dense))
photos = ImageFolder(folder, transform)
if len(photos) < 2:
    raise SystemExit(f"{folder} must hold at least 2 photos, one to train on and one to test with, got {len(photos)}")
num_val = max(1, len(photos) // 5)
train, val = random_split(photos, [len(photos) - num_val, num_val], torch.Generator().manual_seed(0))


def fit(model: torch.nn.Module, epochs: int) -> float:
    """Trains a dense or a sparse model; returns its accuracy on the other photos."""
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    for _ in range(epochs):
        model.train()
        for images, labels in DataLoader(train, batch_size=32, shuffle=True):
            with vmoe.record_routing(model) as record:  # of a dense model the auxiliary loss is 0
                loss = torch.nn.functional.cross_entropy(model(images), labels) + record.auxiliary_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = [model(images).argmax(1) == labels for images, labels in DataLoader(val, batch_size=32)]
    return torch.cat(right).float().mean().item()


print(f"dense: {fit(dense, args.epochs):.1%}")
sparse = vmoe.upcycle(dense, num_experts=args.experts, layers="last2", num_selected_experts=2)
with torch.no_grad():
    images = next(iter(DataLoader(val, batch_size=8)))[0]
    difference = (sparse.eval()(images) - dense.eval()(images)).abs().max()
print(f"upcycled, before any training: outputs differ by {difference:.1e}")
for name, model in (("dense", dense), ("sparse", sparse)):
    profile = model_profile(model)
    print(f"{name}: {profile['parameters_total']:,} parameters, {profile['parameters_active']:,} active")
print(f"dense, trained on: {fit(copy.deepcopy(dense), args.epochs):.1%}")
print(f"sparse, trained on: {fit(sparse, args.epochs):.1%}")
vmoe.save_pretrained(sparse, args.output, extra={"class_names": classes})
print(f"saved to {args.output}")
