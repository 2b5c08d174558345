"""From bytes to batches: shards, the loader, and the embedded data set."""
