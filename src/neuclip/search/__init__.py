"""`neuclip search`: searches images by text or by image, on a local web page.

In reading order:

- `exact_search`: compares a query with all images.
- `engine`: finds the nearest images of a query.
- `local_server`: serves one user of this machine, behind limits.
- `server`: answers the requests of the page.
"""
