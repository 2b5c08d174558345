"""Cases of the fuzz script: damaged and hostile files, answers and requests, by kind.

- `mutation`: random changes to bytes and to trees, and text that no file should hold.
- `valid`: the small valid files that are damaged.
- `outcomes`: how a case ends, and what counts as a fault.
- `data_kinds`: shards, images, tables and folders.
- `tar_headers`, `image_headers`: well-formed files with hostile numbers.
- `weight_kinds`: checkpoints and models.
- `run_kinds`: configurations, run folders, results and caches of features.
- `server_kinds`: servers that lie.
- `search_kinds`: requests to the search page.
- `runner`: runs cases in child processes.
"""
