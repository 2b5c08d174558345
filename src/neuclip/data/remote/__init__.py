"""Shards on other machines, read through a bounded local cache.

In reading order:

- `remote_shards`: the source: counts samples, opens cached shards;
- `manifest`: `manifest.json` beside shards: sizes, checksums, counts;
- `cache`: the cache folder, shared by all processes;
- `prefetch`: a process that downloads shards before they are read;
- `fetch`: downloads one file, with retries that resume;
- `transport`: opens an address: http, fsspec.
"""
