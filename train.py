"""Trains a model: `python train.py --config configs/limoe_tiny_emoji.yaml`; `--help` shows the settings."""

import sys

from vmoe_command import train as main

if __name__ == "__main__":
    sys.exit(main())
