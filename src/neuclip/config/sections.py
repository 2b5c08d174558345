"""The sections of a run's settings on model, processes, evaluation and output.

Those on data, optimiser, LoRA and the loss's computation are in `data_sections`,
`optimizer_section`, `adaptation_section` and `loss_section`. Imports no torch.
"""

from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from neuclip.catalogue.fields import Section
from neuclip.errors import UserError

AUTO = "auto"
"""As `best_metric`: the main metric of the first validation data."""
Precision = Literal["auto", "fp32", "amp_bf16", "amp_fp16", "bf16"]


class ModelConfig(Section):
    """The towers."""

    name: str = Field(
        default="ViT-B-32",
        description="an open_clip model; a JSON file in the form of its model_configs; hf-hub: and "
        "the name of a repository on the hub, or local-dir: and the path of one on disk, also for "
        "its weights; or glyph-tiny, for the demo data, or icon-small and icon-tiny, for icons of "
        "64 pixels",
    )
    precision: Precision = Field(
        default="auto",
        description="auto: amp_bf16 on a GPU that computes in bfloat16, amp_fp16 on an older one, "
        "fp32 elsewhere",
    )
    pretrained: str | None = Field(
        default=None,
        description="start from the weights of this checkpoint, run folder or repository on disk; "
        "or download them: a tag of open_clip's, MODEL:TAG, or hf-hub: and the name of a "
        "repository (OWNER/NAME, or OWNER/NAME@REVISION); these also choose the model if none is "
        "given",
    )
    pretrained_image: bool = Field(
        default=False,
        description="start the image tower from timm's weights of its name, for models with a "
        "tower of timm (downloaded)",
    )
    pretrained_image_path: str | None = Field(
        default=None,
        description="start from the image tower of this checkpoint, of CLIP or of the tower alone",
    )
    pretrained_text_path: str | None = Field(
        default=None,
        description="start from the text tower of this checkpoint, of CLIP or of the tower alone",
    )
    lock_image: bool = Field(default=False, description="do not train the image tower")
    lock_image_unlocked_groups: int = Field(
        default=0, ge=0, description="number of last groups of a locked image tower to train"
    )
    lock_image_freeze_bn_stats: bool = Field(
        default=False, description="freeze the BatchNorm statistics of locked layers too"
    )
    lock_text: bool = Field(default=False, description="do not train the text tower")
    lock_text_unlocked_layers: int = Field(
        default=0, ge=0, description="number of last groups of a locked text tower to train"
    )
    lock_text_freeze_layer_norm: bool = Field(
        default=False, description="do not train the LayerNorms of locked layers either"
    )
    force_patch_dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="fraction of an image's patches dropped in training; none: the model's own",
    )
    force_image_size: int | tuple[int, int] | None = Field(
        default=None,
        description="side of the input image in pixels, or height and width; position embeddings "
        "of loaded weights are resized; none: the model's own",
    )
    force_context_length: int | None = Field(
        default=None,
        ge=3,
        description="tokens of a text; position embeddings of loaded weights are resized; none: "
        "the model's own",
    )
    force_quick_gelu: bool = Field(
        default=False,
        description="compute QuickGELU in open_clip's own towers, for weights that want it",
    )
    image_mean: tuple[float, float, float] | None = Field(
        default=None,
        description="mean of each colour channel; none: that of the weights, else open_clip's",
    )
    image_std: tuple[float, float, float] | None = Field(
        default=None,
        description="standard deviation of each colour channel; none: as for the mean",
    )
    image_interpolation: Literal["bicubic", "bilinear"] | None = Field(
        default=None, description="how images are resized; none: as for the mean"
    )
    image_resize_mode: Literal["shortest", "longest", "squash"] | None = Field(
        default=None,
        description="what becomes the input image in evaluation: a crop (shortest), a padded image "
        "(longest) or the whole image distorted (squash); none: as for the mean",
    )
    grad_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass instead of storing them",
    )
    torchcompile: bool = Field(default=False, description="compile the towers' blocks")
    torchcompile_backend: Literal["inductor", "aot_eager", "eager"] = Field(
        default="inductor", description="backend of --torchcompile"
    )
    model_ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="also keep a moving average of the weights with this decay, and evaluate it; "
        "none: no average",
    )

    @property
    def given_name(self) -> str | None:
        """The name of the model if it was given; none if it is the default."""
        return self.name if "name" in self.model_fields_set else None

    @property
    def short_name(self) -> str:
        """The name of the model without the folders of a path."""
        last = self.name.rstrip("/").rpartition("/")[2].removeprefix("local-dir:")
        return last.removesuffix(".json")

    def check(self) -> None:
        """Checks rules over several fields.

        Raises:
            UserError: a setting would have no effect.
        """
        for owner, given in (
            ("lock_image", self.lock_image_unlocked_groups > 0),
            ("lock_image", self.lock_image_freeze_bn_stats),
            ("lock_text", self.lock_text_unlocked_layers > 0),
            ("lock_text", self.lock_text_freeze_layer_norm),
        ):
            if given and not getattr(self, owner):
                tower = owner.replace("_", "-")
                raise UserError(
                    f"unlocking or freezing parts of a tower needs the lock: add --{tower}, or "
                    f"leave the --{tower}-... flags out"
                )
        other = "pretrained" if self.pretrained else "pretrained_image_path"
        if self.pretrained_image and getattr(self, other):
            raise UserError(
                f"--pretrained-image and --{other.replace('_', '-')} both give weights to the "
                "image tower: leave one out"
            )
        sides = self.force_image_size
        if sides is not None and min(sides if isinstance(sides, tuple) else (sides,)) < 1:
            raise UserError(f"--force-image-size {sides} is not a size in pixels, such as 224")
        if self.image_std is not None and min(self.image_std) <= 0:
            raise UserError(f"--image-std {self.image_std}: standard deviations are above 0")

    def tiny(self) -> "ModelConfig":
        """The same settings for a tiny model, without those that only fit the original model."""
        update: dict[str, Any] = {
            "name": "glyph-tiny",
            "pretrained": None,
            "pretrained_image": False,
            "pretrained_image_path": None,
            "pretrained_text_path": None,
            "lock_image_unlocked_groups": 0,
            "force_patch_dropout": None,
            "force_image_size": None,
            "force_context_length": None,
            "force_quick_gelu": False,
        }
        return self.model_copy(update=update)


class ParallelConfig(Section):
    """How ranks share the towers, and how long they wait for each other."""

    fsdp: bool = Field(
        default=False,
        description="shard parameters, gradients and optimiser over the ranks (FSDP2), and write "
        "sharded checkpoints; otherwise every rank holds all of them (DDP)",
    )
    dist_timeout: float = Field(
        default=600.0,
        gt=0,
        description="seconds that ranks wait for one that is alive but late: when a run starts, "
        "and inside a step",
    )
    dist_silence: float = Field(
        default=30.0,
        ge=5,
        description="seconds without a heartbeat after which a rank counts as dead and the others "
        "stop",
    )

    def check(self, precision: Precision) -> None:
        """Checks that the precision can be sharded.

        Raises:
            UserError: the parameters have several types, which FSDP cannot shard together.
        """
        if self.fsdp and precision == "bf16":
            raise UserError(
                "--fsdp with --precision bf16: its parameters have two types and cannot be sharded "
                "together; --precision amp_bf16 computes with bfloat16 parameters and keeps "
                "float32 ones"
            )


class EvaluationConfig(Section):
    """Evaluation during training."""

    val_data: str | None = Field(
        default=None,
        description="evaluation splits, joined by '::': data as for train_data, a set of "
        "clip-benchmark or DataComp, or a folder per class",
    )
    val_split: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the training data that is held out and evaluated as the split val; "
        "samples of equal captions, images or labels stay on one side; none: nothing is held out",
    )
    val_frequency: int = Field(
        default=1,
        ge=0,
        description="epochs between evaluations of val_data, val_split and canary; 0: never",
    )
    val_templates: str | None = Field(
        default=None,
        description="prompts for the class names of val_data and canary: a text file with one a "
        "line, or the prompts joined by '::', as in 'a photo of a {c}.'; none: the data's own",
    )
    canary: str | None = Field(
        default=None,
        description="data as for val_data that show what fine-tuning forgets: evaluated with the "
        "starting weights, and whenever val_data is",
    )
    best_metric: str | None = Field(
        default=None,
        description="keep the checkpoint that is best by this metric as epoch_best.pt: "
        "SPLIT/METRIC, as in val/mean_recall@1; auto: the main metric of the first validation "
        "data, which is acc1 if they have class names, and else mean_recall@1",
    )
    early_stop: int | None = Field(
        default=None,
        ge=1,
        description="end the run after this many evaluations of best_metric in a row that do not "
        "improve it",
    )
    val_batch_size: int = Field(
        default=256, ge=1, description="pairs per forward pass in evaluation"
    )
    zeroshot_frequency: int = Field(
        default=2,
        ge=0,
        description="epochs between evaluations of imagenet_val, imagenet_v2 and eval_tasks, which "
        "also run at the end; 0: never",
    )
    imagenet_val: str | None = Field(
        default=None, description="ImageNet's validation images: a folder with one folder per class"
    )
    imagenet_v2: str | None = Field(
        default=None, description="ImageNet v2's images: a folder with one folder per class"
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
        description="maximum number of samples, evenly spread, of each of imagenet_val, "
        "imagenet_v2 "
        "and eval_tasks; none: all",
    )

    def check(self, *, derives: bool = False) -> None:
        """Checks rules over several fields.

        Args:
            derives: a metric that is not given may still be derived.

        Raises:
            UserError: a setting would have no effect.
        """
        if self.early_stop is not None and self.best_metric is None and not derives:
            raise UserError(
                f"--early-stop {self.early_stop} needs a metric to follow: add --best-metric, as "
                "in val/mean_recall@1"
            )
        for flag, value in (("--canary", self.canary), ("--val-split", self.val_split)):
            if value is not None and not self.val_frequency:
                raise UserError(f"{flag} with --val-frequency 0 is never evaluated: leave one out")
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
    def given(self) -> bool:
        """Whether anything is evaluated."""
        return self.val_data is not None or self.zero_shot

    @property
    def zero_shot(self) -> bool:
        """Whether anything besides `val_data` is evaluated."""
        return any(x is not None for x in (self.imagenet_val, self.imagenet_v2, self.eval_tasks))

    @property
    def follows_something(self) -> bool:
        """Whether data with a metric for `best_metric` are evaluated, besides a held-out share."""
        own = self.val_data is not None and self.val_frequency > 0
        return own or (self.zero_shot and self.zeroshot_frequency > 0)


TRACKERS = ("tensorboard", "wandb")


class OutputConfig(Section):
    """Files of a run, and how often they are written."""

    logs: str = Field(
        default="./logs",
        description="folder of the run folders",
        # torchrun takes --logs, even after the script's name, for its own --logs-specs.
        json_schema_extra={"flag": "--logs-dir"},
    )
    save_frequency: int = Field(
        default=1,
        ge=0,
        description="epochs between checkpoints that stay; 0: only the latest stays",
    )
    save_every_steps: int = Field(
        default=0, ge=0, description="steps between further checkpoints; 0: none"
    )
    keep_step_checkpoints: int = Field(
        default=2, ge=1, description="number of step checkpoints to keep"
    )
    log_every_n_steps: int = Field(default=50, ge=1, description="steps between two records")
    report_to: str = Field(
        default="none",
        description="also log to tensorboard, wandb (Weights & Biases), or both, joined by ','; "
        "all: both; none",
    )
    wandb_project_name: str | None = Field(
        default=None,
        description="project in Weights & Biases; none: $WANDB_PROJECT, or neuclip",
    )
    wandb_notes: str | None = Field(default=None, description="notes in Weights & Biases")
    profile: bool = Field(default=False, description="save a torch profiler trace of ten steps")

    @field_validator("report_to")
    @classmethod
    def _known_trackers(cls, value: str) -> str:
        """`none`, one tracker, or `all`; open_clip's empty text is none."""
        names = {name.strip() for name in value.split(",")} - {""}
        if not names <= {*TRACKERS, "all", "none"} or ("none" in names and len(names) > 1):
            raise PydanticCustomError(
                "report_to", "must be tensorboard, wandb, both joined by ',', all, or none"
            )
        if "all" in names or names == set(TRACKERS):
            return "all"
        return names.pop() if names else "none"

    @property
    def trackers(self) -> tuple[str, ...]:
        """Where records go besides the run folder; names are those of packages."""
        return tuple(name for name in TRACKERS if self.report_to in (name, "all"))
