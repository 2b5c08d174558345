"""`neuclip search`: text to image and image to image over any data, on a local web page.

Modules, lowest first: `embeddings` (computed once, kept on disk), `engine` (what is nearest to a
query), `server` (the page).
"""
