"""Tools for the user's own data.

- `inspection`: examines a random subset of a source;
- `duplicates`: samples that share a caption, an image or a label;
- `inspection_page`: shows an inspection as text and as an HTML page;
- `pack`: writes any source as tar shards with a manifest;
- `bench`: times reading, decoding, resizing and tokenizing.
"""
