"""ObjectNet (Barbu et al., NeurIPS 2019): photographs of household objects, 113 of its 313 classes are ImageNet's."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from PIL import Image

from vmoe.data.images import BadSample
from vmoe.data.sources.folder import LabelledFiles, flatten
from vmoe.data.sources.folder_layout import TreeReader
from vmoe.utils.safe_json import read_json

BORDER = 2  # pixels of red, which its authors ask to cut off
LAYOUT = """
objectnet-1.0/
├── images/
│   ├── air_freshener/      (313 class folders)
│   │   ├── 1.png
│   │   └── ...
│   └── ...
└── mappings/
    ├── folder_to_objectnet_label.json
    ├── objectnet_to_imagenet_1k.json
    ├── pytorch_to_imagenet_2012_id.json
    └── imagenet_to_label_2012_v2
"""


class ObjectNet(LabelledFiles):
    """The pictures of those classes that map to ImageNet-1k, without their red border.

    A class's score is the largest of the ImageNet outputs that its own mapping files give it. Pictures of the other
    classes are left out; `left_out` says how many.

    Args:
        path: the folder that holds `images` and `mappings`.

    Raises:
        ValueError: the layout is another, a class is missing or unknown, or a mapping file is malformed.
    """

    def __init__(self, path: str | Path) -> None:
        tree = TreeReader(path, LAYOUT)
        missing = [name for name in ("images", "mappings") if not (tree.root / name).is_dir()]
        if missing:
            raise tree.error(f"has no folder {missing[0]}")
        label_of_folder = _read_json(tree.root / "mappings" / "folder_to_objectnet_label.json", str)
        columns_of_label = read_mappings(tree.root / "mappings")
        evaluated = {folder: label for folder, label in label_of_folder.items() if label in columns_of_label}
        if len(evaluated) < len(columns_of_label):
            lost = sorted(set(columns_of_label) - set(evaluated.values()))
            raise ValueError(f"{path}/mappings/folder_to_objectnet_label.json: has no folder for class {lost[0]!r}")
        repeated = [label for label, count in Counter(evaluated.values()).items() if count > 1]
        if repeated:  # as two classes they would always tie
            same = [folder for folder, label in evaluated.items() if label == repeated[0]]
            raise ValueError(
                f"{path}/mappings/folder_to_objectnet_label.json: folders {' and '.join(same)} have one class, "
                f"{repeated[0]!r}; each must have its own"
            )
        folders = tree.folders("images", known=label_of_folder)
        tree.check_complete(folders, evaluated, "images")
        pictures = {folder: tree.pictures(f"images/{folder}") for folder in folders}
        tree.warn_of_junk()
        kept = sorted(evaluated)
        super().__init__(path, *flatten({f"images/{name}": pictures[name] for name in kept}, range(len(kept))))
        self.classes = [label_of_folder[folder] for folder in kept]
        self.prompt_names = [name.lower() for name in self.classes]
        self.class_columns = [columns_of_label[name] for name in self.classes]
        number = sum(map(len, pictures.values()))
        self.left_out = {"pictures of classes that ImageNet-1k does not have": number - len(self)}

    def read(self, path: Path) -> Image.Image:
        image = self.load(path)
        if min(image.size) <= 2 * BORDER:
            raise BadSample(str(path), f"{image.width} x {image.height} pixels, nothing is left within its border")
        return image.crop((BORDER, BORDER, image.width - BORDER, image.height - BORDER))


def read_mappings(folder: Path) -> dict[str, list[int]]:
    """{ObjectNet's class: sorted outputs of an ImageNet-1k classifier} from the data set's own files.

    objectnet_to_imagenet_1k.json gives ImageNet's names for a class, with "; " between them;
    imagenet_to_label_2012_v2 lists those names, a line each, in the order of ILSVRC 2012's class numbers; and
    pytorch_to_imagenet_2012_id.json gives for each output the place in that list.

    Raises:
        ValueError: a file is missing or malformed, or they do not fit together.
    """
    names_file = folder / "imagenet_to_label_2012_v2"
    try:
        names = [line.strip() for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{names_file}: cannot be read ({error})") from None
    outputs_file = folder / "pytorch_to_imagenet_2012_id.json"
    outputs = {
        place: int(output)
        for output, place in _read_json(outputs_file, int).items()
        if re.fullmatch("[0-9]{1,9}", output)
    }
    if sorted(outputs) != list(range(len(names))) or sorted(outputs.values()) != list(range(len(names))):
        raise ValueError(
            f"{outputs_file}: must give each output 0..{len(names) - 1} one of the {len(names)} lines "
            f"of {names_file.name}"
        )
    output_of_name = {name: outputs[place] for place, name in enumerate(names)}
    repeated = {name for name, count in Counter(names).items() if count > 1}
    columns = {}
    classes_file = folder / "objectnet_to_imagenet_1k.json"
    for label, text in _read_json(classes_file, str).items():
        wanted = text.split("; ")
        unknown = [name for name in wanted if name not in output_of_name or name in repeated]
        if unknown:
            why = "is given twice" if unknown[0] in repeated else "is not"
            raise ValueError(f"{classes_file}: {unknown[0]!r}, of class {label!r}, {why} in {names_file.name}")
        columns[label] = sorted(output_of_name[name] for name in wanted)
    return columns


def _read_json(file: Path, kind: type) -> dict:
    """A JSON object whose values are all of one kind, str or int."""
    try:
        content = read_json(file)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); it comes with ObjectNet's download") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file}: must be a JSON object")
    for key, value in content.items():
        if type(value) is not kind:  # bool is not int here
            raise ValueError(
                f"{file}: {key!r} must have {'a text' if kind is str else 'a whole number'}, got {value!r}"
            )
    return content
