"""What a training run will need: memory and time for each mesh of processes (`vmoe-plan`)."""
