"""How the experts are computed."""
