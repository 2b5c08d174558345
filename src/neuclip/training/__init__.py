"""Training: the step, the loop around it, and what a run records and saves.

In reading order:

- `assemble`: from settings to a run; `train` is the entry point.
- `components`: the components of a run.
- `trainer`: the loop: data, steps, records, evaluation, checkpoints, signals.
- `step`: one step: encode, loss, backward, update.
- `teacher`: the frozen model of distillation, and its loss.
- `momentum`: the momentum towers, which encode the keys of `moco`.
- `token_supervision`: the head that predicts the tokens of captions, and its loss.
- `accumulation`: the exact gradient of a batch in micro-batches.
- `nonfinite`: steps with non-finite numbers: masked on the device, reported later.
- `optim`: the optimiser of the towers.
- `optimizer_kind`: optimisers by name, and what each takes.
- `parameter_groups`: weight decay and layer-wise learning rates.
- `learning_rate`: schedules as pure functions of the step.
- `loss_arithmetic`: how the loss is computed, checked against the device.
- `loss_scale`: the scale of the loss under float16.
- `training_data`: the training data, opened once, and what is held out of them.
- `finetuning`: the facts from which the settings of a fine-tuning run are derived.
- `device_prefetch`: groups micro-batches into steps and copies them to the device.
- `run_state`: the content of a checkpoint, and what an exact resume needs equal.
- `evaluation_plan`: what a run evaluates, and the metric it follows.
- `best_metric`: the metric that chooses the best checkpoint and ends a run early.
- `evaluating`: evaluation during training.
- `evaluate_only`: evaluation of a checkpoint without training.
- `open_run`: starts a run folder, or finds the checkpoint to resume from.
- `oom_advice`: turns out-of-memory errors into advice.
- `warning_signs`: signs that a run goes wrong, found in its records: overfitting, forgetting,
  a loss at ln B, a temperature at its bound, collapsed embeddings, equal captions.
- `sameness`: how alike the embeddings and the captions of a batch are.
- `records`: metrics, times, logs and the record of the data.
- `main`: entry point of published command lines.
"""
