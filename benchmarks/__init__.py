"""Measurements, not tests: each is a ratio taken in one process, both sides in turn."""
