"""Zero-shot classification and search with an image-text model.

    python examples/zero_shot_and_search.py --checkpoint RUN --photos FOLDER --labels "red apple,woman surfing"

Without a checkpoint it trains a LIMoE on emoji and their names first; without photos it searches the emoji that the
training has not seen. The commands vmoe-classify, vmoe-embed and vmoe-search do the same.
"""

import argparse
from pathlib import Path

import vmoe
from vmoe.cli.train import main as train
from vmoe.data import LoaderConfig, SourceConfig, build_dataset
from vmoe.data.dataset import ImageFiles
from vmoe.data.images import find_images
from vmoe.evaluation.embeddings import embed_images
from vmoe.evaluation.loaded_model import load_model
from vmoe.evaluation.search import SearchIndex


def photos(path: str) -> list[str]:
    """The images in a folder; an error of the parser if there are none."""
    try:
        return [str(file) for file in find_images([path])]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", help="folder of a run, or a .safetensors file")
parser.add_argument("--photos", type=photos, help="folder of images")
parser.add_argument("--labels", default="woman surfing,man biking,family,flag", help="separated by commas")
parser.add_argument("--search", default="woman biking dark skin tone")
parser.add_argument("--steps", type=int, default=300, help="of the training")
parser.add_argument("--output", default="runs/example_limoe")
args = parser.parse_args()

# 1. A model: train.py's own main job, only shorter.
if args.checkpoint is None:
    options = ["--train.eval_every=0", "--evaluate.examples=0", f"--train.steps={args.steps}"]
    if train(["--config=limoe_tiny_emoji", f"--output_dir={args.output}", *options]):
        raise SystemExit(1)
loaded = load_model(args.checkpoint or args.output)

# 2. Images: your photos, or emoji.
if args.photos is not None:
    dataset = ImageFiles(".", args.photos)
else:
    dataset = build_dataset(SourceConfig("emoji", split="held_out"))

# 3. Zero-shot: which of the labels fits an image best?
labels = [label.strip() for label in args.labels.split(",")]
images = [dataset[index].image for index in range(min(5, len(dataset)))]
probabilities = vmoe.zero_shot_classify(loaded.model, loaded.tokenizer, images, labels)
for index, row in enumerate(probabilities):
    print(f"{dataset.name_of(index)}: {labels[row.argmax()]} ({row.max():.1%})")

# 4. Search: embed all images, then ask. The index of an earlier call, maybe of other photos, is replaced.
index_file = Path(args.output) / "index.npz"
embed_images(loaded, dataset, index_file, LoaderConfig(batch_size=64, num_workers=0, on_bad="skip"))
index = SearchIndex(index_file)
print(f"\nimages most similar to {args.search!r}:")
for hit in index.by_text(args.search, top=5):
    print(f"{hit.score:.3f}  {hit.path}  {hit.caption or ''}")
print(f"\ntry: vmoe-search 'a flag' --index {index_file}")
