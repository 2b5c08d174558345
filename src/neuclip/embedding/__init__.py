"""A trained model at work: embeddings, classes and similarities.

In reading order:

- `trained_model`: the model of `neuclip.load`.
"""
