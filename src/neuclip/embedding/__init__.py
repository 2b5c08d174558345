"""A trained model at work: embeddings, classes and similarities.

In reading order:

- `trained_model`: the model of `neuclip.load`;
- `shard_files`: the files of one shard of embeddings;
- `mapped_array`: an array on disk, memory-mapped;
- `embedding_store`: a folder of embeddings, which can be resumed;
- `sharded_embedding`: fills such a folder from a source, by all ranks;
- `stored_images`: the images of such a folder, to search;
- `pair_scores`: CLIP scores of pairs;
- `near_duplicates`: groups of images that are nearly the same;
- `kept_samples`: what a filter keeps, for other tools.
"""
