"""The machine: towers, optimiser, checkpoints, records, and the loop."""
