"""The losses: one objective a module."""
