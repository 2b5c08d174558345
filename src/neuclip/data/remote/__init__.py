"""Files on other machines: shards, read through a bounded local cache, and the hub's files.

In reading order:

- `remote_shards`: the source: counts samples, opens cached shards;
- `manifest`: `manifest.json` beside shards: sizes, checksums, counts;
- `cache`: the cache folder, shared by all processes;
- `prefetch`: a process that downloads shards before they are read;
- `fetch`: downloads one file, with retries that resume;
- `transport`: opens an address: http, fsspec;
- `hub`: one file of a repository on the Hugging Face hub.
"""
