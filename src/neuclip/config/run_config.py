"""The tree of settings of a run: frozen, typed, one section per component. Imports no torch.

Field names are leaf-unique over all sections, since the command line shows them flat, by the names
that users of open_clip and FastCLIP know. Ranges that one field can tell are declared on the field;
what concerns several fields at once is in `RunConfig.check`.
"""

from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from neuclip.catalogue.registry import (
    AnyMethodSettings,
    MethodSettings,
    MixingSettings,
    NeuCLIPSettings,
    gamma_floor,
)
from neuclip.config.sections import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    ParallelConfig,
    Section,
)
from neuclip.errors import UserError


class RunConfig(Section):
    """Everything that decides a run."""

    name: str | None = Field(
        default=None, description="name of the run folder; none: method, model and time"
    )
    seed: int = Field(default=0, ge=0, description="seed of weights, order and augmentation")
    resume: str | None = Field(
        default=None,
        description="checkpoint to continue from; latest: the newest of this run; auto: the newest "
        "that is whole, or a new run where there is none",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute")
    method: AnyMethodSettings = Field(default_factory=NeuCLIPSettings)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()

    def check(self) -> "RunConfig":
        """Rules over several fields.

        Raises:
            UserError: names the fields that contradict each other and what would be right.
        """
        optim, name = self.optim, self.name
        self.model.check()
        self.parallel.check(self.model.precision)
        self.evaluation.check()
        if optim.lr_min > optim.lr:
            raise UserError(
                f"lr_min {optim.lr_min:g} is above lr {optim.lr:g}; it must be at most lr"
            )
        if optim.lr_tau is None and optim.lr_tau_scheduler == "step_thresh":
            raise UserError("lr_tau_scheduler step_thresh needs lr_tau (for example --lr_tau 1e-4)")
        if optim.stop_epochs is not None and optim.stop_epochs > optim.epochs:
            raise UserError(
                f"stop_epochs {optim.stop_epochs} is beyond the schedule of {optim.epochs} epochs; "
                "it must be at most epochs"
            )
        if name is not None and (not name or name in {".", ".."} or "/" in name or "\\" in name):
            raise UserError(
                f"name {name!r} cannot be a folder's name; use letters, digits, '-', '_'"
            )
        if name is None and self.resume in {"auto", "latest"}:
            raise UserError(f"--resume {self.resume} needs --name: which run shall continue?")
        return self

    def resolved(self) -> "RunConfig":
        """The same run with every default that depends on other fields filled in."""
        vit = "vit" in self.model.name.lower()
        optim = self.optim.model_copy(
            update={
                "beta2": _default(self.optim.beta2, 0.98 if vit else 0.999),
                "eps": _default(self.optim.eps, 1e-6 if vit else 1e-8),
            }
        )
        method: MethodSettings = self.method
        if isinstance(method, MixingSettings):
            epochs = max(self.optim.epochs, 1)
            update = {
                "gamma": _default(method.gamma, gamma_floor(float(epochs))),
                "gamma_decay_epochs": _default(method.gamma_decay_epochs, float(epochs)),
            }
            method = method.model_copy(update=update)
        return self.model_copy(update={"optim": optim, "method": method})

    def smoke(self) -> "RunConfig":
        """The same run with a tiny model, 2 epochs of 10 steps, and no trace: seconds on a CPU."""
        accum_freq = min(self.data.accum_freq, 8)
        data = {
            "batch_size": 16 // accum_freq, "accum_freq": accum_freq, "global_batch_size": None,
            "train_num_samples": 160, "data_size": None, "workers": 0,
        }  # fmt: skip
        stop = 1 if self.optim.stop_epochs == 1 else None
        optim = {"epochs": 2, "stop_epochs": stop, "warmup": min(self.optim.warmup, 2)}
        return self.model_copy(
            update={
                "data": self.data.model_copy(update=data),
                "model": self.model.tiny(),
                "optim": self.optim.model_copy(update=optim),
                "output": self.output.model_copy(update={"profile": False}),
            }
        )

    def to_yaml(self) -> str:
        """The tree as YAML, one key per setting."""
        tree = self.model_dump(mode="json")
        tree["method"] = {"name": tree["method"].pop("name"), **tree["method"]}
        return yaml.safe_dump(tree, sort_keys=False)


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def validate(tree: dict[str, Any], source: str) -> RunConfig:
    """Builds the configuration from a tree of plain values.

    Raises:
        UserError: every wrong key or value, with its path, the value and the source.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"{source}: {'.'.join(str(part) for part in problem['loc'])}: {problem['msg']} "
            f"(got {problem['input']!r})"
            for problem in error.errors()
        ]
        raise UserError("\n".join(lines)) from None
