"""The sections of a run's settings besides the method's. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from neuclip.catalogue.fields import Section, setting
from neuclip.config.caption_keys import CaptionKeys
from neuclip.errors import UserError, quantity
from neuclip.method.choices import AdamRates

Precision = Literal["auto", "fp32", "amp_bf16", "amp_fp16", "bf16"]


class ModelConfig(Section):
    """The towers."""

    name: str = Field(
        default="ViT-B-32",
        description="an open_clip model; a JSON file in the form of its model_configs; hf-hub: and "
        "the name of a repository on the hub, or local-dir: and the path of one on disk, also for "
        "its weights; or glyph-tiny, for the demo data",
    )
    precision: Precision = Field(
        default="auto",
        description="auto: amp_bf16 on a GPU that computes in bfloat16, amp_fp16 on an older one, "
        "fp32 elsewhere",
    )
    pretrained: str | None = Field(
        default=None,
        description="start from the weights of this checkpoint, run folder or repository on disk; "
        "or download them: a tag of open_clip's for the model, or hf-hub: and the name of a "
        "repository",
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


DataFormat = Literal["auto", "webdataset", "csv", "jsonl", "parquet", "folder", "huggingface"]
MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's own limit: as RGBA, such an image takes about 0.7 GB."""


class ReadingConfig(Section):
    """How data are opened and read."""

    data_format: DataFormat = Field(
        default="auto", description="format of the data; auto: detected from path and content"
    )
    train_data_upsampling_factors: str | None = Field(
        default=None,
        description="visits per sample and round for each source, as in 1::2.5; none: every sample "
        "once",
    )
    shuffle_window: int | None = Field(
        default=None,
        ge=0,
        description="number of shards to shuffle together; 0: all; none: all of local data, 16 of "
        "remote data",
    )
    data_size: int | None = Field(
        default=None,
        ge=1,
        description="upper bound of the samples' integer keys, which then serve as sample ids; "
        "none: ids are positions in the data",
    )
    caption_key: str | None = setting(
        None,
        "take captions from this key of the .json file instead of the .txt file; of several keys "
        "joined by ; the first with a caption",
        flag="--json-text-key",
    )
    caption_key_probs: tuple[float, ...] | None = setting(
        None,
        "draw the caption by these probabilities of the keys in caption_key, in their order: a key "
        "without a caption leaves its share to the others, one of probability 0 is read only if "
        "they all lack one; none: the first key with a caption",
        flag="--json-text-key-probs",
    )
    caption_keys: str | None = Field(
        default=None,
        description="columns of a table, or keys of the .json files, of which each visit draws one "
        "by its weight, as in long=0.7,short=0.3 (without weights all are as likely); a key "
        "without a caption leaves its share to the others",
    )
    hard_negative_key: str | None = Field(
        default=None,
        description="column of a table, or key of the .json files, with hard negatives: captions "
        "that nearly fit the image; of a list, each visit draws one",
    )
    pair_weight_key: str | None = Field(
        default=None,
        description="column of a table, or key of the .json files, with the weight of each pair in "
        "the loss: a number, 0 or more",
    )
    label_key: str | None = Field(
        default=None,
        description="column of a table, or key of the .json files (cls: the .cls files of tar "
        "shards), with labels: two pairs of one label are false negatives of each other",
    )
    image_key: str | None = Field(
        default=None,
        description="endings of the images in local tar shards, as in 'img;jpg'; none: all that "
        "are known",
    )
    text_key: str | None = Field(
        default=None,
        description="endings of the captions in local tar shards; none: txt, text and caption",
    )
    csv_separator: str | None = Field(
        default=None,
        description="column separator of a table, a character or tab; none: the first of tab, "
        "comma, semicolon and | that gives known columns",
    )
    csv_img_key: str | None = Field(
        default=None,
        description="image column of a table; none: the first of filepath, image, ... that exists",
    )
    csv_caption_key: str | None = Field(
        default=None,
        description="caption column of a table, or several joined by commas, each with a caption; "
        "none: the first of title, caption, ... that exists",
    )
    cache_dir: str | None = Field(
        default=None,
        description="folder for downloaded shards; none: neuclip/shards in $XDG_CACHE_HOME or "
        "~/.cache",
    )
    cache_size_gb: float = Field(
        default=50.0, gt=0, description="maximum size of the downloaded shards in GiB"
    )
    allow_pipe: bool = Field(default=False, description="run the shell commands of 'pipe:' sources")

    @property
    def caption_keys_read(self) -> CaptionKeys | None:
        """The keys that hold captions, if they are named; of tables, `--caption-keys` only.

        Raises:
            UserError: the flags contradict each other, or their values are wrong.
        """
        if self.caption_keys is None:
            if self.caption_key_probs is not None and not self.caption_key:
                raise UserError(
                    "--caption-key-probs needs --caption-key: its keys, joined by ; (for the "
                    "columns of a table: --caption-keys long=0.7,short=0.3)"
                )
            if not self.caption_key:
                return None
            return CaptionKeys.prioritised(self.caption_key, self.caption_key_probs)
        for flag, value in (
            ("--caption-key", self.caption_key),
            ("--caption-key-probs", self.caption_key_probs),
            ("--csv-caption-key", self.csv_caption_key),
        ):
            if value is not None:
                raise UserError(f"--caption-keys and {flag} both name captions: leave one out")
        return CaptionKeys.weighted(self.caption_keys)

    @field_validator("csv_separator")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        r"""The separator; `tab` and `\t`, as typed in a shell, are a tab."""
        value = {r"\t": "\t", "tab": "\t"}.get(value or "", value)
        if value is None or (len(value) == 1 and value.isascii() and value not in '"\r\n'):
            return value
        raise PydanticCustomError(
            "separator", "must be one character other than a quote, such as , or ; or the word tab"
        )


Range = tuple[float, float]
Jitter = tuple[float, float, float, float]


class AugmentationConfig(Section):
    """Random changes of training images, by the names of open_clip's AugmentationCfg."""

    scale: Range = Field(
        default=(0.9, 1.0), description="area of the random crop, as a fraction of the image"
    )
    color_jitter: Jitter | float | None = Field(
        default=None,
        description="largest change of brightness, contrast, saturation and hue; one number only "
        "with use_timm",
    )
    color_jitter_prob: float | None = Field(
        default=None, ge=0, le=1, description="probability of color_jitter"
    )
    gray_scale_prob: float | None = Field(
        default=None, ge=0, le=1, description="probability of grey"
    )
    use_timm: bool = Field(default=False, description="use timm's transforms")
    ratio: Range | None = Field(
        default=None, description="width over height of the random crop, with use_timm"
    )
    re_prob: float | None = Field(
        default=None, ge=0, le=1, description="probability of random erasing, with use_timm"
    )
    re_count: int | None = Field(
        default=None, ge=1, description="number of erased rectangles, with use_timm"
    )

    def given(self) -> dict[str, Any]:
        """The values without those that are none, as open_clip takes them."""
        return self.model_dump(exclude_none=True)

    def check(self) -> None:
        """Checks rules over several fields.

        Raises:
            UserError: a range is not one, or a value would have no effect.
        """
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UserError(f"aug_cfg scale {self.scale} must be a range within (0, 1]")
        timm_only = [key for key in ("ratio", "re_prob", "re_count") if getattr(self, key)]
        if timm_only and not self.use_timm:
            raise UserError(f"aug_cfg {', '.join(timm_only)}: only use_timm=True reads them")
        plain_only = [key for key in ("color_jitter_prob", "gray_scale_prob") if getattr(self, key)]
        if plain_only and self.use_timm:
            raise UserError(f"aug_cfg {', '.join(plain_only)}: use_timm=True does not read them")
        four = isinstance(self.color_jitter, tuple)
        if not self.use_timm and four != bool(self.color_jitter_prob):
            raise UserError(
                "aug_cfg color_jitter takes four numbers and goes together with color_jitter_prob, "
                "as in color_jitter='(0.32, 0.32, 0.32, 0.08)' color_jitter_prob=0.8"
            )


class DataConfig(ReadingConfig):
    """Training data, batches and corrupt samples."""

    train_data: str | None = Field(
        default=None,
        description="training data: tar shards (a folder, a brace pattern, an address), a table, "
        "or a folder of images; synthetic:N: N random pairs; :: joins several",
    )
    caption_choice: Literal["random", "first"] = Field(
        default="random",
        description="of a sample with several captions, draw one for each visit or take the first",
    )
    false_negatives: Literal["keep", "mask"] = Field(
        default="keep",
        description="pairs of equal captions, equal image files or equal labels: keep them as "
        "negatives of each other, or mask them in the loss",
    )
    no_duplicates: bool = Field(
        default=False,
        description="order the data so that no batch holds two pairs of equal captions, equal "
        "image files or equal labels; the data are read once before the run to find them",
    )
    train_num_samples: int | None = Field(
        default=None, ge=1, description="samples per epoch; none: all samples of the data once"
    )
    max_image_pixels: int = Field(
        default=MAX_IMAGE_PIXELS,
        ge=0,
        description="an image with more pixels counts as corrupt and is not decoded; 0: no limit",
    )
    aug_cfg: AugmentationConfig | None = Field(
        default=None,
        description="random changes of training images, by the names of open_clip's "
        "AugmentationCfg, as in scale='(0.4, 1.0)' gray_scale_prob=0.2; none: crops of 90 to 100 % "
        "of the area",
    )
    full_decode: bool = Field(
        default=False,
        description="decode every JPEG at full scale, even if the model needs less than half",
    )
    batch_size: int = Field(
        default=64, ge=2, description="pairs per rank and micro-batch (a step has accum_freq)"
    )
    accum_freq: int = Field(
        default=1,
        ge=1,
        description="micro-batches per step: the loss sees batch_size x accum_freq x ranks pairs, "
        "the memory holds batch_size",
    )
    global_batch_size: int | None = Field(
        default=None,
        ge=2,
        description="pairs per step over all ranks; each takes an equal share, at most batch_size "
        "at a time; none: batch_size x accum_freq x ranks",
    )
    workers: int = Field(default=2, ge=0, description="data loading processes per rank")
    data_timeout: float = Field(
        default=1800.0,
        gt=0,
        description="seconds without a batch from the data loading processes after which the run "
        "stops; the wait is reported every 30",
    )
    max_bad_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="stop if more than this fraction of the samples read is corrupt",
    )

    def check(self) -> None:
        """Checks rules over several fields.

        Raises:
            UserError: a setting would have no effect.
        """
        if self.aug_cfg is not None:
            self.aug_cfg.check()
        if self.label_key is not None and self.false_negatives == "keep" and not self.no_duplicates:
            raise UserError(
                "--label-key has no effect without --false-negatives mask or --no-duplicates: add "
                "one, or leave it out"
            )
        keys = self.caption_keys_read
        if keys is not None and keys.weights and self.caption_choice == "first":
            raise UserError(
                "the weights of caption keys are for drawing, and --caption-choice first draws "
                "nothing: leave one out"
            )


LayerDecay = Annotated[float, Field(gt=0, le=1)]


class OptimConfig(Section):
    """The optimiser and its schedules."""

    epochs: int = Field(default=32, ge=0, description="length of the schedule")
    stop_epochs: int | None = Field(
        default=None,
        ge=1,
        description="stop after this many epochs, on the schedule of all of them",
    )
    opt: str = setting(
        "adamw",
        "optimiser, one of timm's factory by name, such as sgd, lion, lamb, muon, adafactor",
        flag="--optimizer",
    )
    opt_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="further arguments of the optimiser, as in nesterov=True ns_steps=6; none: its "
        "own defaults",
    )
    lr: float = Field(default=5e-4, gt=0, description="peak learning rate")
    lr_min: float = Field(
        default=0.0, ge=0, description="learning rate at the end of the cosine schedule"
    )
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = Field(
        default="cosine", description="schedule after warm-up"
    )
    epochs_cooldown: int | None = Field(
        default=None,
        ge=1,
        description="length of the cooldown of const-cooldown: the last epochs of the schedule",
    )
    lr_cooldown_end: float = Field(
        default=0.0, ge=0, description="learning rate at the end of the cooldown"
    )
    lr_cooldown_power: float = Field(
        default=1.0, gt=0, description="power of the cooldown's decay; 1: linear"
    )
    warmup: int = Field(default=10000, ge=0, description="steps of linear warm-up")
    warm_start_steps: int = Field(
        default=0,
        ge=0,
        description="batches before the first step in which the towers stay as they are, while the "
        "optimiser's moments and the state of the method settle on them",
    )
    wd: float = Field(
        default=0.2, ge=0, description="weight decay (not on gains, biases and logit_scale)"
    )
    beta1: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="first decay rate; none: 0.9 of AdamW, the default of another optimiser",
    )
    beta2: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="second decay rate; none: of AdamW 0.98 for ViT and 0.999 otherwise, the "
        "default of another optimiser",
    )
    eps: float | None = Field(
        default=None,
        gt=0,
        description="the optimiser's epsilon; none: of AdamW 1e-6 for ViT and 1e-8 otherwise, the "
        "default of another optimiser",
    )
    momentum: float | None = Field(
        default=None, ge=0, lt=1, description="momentum of SGD, Muon and others; none: 0.9"
    )
    image_layer_decay: LayerDecay | None = setting(
        None,
        "factor on the learning rate of the image tower for each layer below its projection; "
        "none: 1",
        flag="--visual-layer-decay",
    )
    text_layer_decay: LayerDecay | None = Field(
        default=None, description="the same factor for the text tower; none: 1"
    )
    grad_clip_norm: float | None = Field(
        default=None, gt=0, description="largest norm of the gradient"
    )
    lr_tau: float | None = Field(
        default=None, gt=0, description="learning rate of the temperature; none: the towers'"
    )
    max_nonfinite_steps: int = Field(
        default=0,
        ge=0,
        description="number of steps with a non-finite loss or gradient to skip before stopping",
    )
    lr_tau_scheduler: Literal["const", "step_thresh", "same", "cosine"] = Field(
        default="same",
        description="schedule of lr_tau: const, step_thresh (a third of lr_tau while the "
        "temperature is at most 0.03), same (the towers' schedule, scaled), or cosine (warm-up, "
        "then a cosine from lr_tau to lr_min, whatever lr_scheduler is)",
    )

    @field_validator("opt")
    @classmethod
    def _without_prefix(cls, value: str) -> str:
        """The name in timm's factory; open_clip puts `timm/` before it."""
        return value.lower().removeprefix("timm/")

    @property
    def adam(self) -> AdamRates:
        """Adam's rates for a loss that steps temperatures of its own: AdamW's, else torch's."""
        if self.opt != "adamw" or self.beta1 is None or self.beta2 is None or self.eps is None:
            return AdamRates()
        return AdamRates(self.beta1, self.beta2, self.eps)

    def check(self) -> None:
        """Checks rules over several fields.

        Raises:
            UserError: names the settings that contradict each other, or would have no effect.
        """
        if self.lr_min > self.lr:
            raise UserError(
                f"lr_min {self.lr_min:g} is above lr {self.lr:g}; it must be at most lr"
            )
        if self.lr_tau is None and self.lr_tau_scheduler in {"step_thresh", "cosine"}:
            raise UserError(
                f"lr_tau_scheduler {self.lr_tau_scheduler} needs lr_tau (for example --lr_tau 1e-4)"
            )
        if self.stop_epochs is not None and self.stop_epochs > self.epochs:
            raise UserError(
                f"stop_epochs {self.stop_epochs} is beyond the schedule of "
                f"{quantity(self.epochs, 'epoch')}; it must be at most epochs"
            )
        self._check_cooldown()

    def _check_cooldown(self) -> None:
        """Checks the settings of `const-cooldown`, the only schedule that reads them."""
        length = self.epochs_cooldown
        if self.lr_scheduler != "const-cooldown":
            for name, given in (
                ("epochs_cooldown", length is not None),
                ("lr_cooldown_end", self.lr_cooldown_end > 0),
                ("lr_cooldown_power", self.lr_cooldown_power != 1),
            ):
                if given:
                    raise UserError(f"{name} has no effect without lr_scheduler const-cooldown")
            return
        if length is None:
            raise UserError(
                "lr_scheduler const-cooldown needs epochs_cooldown, the length of the cooldown "
                "(for example --epochs-cooldown 2)"
            )
        if length > max(self.epochs, 1):
            raise UserError(
                f"epochs_cooldown {length} is longer than the schedule of "
                f"{quantity(self.epochs, 'epoch')}; it must be at most epochs"
            )
        if self.lr_cooldown_end > self.lr:
            raise UserError(
                f"lr_cooldown_end {self.lr_cooldown_end:g} is above lr {self.lr:g}; it must be at "
                "most lr"
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
        "samples of equal captions, images or labels stay on one side",
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
        "SPLIT/METRIC, as in val/mean_recall@1",
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

    def check(self) -> None:
        """Checks rules over several fields.

        Raises:
            UserError: a setting would have no effect.
        """
        if self.early_stop is not None and self.best_metric is None:
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
    report_to: Literal["none", "tensorboard", "wandb", "all"] = Field(
        default="none", description="also log to TensorBoard or Weights & Biases"
    )
    wandb_project_name: str | None = Field(
        default=None,
        description="project in Weights & Biases; none: $WANDB_PROJECT, or neuclip",
    )
    wandb_notes: str | None = Field(default=None, description="notes in Weights & Biases")
    profile: bool = Field(default=False, description="save a torch profiler trace of ten steps")
