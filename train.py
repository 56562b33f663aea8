"""Trains a model: `python train.py --config configs/limoe_tiny_emoji.yaml`; `--help` lists every setting."""

import sys

from vmoe.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
