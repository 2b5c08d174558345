"""The mathematics: objectives, normalizers, losses. Plain keyword arguments, no configuration."""
