"""The towers: built, prepared for training, loaded from files, and used as an encoder."""
