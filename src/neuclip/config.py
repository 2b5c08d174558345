"""The tree of settings of a run: frozen, typed, one section per component. Imports no torch.

Field names are leaf-unique over all sections, since the command line shows them flat, by the names
that users of open_clip and FastCLIP know. Ranges that one field can tell are declared on the field;
what concerns several fields at once is in `RunConfig.check`.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from neuclip.errors import UserError
from neuclip.methods import (
    AnyMethodSettings,
    MethodSettings,
    MixingSettings,
    NeuCLIPSettings,
    gamma_floor,
)
from neuclip.sections import ModelConfig, ParallelConfig, Section

DataFormat = Literal["auto", "webdataset", "csv", "parquet", "folder", "huggingface"]


class DataConfig(Section):
    """What is read for training."""

    train_data: str | None = Field(
        default=None,
        description="training data: tar shards (a folder, a brace pattern, an address), a table, "
        "or a folder of images; :: joins several",
    )
    data_format: DataFormat = Field(
        default="auto", description="what the training data are; auto: told from name and content"
    )
    train_data_upsampling_factors: str | None = Field(
        default=None,
        description="visits per sample and round for each of several sources, as in 1::2.5; "
        "none: every sample once",
    )
    shuffle_window: int | None = Field(
        default=None,
        ge=0,
        description="shards that are shuffled together; 0: all; none: all of local data, 16 of "
        "remote data",
    )
    train_num_samples: int | None = Field(
        default=None, ge=1, description="samples in an epoch; none: as many as the shards hold"
    )
    data_size: int | None = Field(
        default=None,
        ge=1,
        description="bound of the samples' integer keys, which then are the sample ids; "
        "none: ids are positions in the shard index",
    )
    caption_key: str | None = Field(
        default=None,
        description="take the caption from this key of the .json member instead of .txt",
    )
    csv_separator: str | None = Field(
        default=None,
        description="between the columns of a table; none: a tab if its first line has one, else a "
        "comma",
    )
    csv_img_key: str | None = Field(
        default=None,
        description="column of a table with the image; none: filepath, image, ... whichever is "
        "there",
    )
    csv_caption_key: str | None = Field(
        default=None,
        description="column of a table with the caption; none: title, caption, ... whichever is "
        "there",
    )
    cache_dir: str | None = Field(
        default=None,
        description="folder for shards fetched from other machines; none: neuclip/shards in "
        "$XDG_CACHE_HOME or ~/.cache",
    )
    cache_size_gb: float = Field(
        default=50.0, gt=0, description="GiB of fetched shards to keep at most"
    )
    allow_pipe: bool = Field(
        default=False, description="run the shell commands that 'pipe:' data consist of"
    )
    max_image_pixels: int = Field(
        default=178_956_970,
        ge=1,
        description="a picture of more pixels counts as damaged, and is not decoded",
    )
    full_decode: bool = Field(
        default=False,
        description="decode every JPEG at full scale, also where the model sees less than half",
    )
    batch_size: int = Field(
        default=64, ge=2, description="pairs per process and micro-batch (a step has accum_freq)"
    )
    accum_freq: int = Field(
        default=1,
        ge=1,
        description="micro-batches per step: the loss is that of batch_size x accum_freq x "
        "processes pairs, the memory that of batch_size",
    )
    global_batch_size: int | None = Field(
        default=None,
        ge=2,
        description="pairs per step over all processes, which take equal shares of it, at most "
        "batch_size at a time; none: batch_size x accum_freq x processes",
    )
    workers: int = Field(default=2, ge=0, description="reading processes per training process")
    max_bad_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="stop when more than this share of the samples read is damaged",
    )


class OptimConfig(Section):
    """AdamW and its schedules."""

    epochs: int = Field(default=32, ge=0, description="length of the schedule")
    stop_epochs: int | None = Field(
        default=None,
        ge=1,
        description="stop after this many epochs, on the schedule of all of them",
    )
    lr: float = Field(default=5e-4, gt=0, description="peak learning rate")
    lr_min: float = Field(
        default=0.0, ge=0, description="learning rate at the end of the cosine schedule"
    )
    lr_scheduler: Literal["cosine", "const"] = Field(
        default="cosine", description="schedule after warm-up"
    )
    warmup: int = Field(default=10000, ge=0, description="steps of linear warm-up")
    wd: float = Field(
        default=0.2, ge=0, description="weight decay (not on gains, biases and logit_scale)"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's first decay rate")
    beta2: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="second decay rate; none: 0.98 for ViT, 0.999 otherwise",
    )
    eps: float | None = Field(
        default=None, gt=0, description="AdamW's epsilon; none: 1e-6 for ViT, 1e-8 otherwise"
    )
    grad_clip_norm: float | None = Field(
        default=None, gt=0, description="largest norm of the gradient"
    )
    lr_tau: float | None = Field(
        default=None, gt=0, description="learning rate of the temperature; none: as the towers'"
    )
    max_nonfinite_steps: int = Field(
        default=0,
        ge=0,
        description="skip so many steps whose loss or gradient is not finite before stopping",
    )
    lr_tau_scheduler: Literal["const", "step_thresh", "same"] = Field(
        default="same",
        description="schedule of lr_tau: const, step_thresh (a third of it while the temperature "
        "is at most 0.03), or same (the towers' schedule)",
    )


class EvaluationConfig(Section):
    """What is judged during training, and how often."""

    val_data: str | None = Field(
        default=None, description="evaluation splits (folders of shards), several joined by '::'"
    )
    val_frequency: int = Field(
        default=1, ge=0, description="judge val_data every so many epochs; 0: never"
    )
    val_batch_size: int = Field(
        default=256, ge=1, description="pairs per forward pass when judging"
    )
    zeroshot_frequency: int = Field(
        default=2,
        ge=0,
        description="judge imagenet_val, imagenet_v2 and eval_tasks every so many epochs, and at "
        "the end; 0: never",
    )
    imagenet_val: str | None = Field(
        default=None, description="ImageNet's validation pictures: a folder with one for each class"
    )
    imagenet_v2: str | None = Field(
        default=None, description="the pictures of ImageNet v2: a folder with one for each class"
    )
    eval_tasks: str | None = Field(
        default=None,
        description="tasks of DataComp, joined by ','; see eval_data_dir",
    )
    eval_data_dir: str | None = Field(
        default=None, description="folder of DataComp's evaluation sets"
    )
    eval_samples: int | None = Field(
        default=None,
        ge=100,
        description="judge at most so many samples, evenly spread, of each of imagenet_val, "
        "imagenet_v2 and eval_tasks; none: all",
    )

    def check(self) -> None:
        """Rules over several fields.

        Raises:
            UserError: a field that would have no effect.
        """
        if (self.eval_tasks is None) != (self.eval_data_dir is None):
            raise UserError(
                "eval_tasks (keys of DataComp's tasks) and eval_data_dir (the folder of their "
                "sets) go together: give both"
            )
        if self.eval_samples is not None and not self.zero_shot:
            raise UserError(
                "eval_samples limits imagenet_val, imagenet_v2 and eval_tasks: none is given"
            )

    @property
    def zero_shot(self) -> bool:
        """Whether there is anything to judge besides `val_data`."""
        return any(x is not None for x in (self.imagenet_val, self.imagenet_v2, self.eval_tasks))


class OutputConfig(Section):
    """What is written, and how often."""

    logs: str = Field(
        default="./logs",
        description="folder of the run folders",
        # torchrun takes --logs, even after the script's name, for its own --logs-specs.
        json_schema_extra={"flag": "--logs-dir"},
    )
    save_frequency: int = Field(
        default=1, ge=0, description="keep a checkpoint every so many epochs; 0: the latest only"
    )
    save_every_steps: int = Field(
        default=0, ge=0, description="also save every so many steps; 0: never"
    )
    keep_step_checkpoints: int = Field(default=2, ge=1, description="step checkpoints to keep")
    log_every_n_steps: int = Field(default=50, ge=1, description="steps between two records")
    report_to: Literal["none", "tensorboard", "wandb", "all"] = Field(
        default="none", description="also log to TensorBoard or Weights & Biases"
    )
    profile: bool = Field(default=False, description="save a torch profiler trace of ten steps")


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


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, section by section.

    A section `method` of another name replaces the one below: settings do not leak between methods.
    """
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            other = key == "method" and value.get("name", below.get("name")) != below.get("name")
            merged[key] = dict(value) if other else merge(below, value)
        else:
            merged[key] = value
    return merged


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


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file as a tree.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path} is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"configuration {path}: expected sections, found {type(tree).__name__}")
    return tree
