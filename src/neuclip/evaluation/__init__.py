"""Judging: zero-shot classification, retrieval, the error of the log-normalizers, DataComp's suite.

Modules, lowest first: `interfaces`, `suite`; `embed`, `splits`, `ranking`, `metrics`, `results`,
`hub`; `zero_shot`, `retrieval`, `normalizer_error`, `gallery`, `task_sets`; `judge` (a split by all
judges), `benchmark` (a set as DataComp does), `convert`; `suite_run`, `download`. Nothing here
knows the trainer; `datacomp` is a door to the command line.
"""
