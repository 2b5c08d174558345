"""The sections of a run's settings on its data. Imports no torch."""

from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from neuclip.catalogue.fields import Section, setting
from neuclip.config.caption_keys import CaptionKeys
from neuclip.errors import UserError

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
        "shards), with labels: in training, two pairs of one label are false negatives of each "
        "other; in evaluation, the labels are class names for zero-shot classification",
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

    @property
    def labels_join(self) -> bool:
        """Whether training takes two pairs of one label for false negatives of each other."""
        return self.label_key is not None

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

    @property
    def labels_join(self) -> bool:
        """Whether training takes two pairs of one label for false negatives of each other."""
        return self.label_key is not None and (self.no_duplicates or self.false_negatives == "mask")

    def check(self) -> None:
        """Checks rules over several fields.

        Raises:
            UserError: a setting would have no effect.
        """
        if self.aug_cfg is not None:
            self.aug_cfg.check()
        keys = self.caption_keys_read
        if keys is not None and keys.weights and self.caption_choice == "first":
            raise UserError(
                "the weights of caption keys are for drawing, and --caption-choice first draws "
                "nothing: leave one out"
            )
