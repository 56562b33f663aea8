"""Training in several processes: meshes, sharded weights, experts spread over processes."""
