"""The towers: built, prepared, loaded, and used."""
