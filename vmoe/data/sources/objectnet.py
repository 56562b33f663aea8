"""ObjectNet (Barbu et al., NeurIPS 2019), in the layout of its download."""

from collections import Counter
from pathlib import Path

from PIL import Image, ImageOps

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageFiles
from vmoe.data.images import BadSample, file_errors
from vmoe.data.sources.folder_layout import TreeReader
from vmoe.utils.files import read_json, read_text

BORDER = 2  # pixels of red, which its authors ask to cut off
DOWNLOAD = "; it comes with ObjectNet's download"


class ObjectNet(ImageFiles):
    """The images of ObjectNet's 113 classes that are ImageNet's, without their border.

    A class's score is the largest of the ImageNet outputs that its own mapping files give it. Images of the other
    classes are excluded; `left_out` counts them.
    """

    def __init__(self, source: SourceConfig) -> None:
        tree = TreeReader(source.path, "images/CLASS/IMAGE, such as images/air_freshener/1.png, and mappings/")
        for name in ("images", "mappings"):
            if not (tree.root / name).is_dir():
                raise tree.error(f"has no folder {name}")
        label_file = tree.root / "mappings" / "folder_to_objectnet_label.json"
        label_of_folder = _read_mapping(label_file, str)
        columns = read_columns(tree.root / "mappings")
        counts = Counter(label_of_folder.values())
        for label in columns:
            if counts[label] != 1:  # of two folders, as two classes, the scores would always tie
                raise ValueError(f"{label_file}: class {label!r} must have one folder, got {counts[label]}")
        kept = sorted(folder for folder, label in label_of_folder.items() if label in columns)
        folders = tree.folders("images", known=label_of_folder, wanted=kept)
        names, labels = tree.class_images([f"images/{folder}" for folder in kept])
        others = sum(len(tree.images(f"images/{folder}")) for folder in set(folders) - set(kept))
        tree.warn_of_junk()
        super().__init__(source.path, names, labels)
        self.classes = [label_of_folder[folder] for folder in kept]
        self.prompt_names = [name.lower() for name in self.classes]
        self.class_columns = [columns[name] for name in self.classes]
        self.left_out = {"images of classes that ImageNet-1k does not have": others}

    def load(self, path: str | Path, content: bytes | None = None) -> Image.Image:
        image = super().load(path, content)
        if min(image.size) <= 2 * BORDER:
            raise BadSample(str(path), f"{image.width} x {image.height} pixels, nothing is left within its border")
        return ImageOps.crop(image, BORDER)


def read_columns(folder: Path) -> dict[str, list[int]]:
    """{ObjectNet's class: sorted outputs of an ImageNet-1k classifier} from the data set's own files.

    objectnet_to_imagenet_1k.json gives the names for a class, imagenet_to_label_2012_v2 these names in the order of
    ILSVRC 2012's class numbers, and pytorch_to_imagenet_2012_id.json the position in that list for each output.
    """
    names_file, outputs_file = folder / "imagenet_to_label_2012_v2", folder / "pytorch_to_imagenet_2012_id.json"
    classes_file = folder / "objectnet_to_imagenet_1k.json"
    with file_errors(names_file, DOWNLOAD):
        names = [line.strip() for line in read_text(names_file).splitlines() if line.strip()]
    mapping, numbers = _read_mapping(outputs_file, int), range(len(names))
    if set(mapping) != set(map(str, numbers)) or sorted(mapping.values()) != list(numbers):
        lines = f"one of the {len(names)} lines of {names_file.name}"
        raise ValueError(f"{outputs_file}: must give each output 0..{len(names) - 1} {lines}")
    output_of = {position: int(output) for output, position in mapping.items()}
    columns = {}
    for label, text in _read_mapping(classes_file, str).items():
        positions = [[number for number in numbers if names[number] == name] for name in text.split("; ")]
        if any(len(found) != 1 for found in positions):
            raise ValueError(f"{classes_file}: class {label!r}: each of {text!r} must be once in {names_file.name}")
        columns[label] = sorted(output_of[position] for (position,) in positions)
    return columns


def _read_mapping(file: Path, kind: type) -> dict:
    """A JSON object whose values are all of one kind, str or int."""
    with file_errors(file, DOWNLOAD):
        content = read_json(file, kind=dict)
    for key, value in content.items():
        if type(value) is not kind:  # bool is not int here
            raise ValueError(f"{file}: {key!r} must have a value of type {kind.__name__}, got {value!r}")
    return content
