"""One row of the catalogue: everything the rest of the package knows of a method.

Imports no torch: a row's `build` imports what it needs when it is called.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from neuclip.catalogue.cost import Cost, Setup
from neuclip.catalogue.method_settings import MethodSettings
from neuclip.catalogue.published_trainers import PublishedTrainer
from neuclip.method.choices import AdamRates, BatchOption

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss


STEPS_PER_EPOCH = 1000
"""Training steps that schedules take as an epoch where its length is unknown."""


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that a loss needs; all but the first may be unknown.

    Attributes:
        embed_dim: width of the embeddings.
        steps_per_epoch: training steps in an epoch, for schedules in epochs; none: 1,000.
        num_samples: bound of the sample ids, for methods with a state per sample; none: their
            tables grow with the ids seen.
        global_batch_size: pairs in a training step, over all ranks; none: those of the first call.
        adam: rates of the model's optimiser, for temperatures that are stepped as its weights are.
        sharded: whether each rank keeps only its shard of the prototypes; if not, every rank
            keeps all of them and predicts by itself.
        total_steps: training steps of the whole run, for schedules that last as long; none: each
            method has a default length.
    """

    embed_dim: int
    steps_per_epoch: int | None = None
    num_samples: int | None = None
    global_batch_size: int | None = None
    sharded: bool = True
    adam: AdamRates = field(default_factory=AdamRates)
    total_steps: int | None = None

    @property
    def epoch_length(self) -> int:
        """Training steps that schedules take as an epoch."""
        return self.steps_per_epoch or STEPS_PER_EPOCH

    def epochs(self, unless_known: float) -> float:
        """Length of the run in epochs.

        Args:
            unless_known: what it is taken as if the run's steps are unknown.
        """
        return unless_known if self.total_steps is None else self.total_steps / self.epoch_length


@dataclass(frozen=True)
class Statement:
    """A statement on a method, with what it rests on.

    Attributes:
        what: the statement.
        setting: the setting that follows a reading, as a recipe has it.
        other: the flags that select the other reading.
        settled_by: what would settle a reading; empty where the paper states it.
    """

    what: str
    setting: str = ""
    other: str = ""
    settled_by: str = ""

    @property
    def source(self) -> str:
        """Who says so."""
        return "our reading" if self.settled_by else "the paper"


def unchanged(settings: Any, global_batch_size: int | None, before: object) -> Any:
    """The `resolve` of a method whose settings do not depend on the run."""
    return settings


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """A method of the catalogue.

    Attributes:
        settings: class of its settings, whose field `name` is a `Literal` of the method's name.
        build: makes the loss from settings (with every number resolved) and facts of the run.
        summary: one line for lists.
        normalizer: where its log-normalizers come from.
        state: what the loss remembers between steps, in numbers.
        formula: ASCII text of `neuclip methods NAME`.
        paper: what to cite.
        statements: what the paper states and what is a reading of it, where both are mixed.
        needs_sample_ids: whether it keeps a state per sample.
        takes: what its loss takes beside the pairs: groups of false negatives, weights of pairs,
            hard negatives. The methods of the package take all three.
        resolve: fills in settings that depend on the global batch. Called with the settings, the
            global batch size (none: unknown) and the settings of the run that is continued (none:
            a new run).
        spelling: switches of the published trainers that select the method.
        published: settings of the published form, for command lines that are spelled that way.
        published_with: further settings of the published form, by a switch that tells which code a
            command line is for.
        trainer: the published trainer, whose defaults such command lines get for what they leave
            out.
        aliases: flags of other settings that mean one of this method's, by setting name.
        without_effect: published flags that change nothing here, each with the reason.
        cost: what a step costs each rank, for the table of docs/scaling.md.
    """

    settings: type[MethodSettings]
    build: Callable[[Any, RunFacts], "PairLoss"]
    summary: str
    normalizer: str
    state: str
    formula: str
    paper: str
    statements: tuple[Statement, ...] = ()
    needs_sample_ids: bool = False
    takes: frozenset[BatchOption] = frozenset()
    resolve: Callable[[Any, int | None, MethodSettings | None], Any] = unchanged
    spelling: Mapping[str, object] | None = None
    published: Mapping[str, object] = field(default_factory=dict[str, object])
    published_with: Mapping[str, Mapping[str, object]] = field(
        default_factory=dict[str, Mapping[str, object]]
    )
    trainer: PublishedTrainer | None = None
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    without_effect: Mapping[str, str] = field(default_factory=dict[str, str])
    cost: Callable[[Setup], Cost] | None = None

    @property
    def name(self) -> str:
        """The name that selects the method."""
        return str(self.settings.model_fields["name"].default)

    @property
    def source(self) -> str:
        """The file that declares the method, for messages."""
        module = sys.modules.get(self.settings.__module__)
        return getattr(module, "__file__", None) or self.settings.__module__
