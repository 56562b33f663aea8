"""Read the routing of a model: which experts take which classes, and which patches of an image.

    python examples/read_routing.py --checkpoint RUN --photos FOLDER      # FOLDER/CLASS/IMAGE.jpg

Without a checkpoint it trains a small V-MoE on emoji first. `vmoe-inspect` writes all of this as a report.
"""

import argparse

import torch
from emoji_photos import emoji_photos, photo_folder

import vmoe
from vmoe.cli.train import main as train
from vmoe.data import SourceConfig, build_dataset
from vmoe.evaluation.loaded_model import load_model
from vmoe.inspection.maps import example_figure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", help="folder of a run, or a .safetensors file: a sparse model")
parser.add_argument("--photos", type=photo_folder, help="folder with a folder for each class; without it: emoji")
parser.add_argument("--per_class", type=int, default=60, help="emoji of each class")
parser.add_argument("--steps", type=int, default=100, help="of the training")
parser.add_argument("--output", default="runs/example_vmoe")
args = parser.parse_args()

if args.checkpoint is None:
    options = ["--train.eval_every=0", "--evaluate.examples=0", "--model.kwargs.batch_priority=true"]
    options += ["--config=vmoe_tiny_emoji_groups", f"--train.steps={args.steps}", f"--output_dir={args.output}"]
    if train(options):
        raise SystemExit(1)
loaded = load_model(args.checkpoint or args.output, "cpu")
folder = args.photos or emoji_photos("runs/emoji_photos", args.per_class)
dataset = build_dataset(SourceConfig("image_folder", str(folder)))

# An expert's load by class: a record holds the decisions of every sparse layer for every token.
chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:200].tolist()
images = torch.stack([loaded.transform(dataset[index].image) for index in chosen])
labels = torch.tensor([dataset[index].label for index in chosen])
with torch.no_grad(), vmoe.record_routing(loaded.model) as record:
    encode = loaded.model if loaded.tokenizer is None else loaded.model.encode_image  # of an image-text model
    encode(images)
if not record.layers:
    raise SystemExit(f"{loaded.checkpoint} has no sparse layer whose routing could be read: give a sparse model")
for name, layer in record.layers.items():
    batch, tokens = layer.batch_shape
    first_BT = layer.expert_index[..., 0].reshape(batch, tokens)  # the best expert of each token
    num_experts = len(layer.load)
    print(f"\n{name}: share of the tokens of a class that go to each of {num_experts} experts, in percent")
    for label, class_name in enumerate(dataset.classes):
        counts = first_BT[labels == label].flatten().bincount(minlength=num_experts)
        shares = 100 * counts / counts.sum().clamp(min=1)
        print(f"{class_name[:20]:20}", *(f"{share:4.0f}" for share in shares))
    metrics = {key: f"{value.item():.3f}" for key, value in layer.metrics.items() if value.ndim == 0}
    print("metrics:", ", ".join(f"{key} {metrics[key]}" for key in list(metrics)[:6]))

# The expert of each patch, drawn.
samples = [dataset[index] for index in chosen[:6]]
if loaded.tokenizer is None:
    names = loaded.class_names or [str(index) for index in range(loaded.model.num_classes)]
else:
    names = dataset.classes
samples = [one._replace(label=None) for one in samples]
file = example_figure(loaded.model, samples, names, loaded.tokenizer, "routing.png")
print(f"\nthe experts of the patches of {len(samples)} images: {file}")
