"""Evaluation: zero-shot classification, retrieval, error of the log-normalizers, DataComp's suite.

Modules in reading order:

- `interfaces`: what a model offers, the settings, encoded data, results of one set.
- `class_names`: class names and templates beside the samples.
- `label_classes`: classes from the labels of the samples.
- `split_layouts`: what data are opened for, and how labelled data lie in folders.
- `splits`: opens a split of one's own.
- `held_out`: holds out a share of the training data.
- `own_splits`: opens all splits of a run.
- `embed`: runs the towers over a set.
- `ranking`: how many wrong candidates precede a right one.
- `metrics`: accuracies, recalls and F1 from the choices for each sample.
- `zero_shot`: class vectors, and the choice of a class for each image.
- `retrieval`: recall in both directions.
- `class_draws`: draws of samples class by class, for few-shot and held-out shares.
- `linear_probe`: logistic regression on features.
- `nearest_neighbours`: votes of the nearest training samples.
- `probe_samples`: the labelled samples that these are trained on.
- `probes`: both of them on a set, from all training samples and from a few.
- `normalizer_error`: log-normalizers against their exact values.
- `validation_loss`: InfoNCE over a split, one formula for all methods.
- `gallery`: example retrievals.
- `split_evaluation`: all of these on one split.
- `datacomp`: the 38 tasks of DataComp.
- `evaluate`: evaluates and writes set after set, splits and tasks alike.
- `results`: the files of results and galleries.
- `outcomes`: outcomes per sample, for comparisons between runs.
- `metric_names`: labels and formats of the metrics.
- `blend_choice`: chooses a mix of two models by its results.
"""
