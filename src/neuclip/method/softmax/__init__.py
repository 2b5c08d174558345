"""log g over a batch of all processes, without its B x B matrix."""
