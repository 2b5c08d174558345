"""Shards on other machines, and the cache they are read from."""
