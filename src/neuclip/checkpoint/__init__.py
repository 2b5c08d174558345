"""What a run writes to continue from, and how it is read back."""
