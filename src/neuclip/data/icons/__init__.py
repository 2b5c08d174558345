"""Builds image-text pairs from packages of icons and emoji that people drew, without a download.

`npm_packages` reads the tarballs, `set_names` splits the names of icons into words and styles,
`rendering` draws SVG, and `outlines` compares drawings. `held_out` chooses what is kept for
evaluation, and `pair_folder` writes the splits. `icon_sets` and `emoji_sets` are the two data sets.
"""
