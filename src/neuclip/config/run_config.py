"""The tree of settings of a run: frozen, typed, one section per component. Imports no torch.

Field names are unique over all sections, since the command line shows them flat, by the names that
users of open_clip and FastCLIP know. A field declares its own range; `check` holds the rules that
concern several fields. `neuclip.config.resolve` fills in what depends on other settings.
"""

import re
from typing import Literal

import yaml
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from neuclip.catalogue.fields import Section
from neuclip.catalogue.method_settings import MethodSettings
from neuclip.catalogue.registry import DEFAULT_METHOD, AnyMethodSettings, check_takes, method_info
from neuclip.config.adaptation_section import AdaptationConfig
from neuclip.config.data_sections import DataConfig
from neuclip.config.loss_section import ComputeConfig
from neuclip.config.optimizer_section import OptimConfig
from neuclip.config.sections import EvaluationConfig, ModelConfig, OutputConfig, ParallelConfig
from neuclip.config.supervision_section import SupervisionConfig
from neuclip.errors import UserError
from neuclip.masking import mask_tree
from neuclip.method.choices import BatchOption


def _default_method() -> MethodSettings:
    return method_info(DEFAULT_METHOD).settings()


def _batch_options(data: DataConfig) -> dict[BatchOption, str]:
    """What the batches bring to the loss, with the flag that asks for it."""
    asked: dict[BatchOption, tuple[bool, str]] = {
        "groups": (data.false_negatives == "mask", "--false-negatives mask"),
        "pair_weights": (data.pair_weight_key is not None, "--pair-weight-key"),
        "negative_features": (data.hard_negative_key is not None, "--hard-negative-key"),
    }
    return {option: flag for option, (wanted, flag) in asked.items() if wanted}


class RunConfig(Section):
    """All settings of a run."""

    name: str | None = Field(
        default=None, description="name of the run folder; none: method, model and time"
    )
    seed: int = Field(default=0, ge=0, description="seed of weights, order and augmentation")
    resume: str | None = Field(
        default=None,
        description="checkpoint to continue from; latest: the newest of this run; auto: the newest "
        "undamaged one, or a new run if there is none",
    )
    derive: Literal["finetune"] | None = Field(
        default=None,
        description="derive the settings that are not given from the weights and the data, as "
        "`neuclip finetune` does; none: the defaults",
    )
    device: str = Field(
        default="auto",
        description="where to compute: auto, cpu, cuda, cuda:1 (a GPU by its index) or mps",
    )
    method: AnyMethodSettings = Field(default_factory=_default_method)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    adaptation: AdaptationConfig = AdaptationConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    compute: ComputeConfig = ComputeConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|mps", value):
            return value
        raise PydanticCustomError("device", "must be auto, cpu, cuda, cuda:1 or mps")

    def check(self) -> None:
        """Checks rules over several fields.

        Raises:
            UserError: names the fields that contradict each other and what would be right.
        """
        name = self.name
        self._check_evaluation()
        self.model.check()
        self.data.check()
        check_takes(self.method.method, _batch_options(self.data))
        self.parallel.check(self.model.precision)
        self.adaptation.check(self.model, fsdp=self.parallel.fsdp)
        self.supervision.check(fsdp=self.parallel.fsdp, only_evaluates=self.only_evaluates)
        self.optim.check()
        if self.derive is not None and self.data.train_data is None:
            raise UserError("neuclip finetune needs your pairs: --train-data pairs.csv")
        if getattr(self.method, "rho", None) == "auto" and not self.optim.warm_start_steps:
            raise UserError(
                "rho auto is measured in the warm start: add --warm-start-steps 50, or give rho a "
                "number"
            )
        if name is not None and (not name or name in {".", ".."} or "/" in name or "\\" in name):
            raise UserError(
                f"name {name!r} cannot be a folder's name; use letters, digits, '-', '_'"
            )
        if name is None and self.resume in {"auto", "latest"}:
            raise UserError(f"--resume {self.resume} needs --name, the run to continue")

    def _check_evaluation(self) -> None:
        evaluation = self.evaluation
        evaluation.check(derives=self.derive is not None)
        for flag, value in (
            ("--canary", evaluation.canary),
            ("--best-metric", evaluation.best_metric),
            ("--val-split", evaluation.val_split),
        ):
            if value is not None and self.only_evaluates:
                raise UserError(f"{flag} {value} is for training, and this line only evaluates")
        labels = self.data.label_key
        evaluated = (evaluation.val_data, evaluation.val_split, evaluation.canary, self.derive)
        if labels is not None and not self.data.labels_join and not any(evaluated):
            raise UserError(
                f"--label-key {labels} has no effect: add --false-negatives mask or "
                "--no-duplicates (labels join false negatives), or --val-data or --val-split "
                "(labels are class names), or leave it out"
            )

    @property
    def only_evaluates(self) -> bool:
        """Whether nothing is trained.

        So it is with `--epochs 0` and a checkpoint, and, as in open_clip, with weights and
        evaluation data but no training data.
        """
        if self.resume is not None and self.optim.epochs == 0:
            return True
        weights = self.model.pretrained is not None or self.resume is not None
        return weights and self.data.train_data is None and self.evaluation.given

    def to_yaml(self) -> str:
        """The tree as YAML, one key per setting; secrets in addresses are masked."""
        tree = mask_tree(self.model_dump(mode="json"))
        tree["method"] = {"name": tree["method"].pop("name"), **tree["method"]}
        return yaml.safe_dump(tree, sort_keys=False)
