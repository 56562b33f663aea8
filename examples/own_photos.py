"""Your own photos from A to Z: fine-tune a V-MoE, look at its routing, predict, export.

    python examples/own_photos.py --photos FOLDER        # FOLDER/CLASS/IMAGE.jpg; without --photos: emoji

For long runs use `vmoe-train --config vmoe_finetune_folder`, which also continues after a stop.
"""

import argparse

import timm
import torch
from emoji_photos import emoji_photos, photo_folder
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder

import vmoe

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--photos", type=photo_folder, help="folder with a folder for each class")
parser.add_argument("--model", default="vmoe_tiny_patch8_48", help="a sparse model, see vmoe-list-models")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--per_class", type=int, default=60, help="emoji of each class")
parser.add_argument("--output", default="photos.safetensors")
args = parser.parse_args()
if args.epochs < 1:
    parser.error(f"--epochs must be >= 1, got {args.epochs}")
torch.manual_seed(0)

# 1. Data: any PyTorch data set will do.
folder = args.photos or emoji_photos("runs/emoji_photos", args.per_class)
classes = ImageFolder(folder).classes
model = vmoe.create_model(args.model, num_classes=len(classes))  # or timm.create_model, which knows the names too
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
photos = ImageFolder(folder, transform)
if len(photos) < 2:
    raise SystemExit(f"{folder} must hold at least 2 photos, one to train on and one to test with, got {len(photos)}")
num_val = max(1, len(photos) // 5)
train, val = random_split(photos, [len(photos) - num_val, num_val])

# 2. Fine-tune: the auxiliary losses, which balance the experts, are the only difference to a dense model.
optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
for epoch in range(args.epochs):
    model.train()
    for images, labels in DataLoader(train, batch_size=32, shuffle=True):
        with vmoe.record_routing(model) as record:
            loss = torch.nn.functional.cross_entropy(model(images), labels) + record.auxiliary_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

# 3. Look: how evenly are the experts used?
for name, layer in record.layers.items():
    print(f"{name}: load of the experts {layer.load.tolist()}, dropped {layer.metrics['share_dropped']:.1%}")

# 4. Predict.
model.eval()
with torch.no_grad():
    batches = [(model(images).softmax(1), labels) for images, labels in DataLoader(val, batch_size=32)]
probabilities, labels = (torch.cat(parts) for parts in zip(*batches))
print(f"accuracy on {len(val)} other photos: {(probabilities.argmax(1) == labels).float().mean():.1%}")
for index in range(min(3, len(val))):
    probability, best = probabilities[index].max(0)
    print(f"{photos.samples[val.indices[index]][0]}: {classes[best]} ({probability:.1%})")

# 5. Export: one file with weights, settings and class names.
vmoe.save_pretrained(model, args.output, extra={"class_names": classes})
again = vmoe.create_model(pretrained=args.output).eval()
image = val[0][0][None]
with torch.no_grad():
    assert torch.equal(again(image), model(image))
print(f"saved to {args.output}; try: vmoe-classify {folder} --checkpoint {args.output} --top 3")
