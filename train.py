"""Trains a model: `python train.py --config configs/limoe_tiny_emoji.yaml`; `--help` lists every setting."""

import os
import sys

# PyTorch warns of each lost connection with a C++ stack; it reads this when it is imported.
if not os.environ.get("VMOE_TRACEBACK"):
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from vmoe.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
