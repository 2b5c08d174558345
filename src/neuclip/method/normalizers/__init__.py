"""Where the log-normalizers come from: one source a module."""
