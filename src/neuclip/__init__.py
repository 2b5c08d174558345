"""neuclip: CLIP training with learned log-normalizers, for people with few GPUs."""
