"""From files to batches.

In reading order:

- `samples`: a sample, and what can be wrong with one;
- `distinct`: deals samples to batches without duplicates;
- `order`: the order in which an epoch visits the samples; pure functions of the seed;
- `patterns`: expands braces in patterns;
- `outlines`: compares drawings without colours, place and size;
- `captions`: decodes caption files;
- `annotations`: labels, hard negatives and pair weights of a sample;
- `decode`: decodes images (JPEG, PNG, ...) to RGB;
- `endings`: the file name endings that shards and folders read;
- `sources`: samples by position, from shards, tables and folders;
- `remote`: shards on other machines, downloaded into a cache;
- `folder_contents`: which files of a folder are read;
- `recognition`: what a source is, by names and first bytes;
- `identity`: what data a run reads, wherever they are;
- `opening`: opens the source that `--train-data` names, and every other one;
- `groups`: which samples share a caption, an image or a label;
- `batch`: fills one batch, in a worker process;
- `epoch_description`: what an epoch visits, in words;
- `watchdog`: reports and ends the wait for a batch that the main process reads itself;
- `reading`: reading processes: passing batches, and what happens when one dies or stalls;
- `loader`: the batches of an epoch, over worker processes and ranks;
- `truncation`: counts captions that are longer than a model reads;
- `damage`: counts corrupt samples and stops the run if they are too many;
- `progress`: how long work reports its progress;
- `shard_writer`: writes tar shards;
- `tools`: `neuclip data inspect`, `pack` and `bench`;
- `demo`: `neuclip data demo`;
- `icons`: `neuclip data icons` and `data emoji`.
"""
