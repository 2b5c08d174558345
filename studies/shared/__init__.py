"""What the studies share: digest of the code, file of rows, runner, errors, tables."""
