"""Training: the loop, its configuration, checkpoints and logs. `train.py` and `vmoe-train` start here."""
