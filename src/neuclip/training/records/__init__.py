"""What a run records: metrics, times, and where they go."""
