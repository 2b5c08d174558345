"""Initial weights from files: of the full model, or of one tower."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from neuclip.checkpoint import storage
from neuclip.config.adaptation_section import AdaptationConfig
from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model.architecture import HUB, LOCAL, Architecture, find_architecture
from neuclip.model.base_weights import LowRankRecord
from neuclip.model.checkpoint_choice import CheckpointChoice, weights_in_repository
from neuclip.model.clip import Clip
from neuclip.model.foreign_weights import fit
from neuclip.model.mismatch import check_size
from neuclip.model.opened_checkpoint import Checkpoint, open_checkpoint
from neuclip.model.published import (
    doubt_of_preprocessing,
    fetch_image_tower,
    fetch_published,
    model_of_weights,
)

log = logging.getLogger("neuclip")

Tower = Literal["image", "text"]


@dataclass(frozen=True)
class StartingWeights:
    """The files of weights that a run starts from, read but not loaded.

    Attributes:
        settings: of the towers.
        model: weights of the full model.
        image: weights of the image tower, which override the model's.
        text: weights of the text tower, which override the model's.
        resumed: of a run that goes on, the architecture that its checkpoint records; the weights
            of the checkpoint replace the given ones, which are read only if something else needs
            them.
    """

    settings: ModelConfig
    model: Checkpoint | None = None
    image: Checkpoint | None = None
    text: Checkpoint | None = None
    resumed: Architecture | None = None

    @property
    def begins_trained(self) -> tuple[bool, bool]:
        """Whether the image and the text tower start from given weights."""
        if self.resumed is not None:
            return _begins_trained(self.settings)
        model = self.model is not None
        image = self.image is not None or self.settings.pretrained_image
        return model or image, model or self.text is not None

    @property
    def sha256(self) -> str:
        """Digest of all given weights."""
        files = (self.model, self.image, self.text)
        return ".".join(file.sha256 for file in files if file is not None)

    def low_rank_record(self, settings: AdaptationConfig) -> LowRankRecord | None:
        """What a checkpoint of LoRA records of these weights; none without LoRA.

        Raises:
            UserError: there are none, so that LoRA would train updates of random weights.
        """
        if settings.lora_rank is None:
            return None
        if self.model is None:
            raise UserError(
                f"--lora-rank {settings.lora_rank} trains small updates of given weights, and "
                "there are none: add --pretrained, or leave out --lora-rank to train all weights"
            )
        given = str(self.settings.pretrained or self.settings.name)
        return LowRankRecord.of(settings, given, self.model.path, self.model.sha256)

    def architecture(self) -> Architecture:
        """The architecture of the run; images are made as the weights of the image tower want them.

        Raises:
            UserError: the model is unknown, or far larger than the weights for it.
        """
        if self.resumed is not None and self.resumed.name == self.settings.name:
            return self.resumed.changed(self.settings)
        found = find_architecture(self.settings.name)
        source = self.image or self.model
        recorded = None if source is None else source.recorded_architecture
        if recorded is not None:
            found = found.preprocessed(recorded.preprocessing)
        found = found.changed(self.settings)
        doubt = None if source is None else doubt_of_preprocessing(found)
        if doubt is not None:
            log.warning(doubt)
        if self.model is not None and found.repository is not None:  # it came with the weights
            own = self.model.recorded_architecture
            check_size(self.model.shown, self.model.weights, found, own)
        return found

    def load(self, clip: Clip, *, kept: Collection[str] = ()) -> None:
        """Loads the weights into the towers; a tower's own file overrides the model's.

        Args:
            clip: the model, with random weights.
            kept: of `logit_scale` and `logit_bias`, those that stay as they are in `clip`: the user
                set them, or the method has temperatures of another kind.

        Raises:
            UserError: the weights are of another architecture.
        """
        if self.model is not None:
            if self.resumed is None:  # else the checkpoint decides
                _say_temperature(clip, self.model, kept)
            _load_model(clip, self.model, kept)
        if self.image is not None:
            _load_tower(clip, "image", self.image)
        if self.text is not None:
            _load_tower(clip, "text", self.text)


def _begins_trained(settings: ModelConfig) -> tuple[bool, bool]:
    """Whether the settings give weights of the image and of the text tower."""
    model = settings.pretrained is not None or settings.name.startswith((HUB, LOCAL))
    image = settings.pretrained_image or settings.pretrained_image_path is not None
    return model or image, model or settings.pretrained_text_path is not None


def with_model_of_weights(settings: ModelConfig) -> ModelConfig:
    """The settings with the model that published weights choose, if none is given.

    Raises:
        UserError: several models have the tag; names them.
    """
    if settings.pretrained is None or settings.given_name is not None:
        return settings
    name = model_of_weights(settings.pretrained)
    return settings if name is None else settings.model_copy(update={"name": name})


def read_starting_weights(settings: ModelConfig) -> StartingWeights:
    """Reads the weights that `--pretrained*` name, or the repository that `--model` names.

    Names of published weights, and of repositories on the hub, are downloaded. Called by all ranks.

    Raises:
        UserError: no such weights.
    """
    if settings.name.startswith(HUB):
        fetch_published(settings.name, None)
    if settings.pretrained_image:
        fetch_image_tower(find_architecture(settings.name))
    model = settings.pretrained
    repository = find_architecture(settings.name).repository
    if model is None and repository is not None:
        if weights_in_repository(repository) is not None:
            model = settings.name if settings.name.startswith(HUB) else str(repository)
        else:
            log.info("%s holds no weights: the towers start at random", settings.name)
    files = (model, settings.pretrained_image_path, settings.pretrained_text_path)
    return StartingWeights(settings, *(_open(file, settings.name) for file in files), resumed=None)


class StartingWeightsReader:
    """Reads the starting weights of a run once, although settings may follow from them first.

    All ranks use it together.
    """

    def __init__(self) -> None:
        self._found: StartingWeights | None = None

    def read(self, settings: ModelConfig) -> StartingWeights:
        """The weights, kept for `take`.

        Raises:
            UserError: no such weights.
        """
        self._found = read_starting_weights(settings)
        return self._found

    def take(self, settings: ModelConfig) -> StartingWeights:
        """The weights that were read, if the settings still name them; they are kept no longer.

        Raises:
            UserError: no such weights.
        """
        found, self._found = self._found, None
        if found is not None and _sources(found.settings) == _sources(settings):
            return replace(found, settings=settings)
        return read_starting_weights(settings)


def _sources(settings: ModelConfig) -> tuple[object, ...]:
    """What decides which weights are read."""
    by_model = settings.pretrained is None or settings.pretrained_image
    return (
        settings.name if by_model else None,
        settings.pretrained,
        settings.pretrained_image,
        settings.pretrained_image_path,
        settings.pretrained_text_path,
    )


def _open(file: str | None, model: str) -> Checkpoint | None:
    if file is None:
        return None
    return open_checkpoint(CheckpointChoice(Path(file), ema=False), model=model)


def _say_temperature(clip: Clip, checkpoint: Checkpoint, kept: Collection[str]) -> None:
    """Logs where the temperature of a run starts, if not at that of its starting weights."""
    weights, live = checkpoint.weights, clip.towers.state_dict()
    scale, bias = "logit_scale", "logit_bias"
    if bias in live and bias not in weights:
        log.info("%s has no %s: temperature and bias start as the method's", checkpoint.shown, bias)
    elif scale in kept and scale in weights:
        now, then = (f"{math.exp(-float(each[scale])):.4g}" for each in (live, weights))
        if now != then:
            log.info("temperature starts at %s; that of the weights is %s", now, then)


def _load_model(clip: Clip, checkpoint: Checkpoint, kept: Collection[str]) -> None:
    weights, live = dict(checkpoint.weights), clip.towers.state_dict()
    scale, bias = "logit_scale", "logit_bias"
    if bias in live and bias not in weights:
        # A sigmoid's temperature and bias belong together: both from the file, or both its own.
        weights |= {scale: live[scale], bias: live[bias]}
    weights |= {name: live[name] for name in kept if name in live}
    if bias not in live:
        weights.pop(bias, None)
    _load(clip, weights, checkpoint)
    log.info("initial weights: %s", checkpoint.shown)


def _load_tower(clip: Clip, tower: Tower, checkpoint: Checkpoint) -> None:
    weights, live = checkpoint.weights, clip.towers.state_dict()
    if any(name.startswith("visual.") for name in weights):  # the file holds a full model
        found = {name: value for name, value in weights.items() if _tower_of(name) == tower}
    else:
        prefixes = ("visual.", "visual.trunk.") if tower == "image" else ("text.", "")
        prefix = max(prefixes, key=lambda each: sum(each + name in live for name in weights))
        found = {f"{prefix}{name}": value for name, value in weights.items()}
    rest = {name: value for name, value in live.items() if _tower_of(name) != tower}
    _load(clip, {**rest, **found}, checkpoint)
    log.info("initial weights of the %s tower: %s", tower, checkpoint.shown)


def _load(clip: Clip, weights: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    fitted = fit(checkpoint.given(weights), clip)
    storage.load_weights(clip.towers, fitted, checkpoint.shown)


def _tower_of(name: str) -> Tower | None:
    """The tower a weight belongs to; none for the temperature and the bias."""
    if name.startswith("logit_"):
        return None
    return "image" if name.startswith("visual.") else "text"
