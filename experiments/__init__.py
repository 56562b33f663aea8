"""The lab: one YAML for each experiment, run by `experiments.launch`, shown by `experiments.report`."""
