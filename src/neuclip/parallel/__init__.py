"""Several processes: how they start, meet, exchange tensors, share work, and fail."""
