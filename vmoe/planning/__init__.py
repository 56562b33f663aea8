"""What a training run needs before it is started: memory and time for each mesh of processes (`python -m vmoe.plan`)."""
