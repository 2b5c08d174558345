"""Checkpoints: written during a run, and read back."""
