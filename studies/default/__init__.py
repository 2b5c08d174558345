"""The study that chose the default method, on the first version of the glyphs."""
