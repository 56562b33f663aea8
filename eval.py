"""Evaluates a model: `python eval.py --config configs/eval/NAME.yaml --checkpoint RUN` (see `--help`)."""

import sys

from vmoe_command import evaluate as main

if __name__ == "__main__":
    sys.exit(main())
