"""The sources of log-normalizers: one per module, with their parts."""
