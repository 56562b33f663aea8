"""The photos of the examples: yours, or emoji in folders, one for each class (extra `demo`, no download)."""

from argparse import ArgumentTypeError
from pathlib import Path

from vmoe.data import SourceConfig, build_dataset
from vmoe.utils.files import atomic_file


def photo_folder(path: str) -> Path:
    """The value of --photos; an error of the parser unless it is a folder with a folder for each class."""
    if not any(each.is_dir() for each in Path(path).glob("*")):
        raise ArgumentTypeError(f"{path} must be a folder with a folder of photos for each class")
    return Path(path)


def emoji_photos(folder: str | Path, per_class: int = 60) -> Path:
    """Makes FOLDER/GROUP/NAME.png of the first `per_class` emoji of each of Unicode's groups; returns the folder.

    Those that are there stay as they are; emoji beyond the first, of an earlier call with more, are removed.
    """
    folder = Path(folder)
    emoji = build_dataset(SourceConfig("emoji_groups", split="train", image_size=64))
    written = dict.fromkeys(emoji.classes, 0)
    for index, label in enumerate(emoji.labels):
        group = emoji.classes[label]
        file = folder / group.replace(" ", "_") / f"{emoji.emoji[index].code}.png"
        written[group] += 1
        if written[group] > per_class:
            file.unlink(missing_ok=True)
        elif not file.exists():
            with atomic_file(file) as draft:
                emoji[index].image.save(draft)
    return folder
