"""Photos for the examples where you give none: emoji in folders, one for each class (extra `demo`, no download)."""

from pathlib import Path

from vmoe.data import SourceConfig, build_dataset


def emoji_photos(folder: str | Path, per_class: int = 60) -> Path:
    """Writes up to `per_class` emoji of each of Unicode's groups to FOLDER/GROUP/NAME.png, once; returns the folder."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    emoji = build_dataset(SourceConfig("emoji_groups", split="train", image_size=64))
    written = dict.fromkeys(emoji.classes, 0)
    for index, label in enumerate(emoji.labels):
        group = emoji.classes[label]
        if written[group] < per_class:
            written[group] += 1
            file = folder / group.replace(" ", "_") / f"{emoji.emoji[index].code}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            emoji[index].image.save(file)
    return folder
