"""Peak memory of the converter on a synthetic checkpoint.

python -m benchmarks.convert --mebibytes 2048 --folder DIR

Writes a sharded checkpoint of a V-MoE of about that size (few wide blocks, most of it experts), every array one chunk,
converts it in a fresh process and prints that process's largest resident memory, which counts mapped pages of files.
"""

import argparse
import json
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def config_of(mebibytes: int) -> dict:
    """A V-MoE with two blocks; four fifths of it are the eight experts of the second."""
    width = max(64, int((mebibytes * 2**20 / 4 / (8 * 8 + 8 + 8)) ** 0.5) // 64 * 64)
    return {
        "num_classes": 10,
        "patch_size": [16, 16],
        "hidden_size": width,
        "classifier": "token",
        "encoder": {
            "num_layers": 2,
            "mlp_dim": 4 * width,
            "num_heads": 4,
            "moe": {
                "layers": [1],
                "num_experts": 8,
                "group_size": 5,
                "router": {"dispatcher": {"name": "einsum", "capacity_factor": 1.0, "batch_priority": False}},
            },
        },
        "image_size": 32,
    }


def write(config: dict, prefix: Path) -> int:
    """Write the checkpoint; returns its bytes."""
    import torch

    from vmoe.convert.layout import reference_layout
    from vmoe.convert.settings import model_settings
    from vmoe.models.factory import create_model

    writer = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "convert" / "write_sharded.py"))
    name, kwargs = model_settings(config, {})
    with torch.device("meta"):
        model = create_model(name, **kwargs)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layout = reference_layout(model)
    shapes = {name: entry.view(np.empty(own[entry.tensor], np.float32)).shape for name, entry in layout.items()}

    def read(name: str, where: tuple) -> np.ndarray:
        seed = np.random.default_rng(len(name)).standard_normal(4093).astype(np.float32)
        return np.resize(seed, [part.stop - part.start for part in where])

    # JAX's own limit is a gibibyte per piece; an array beyond it lies in several.
    writer["write_sharded"](prefix, shapes, read, num_shards=2, numbers_per_piece=2**28)
    return 4 * sum(int(np.prod(shape)) for shape in shapes.values())


def peak_mebibytes() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: ru_maxrss would count the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def convert(folder: Path) -> None:
    """Convert; prints start and peak memory and the time."""
    import vmoe.models.factory  # noqa: F401  (part of what importing takes)
    from vmoe.convert import convert_checkpoint

    start, began = peak_mebibytes(), time.monotonic()
    convert_checkpoint(folder / "synthetic", folder / "synthetic.json", folder / "synthetic.safetensors")
    print(json.dumps({"start": start, "peak": peak_mebibytes(), "seconds": time.monotonic() - began}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=2048)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoint and file, twice the size")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        convert(args.folder)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    config = config_of(args.mebibytes)
    (args.folder / "synthetic.json").write_text(json.dumps(config))
    size = write(config, args.folder / "synthetic")
    command = [sys.executable, __file__, "--inner", "--folder", str(args.folder)]  # with a memory of its own
    inner = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    largest = 8 * 4 * config["hidden_size"] ** 2 * 4 / 2**20  # the experts' first or second matrix
    bound = inner["start"] + 2 * largest + 128
    print(f"checkpoint           {size / 2**20:6.0f} MiB")
    print(f"memory after imports {inner['start']:6.0f} MiB")
    print(f"peak memory          {inner['peak']:6.0f} MiB (bound: {bound:.0f}, with two of {largest:.0f})")
    print(f"time                 {inner['seconds']:6.1f} s")


if __name__ == "__main__":
    main()
