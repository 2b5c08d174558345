"""`neuclip search`: searches images by text or by image, on a local web page.

In reading order:

- `embeddings`: computes image features once and keeps them on disk.
- `engine`: finds the nearest images of a query.
- `server`: serves the page.
"""
