"""What a run records.

In reading order:

- `recorder`: passes records with speed and times to the sinks.
- `step_timer`: times the sections of a step.
- `sinks`: `metrics.jsonl` and the console.
- `trackers`: TensorBoard and Weights & Biases.
- `run_log`: log messages to the terminal and to `out.log`.
- `data_record`: the samples read, and the corrupt ones.
- `fingerprint`: 64 bits that identify the samples read.
"""
