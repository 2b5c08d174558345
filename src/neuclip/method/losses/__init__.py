"""The losses: one objective per module."""
