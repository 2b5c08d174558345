"""The commands of `neuclip data`."""
