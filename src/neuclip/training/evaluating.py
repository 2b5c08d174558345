"""Evaluation during training: when, on which data, and where the results go.

All ranks evaluate together, each on its share of the samples.
"""

from collections.abc import Callable, Sequence

from neuclip.config.run_config import RunConfig
from neuclip.evaluation.evaluate import EvaluationSet, evaluate_sets
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings
from neuclip.model.encoder import Encoder
from neuclip.run_folder import read_records
from neuclip.training.components import Components
from neuclip.training.records.recorder import Recorder


def evaluation_settings(config: RunConfig) -> EvaluationSettings:
    """How a run evaluates: in training's precision."""
    return EvaluationSettings(
        batch_size=config.evaluation.val_batch_size,
        workers=config.data.workers,
        stall_limit=config.data.data_timeout,
        seed=config.seed,
    )


Evaluated = dict[str, dict[str, float]]
"""The metrics of each set by its key."""


class Evaluator:
    """Evaluates the towers at the end of some epochs.

    Args:
        run: the components of the run.
        recorder: receives the results.
    """

    def __init__(self, run: Components, recorder: Recorder) -> None:
        self._run = run
        self._recorder = recorder

    def is_due(self, step: int) -> bool:
        """Whether the settings ask for an evaluation after a step."""
        return bool(self.due(step))

    def recorded(self, step: int) -> Evaluated:
        """What was evaluated and recorded after a step before the run was interrupted."""
        records = read_records(self._run.folder.metrics)
        return {
            r["split"]: r["metrics"]
            for r in records
            if r.get("kind") == "eval" and r["step"] == step
        }

    def evaluate(
        self, sets: Sequence[EvaluationSet], step: int, between_sets: Callable[[], None]
    ) -> Evaluated:
        """Evaluates, writes `eval_results/` and records the metrics.

        The towers must be full and equal on all ranks.

        Args:
            sets: the sets to evaluate.
            step: steps done.
            between_sets: called on all ranks after each set; an error that it raises ends the
                evaluation.

        Returns:
            The metrics of each set by its key.
        """
        run = self._run
        model = EvaluatedModel(
            Encoder(run.clip, run.device),
            run.loss if step else None,  # it has learned nothing before the first step
            run.clip.logit_scale,
            run.loader.global_batch_size,
        )
        settings = evaluation_settings(run.config)
        results = run.folder.results(step // run.loader.steps_per_epoch)
        found: Evaluated = {}
        for done in evaluate_sets(model, sets, settings, results):
            self._recorder.evaluation(run.position(step), done.data.key, done.result)
            found[done.data.key] = done.result.metrics
            between_sets()
        self._recorder.start_period()
        return found

    def due(self, step: int, *, at_end: bool = False) -> Sequence[EvaluationSet]:
        """The sets due after a step: at the end of some epochs, and of the last.

        Starting weights are evaluated before the first step.

        Args:
            step: steps done.
            at_end: the run ends here, before its last epoch.
        """
        run, config = self._run, self._run.config.evaluation
        epoch, rest = divmod(step, run.loader.steps_per_epoch)

        def due(frequency: int) -> bool:
            if not frequency or rest or (not epoch and not run.plan.starts_trained):
                return False
            return at_end or epoch == run.last_epoch or epoch % frequency == 0

        return [
            *(run.plan.splits if due(config.val_frequency) else []),
            *(run.plan.zero_shot if due(config.zeroshot_frequency) else []),
        ]
