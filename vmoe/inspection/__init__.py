"""Looking into a model: its size and cost, and figures of what the experts do. Figures need matplotlib."""
