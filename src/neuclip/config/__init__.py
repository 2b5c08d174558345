"""The settings of a run: sections, recipes, and the tree they make. Imports no torch."""
