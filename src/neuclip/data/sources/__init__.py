"""What a loader reads from: samples by position."""
