"""CPU time of an image in train.py, timm's train.py and open_clip's trainer: `python -m benchmarks.trainers --help`.

All of a comparison train the same model on the same JPEG files, with the same crops, batches, optimizer and number of
workers, without clipping of gradients; each epoch ends with a checkpoint, and a classifier's with an evaluation of 8
images. A run of one epoch and one of several are timed, and their difference is divided by the images between them, so
imports and the first epoch do not count. train.py is measured with and without its cache of decoded images, which the
others lack; its images of examples are off. CPU time is that of all processes of a run; other work on the machine
changes it little. timm's scripts are not in its package: --timm_scripts names a checkout of
https://github.com/huggingface/pytorch-image-models; without it those comparisons are skipped.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import yaml

from benchmarks.loader import photograph
from benchmarks.measure import ratios, spread
from benchmarks.session import ROOT, Session, make_parser

CLASSES = 8
RATE, DECAY = 1e-3, 0.05
# name -> (timm's name of the model, its arguments, what timm's script needs beside them: there the layers add their
# losses themselves). Images of 48 pixels: at 224, 90% of the time is the model's own, which both run alike.
CLASSIFIERS = {
    "ViT": ("vit_tiny_patch16_224", {"img_size": 48, "patch_size": 8}, ["--img-size", "48"]),
    "V-MoE": ("vmoe_tiny_patch8_48", {}, ["--device-modules", "vmoe", "--model-kwargs", "auxiliary_loss=attach"]),
}
LIMOE = "limoe_tiny_patch12_48"
OPEN_CLIP = "import sys, vmoe.open_clip; vmoe.open_clip.register()"  # docs/integrations.md
OPEN_CLIP += "; from open_clip_train.main import main; main(sys.argv[1:])"


def cpu_seconds(command: Sequence[str], threads: int) -> float:
    """CPU seconds of a command and of the processes that it started; RuntimeError with what it printed if it failed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read().decode(errors='replace')[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def write_images(folder: Path, number: int) -> None:
    """`number` images in class folders, one of each class to evaluate on, and a table of them with captions."""
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption"))
        for index in range(number):
            path = folder / "train" / f"class{index % CLASSES}" / f"{index:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photograph(index))
            table.writerow((path, f"photo number {index} of class {index % CLASSES}"))
            if index < CLASSES:
                (folder / "validation" / path.parent.name).mkdir(parents=True)
                shutil.copy(path, folder / "validation" / path.parent.name)


def ours(
    folder: Path, args: argparse.Namespace, task: str, name: str, cache: str | None, epochs: int, **kwargs: int
) -> list[str]:
    """train.py for some epochs."""
    contrastive = task == "contrastive"
    pairs = {"train": {"type": "pairs", "path": str(folder / "pairs.csv")}}
    parts = {"train": "train", "val": "validation"}
    folders = {key: {"type": "image_folder", "path": str(folder / part)} for key, part in parts.items()}
    crop = {"scale": [0.9, 1.0], "hflip": 0.0} if contrastive else {"scale": [0.08, 1.0], "hflip": 0.5}
    epoch = args.images // args.batch
    config = {
        "task": task,
        "device": "cpu",
        "model": {"name": name, "kwargs": kwargs},
        "data": {
            **(pairs if contrastive else folders),
            "cache": cache,
            "loader": {"batch_size": args.batch, "num_workers": args.workers},
            "augmentation": {**crop, "ratio": [0.75, 4 / 3]},
        },
        "train": {
            "steps": epochs * epoch,
            "precision": "float32",
            "log_every": 50,
            "checkpoint_every": epoch,
            "eval_every": 0 if contrastive else epoch,
            "clip_grad_norm": None,
        },
        "evaluate": {"examples": 0},  # nor does timm's script draw where tokens went
        "optim": {"name": "adamw", "lr": RATE, "weight_decay": DECAY, "schedule": "cosine", "warmup_steps": 0},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    run = tempfile.mkdtemp(dir=folder)
    return [sys.executable, str(ROOT / "train.py"), "--config", str(file), "--output_dir", run]


def timm_script(folder: Path, args: argparse.Namespace, name: str, more: list[str], epochs: int) -> list[str]:
    """timm's train.py for some epochs."""
    words = f"--model {name} --num-classes {CLASSES} --device cpu -b {args.batch} -j {args.workers} --epochs {epochs}"
    words += f" --opt adamw --lr {RATE} --weight-decay {DECAY} --sched cosine --warmup-epochs 0 --color-jitter 0"
    words += " --train-interpolation bicubic --smoothing 0"
    words += f" --log-interval 50 --data-dir {folder} --output {tempfile.mkdtemp(dir=folder)}"
    return [sys.executable, str(args.timm_scripts / "train.py"), *words.split(), *more]


def open_clip_trainer(folder: Path, args: argparse.Namespace, epochs: int) -> list[str]:
    """open_clip's trainer for some epochs."""
    words = f"--dataset-type csv --csv-separator , --csv-img-key image --csv-caption-key caption --model {LIMOE}"
    words += f" --batch-size {args.batch} --workers {args.workers} --epochs {epochs} --warmup 0 --precision fp32"
    words += f" --device cpu --lr {RATE} --wd {DECAY} --log-every-n-steps 50 --logs {tempfile.mkdtemp(dir=folder)}"
    return [sys.executable, "-c", OPEN_CLIP, "--train-data", str(folder / "pairs.csv"), *words.split()]


def compare(session: Session, model: str, commands: dict[str, Callable[..., list[str]]]) -> None:
    """Rows of a model: CPU milliseconds of an image, and images per CPU second over those of the last trainer."""
    args = session.args
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            one, several = (cpu_seconds(command(epochs=epochs), args.threads or 1) for epochs in (1, args.epochs))
            seconds[name].append((several - one) / (args.epochs - 1) / args.images)
    *_, other = commands
    for name in commands:
        row = {"comparison": model, "name": name, "cpu_ms_per_image": spread([1e3 * one for one in seconds[name]])}
        if name != other:
            row["speed_ratio"] = spread([a / b for a, b in zip(seconds[other], seconds[name])])
        session.add({**row, "ratios": {} if name == other else {other: ratios(seconds[name], seconds[other])}})


def commands_of(pair: str, folder: Path, args: argparse.Namespace) -> dict[str, Callable[..., list[str]]]:
    """{trainer: the command for a number of epochs}."""
    if pair == "LIMoE":
        task, model, kwargs = "contrastive", LIMOE, {}
        other = {"open_clip's trainer": partial(open_clip_trainer, folder, args)}
    else:
        task, (model, kwargs, more) = "classification", CLASSIFIERS[pair]
        if kwargs:
            more = [*more, "--model-kwargs", *(f"{key}={value}" for key, value in kwargs.items())]
        other = {"timm's train.py": partial(timm_script, folder, args, model, more)}
    own = {
        name: partial(ours, folder, args, task, model, cache, **kwargs)
        for name, cache in (("train.py", "auto"), ("train.py, data.cache: null", None))
    }
    return own | other


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("trainers", __doc__.splitlines()[0], rounds=3)
    parser.set_defaults(dtype=["float32"], device="cpu", threads=1)
    parser.add_argument("--timm_scripts", type=Path, metavar="DIR", help="a checkout with timm's train.py")
    parser.add_argument("--pairs", nargs="+", choices=[*CLASSIFIERS, "LIMoE"], default=[*CLASSIFIERS, "LIMoE"])
    parser.add_argument("--batch", type=int, default=32, help="images of a step (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read images (%(default)s)")
    parser.add_argument("--images", type=int, default=960, help="images of an epoch (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the long run (%(default)s)")
    session = Session("trainers", parser, argv, compiles=False)
    args = session.args
    if args.epochs < 2:
        parser.error(f"--epochs must be at least 2, got {args.epochs}")
    if args.images < CLASSES or args.images % args.batch:
        parser.error(f"--images must be at least {CLASSES} and a multiple of --batch, got {args.images}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, args.images)
        for pair in args.pairs:
            if pair != "LIMoE" and args.timm_scripts is None:
                session.note(f"{pair}: skipped, since --timm_scripts was not given.")
            else:
                compare(session, pair, commands_of(pair, folder, args))
    session.finish()


if __name__ == "__main__":
    main()
