"""The study of quality on several data sets, with development and test splits."""
