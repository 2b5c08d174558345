"""Samples by position, from every local format.

In reading order:

- `source`: the interface of all sources, and what they share;
- `tar_headers`: the members of a tar file, from its headers;
- `tar_samples`: from the members of a tar file to samples;
- `tar_index`: the index of one tar shard, kept in a file;
- `shards`: local tar shards;
- `columns`: which columns of a table hold images and captions, and where paths lead;
- `delimited`: csv and tsv, cut into slices of the file;
- `tables`: csv and tsv tables of image paths and captions;
- `json_lines`: the same in JSON;
- `arrow_columns`: columns of Arrow tables: their types, and texts from their buffers;
- `arrow`: parquet tables and Hugging Face datasets;
- `file_tree`: the files below a folder, through links;
- `image_files`: paths of image files, and the key of each;
- `folders`: a folder of images with captions beside them;
- `class_folders`: a folder of images with one folder per class;
- `image_list`: images given one by one;
- `synthetic`: random images and captions;
- `mixture`: several sources as one, with upsampling factors;
- `part`: some samples of a source as a source of their own.
"""
