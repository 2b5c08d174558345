"""Judging: zero-shot classification, retrieval, and the error of the log-normalizers.

Modules, lowest first: `interfaces`; `embed`, `splits`, `ranking`, `results`; `zero_shot`,
`retrieval`, `normalizer_error`, `gallery`; `judge`. Nothing here knows the trainer.
"""
