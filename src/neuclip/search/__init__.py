"""`neuclip search`: searches images by text or by image, on a local web page.

In reading order:

- `exact_search`: compares a query with all images.
- `approximate_search`: compares it with the images that an index finds.
- `query_vector`: the vector of words, words to avoid, and pictures.
- `caption_filter`: images by a part of their caption.
- `engine`: finds the nearest images of a query, page by page.
- `local_server`: serves one user of this machine, behind limits.
- `server`: answers the requests of the page.
"""
