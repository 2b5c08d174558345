"""Builds image-text pairs from packages of icons and emoji that people drew, without a download.

`npm_packages` reads the tarballs, `set_names` splits the names of icons into words and styles,
`rendering` draws SVG, `outlines` compares drawings, and `picture_set` holds those that differ.
`held_out` chooses what is kept for evaluation, and `pair_folder` writes the splits.
`icon_collection` reads the icons. `icon_sets` and `emoji_sets` are the two data sets.
"""
