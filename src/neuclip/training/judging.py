"""Judging during training: when, on what, and where the results go."""

from neuclip import distributed
from neuclip.evaluation.judge import JudgeSettings, judge_split
from neuclip.evaluation.results import gallery_path, results_path, write_eval_result
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.training.model import Encoder
from neuclip.training.parts import Parts
from neuclip.training.recorder import Recorder
from neuclip.training.tracking import read_records


class Judge:
    """Judges the towers on the run's evaluation splits, by the first process.

    Args:
        parts: the run.
        recorder: where the results are recorded.
    """

    def __init__(self, parts: Parts, recorder: Recorder) -> None:
        self._parts = parts
        self._recorder = recorder

    def is_due(self, step: int) -> bool:
        """Whether the settings ask for judging after a step: at the end of some epochs."""
        frequency = self._parts.config.evaluation.val_frequency
        epoch, rest = divmod(step, self._parts.steps_per_epoch)
        if not self._parts.splits or not frequency or rest or not epoch:
            return False
        return epoch % frequency == 0 or epoch == self._parts.last_epoch

    def has_judged(self, step: int) -> bool:
        """Whether that was recorded already, before the run was interrupted."""
        records = read_records(self._parts.folder.metrics)
        done = {r["split"] for r in records if r["kind"] == "eval" and r["step"] == step}
        return {split.name for split in self._parts.splits} <= done

    def judge(self, step: int) -> None:
        """Judges, writes `eval_results/` and records."""
        if distributed.is_main():
            for split in self._parts.splits:
                self._judge_split(split, step)
        distributed.barrier()
        self._recorder.start_period()

    def _judge_split(self, split: EvaluationSplit, step: int) -> None:
        parts, folder = self._parts, self._parts.folder.path
        settings = JudgeSettings(
            batch_size=parts.config.evaluation.val_batch_size,
            workers=parts.config.data.workers,
            normalizer_batch_size=parts.global_batch_size,
            seed=parts.config.seed,
        )
        # With several processes a loss may need all of them to predict; one alone would hang.
        alone = not distributed.is_active()
        metrics = judge_split(
            Encoder(parts.clip, parts.device),
            split,
            settings,
            loss=parts.loss if alone else None,
            logit_scale=1 / parts.temperature if alone else None,
            gallery=gallery_path(folder, split.name),
        )
        epoch = step // parts.steps_per_epoch
        write_eval_result(results_path(folder, epoch), split.name, metrics)
        self._recorder.evaluation(parts.position(step), split.name, metrics)
