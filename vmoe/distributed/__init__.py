"""Training in several processes: meshes, sharded weights, expert parallelism."""
