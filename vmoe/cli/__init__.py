"""The commands: one file each. What imports PyTorch is imported once the arguments are read (`vmoe_command.py`)."""
