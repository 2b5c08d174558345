"""Published weights by name: open_clip's tags, and repositories on the Hugging Face hub.

To name one is to ask for its download. Everything else in this package reads what is on disk.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from neuclip.data.remote import hub
from neuclip.errors import UserError, printable
from neuclip.model.architecture import (
    CONFIGS,
    HUB,
    PREPROCESSING,
    REPOSITORY_WEIGHTS,
    Architecture,
    find_architecture,
    repository_folder,
)
from neuclip.parallel.work_sharing import once_per_machine

_TOKENIZER = (
    ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt"),
    ("tokenizer_config.json",),
    ("special_tokens_map.json",),
)
"""The files of a tokenizer: of each line, the first that a repository has."""
_SHOWN = 3


@dataclass(frozen=True)
class Tag:
    """Weights of one of open_clip's models.

    Attributes:
        name: the tag.
        model: the name of the model.
    """

    name: str
    model: str

    @property
    def label(self) -> str:
        """A name for files of results."""
        return f"{self.model}--{self.name}"

    @property
    def path(self) -> Path:
        """The file of weights in the cache; fetched before."""
        found = self.cached
        assert found is not None, "fetched before"
        return found

    @property
    def cached(self) -> Path | None:
        """The file of weights in the cache; None if it is not there."""
        return hub.in_cache(*self._place)

    @property
    def architecture(self) -> Architecture:
        """The model, with the preprocessing that the weights want."""
        return find_architecture(self.model).preprocessed(self._config)

    @property
    def quick_gelu(self) -> bool:
        """Whether the weights were trained with QuickGELU."""
        return bool(self._config.get("quick_gelu"))

    @property
    def _config(self) -> Mapping[str, Any]:
        return open_clip.get_pretrained_cfg(self.model, self.name)

    @property
    def _place(self) -> tuple[str, tuple[str, ...]]:
        """The repository, and its files in open_clip's order of preference."""
        repository, _, file = str(self._config["hf_hub"]).rpartition("/")
        if not file:
            return repository, (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
        stem, _, ending = file.rpartition(".")
        safe = (f"{stem}.safetensors",) if ending in ("bin", "pth") else ()
        return repository, (*safe, file)

    def fetch(self) -> None:
        """Downloads what the cache lacks.

        Raises:
            UserError: the hub does not have it, or cannot be asked.
        """
        repository, files = self._place
        if hub.Repository(repository).fetch(files) is None:
            raise UserError(
                f"--pretrained {self.name}: {repository} on the hub has no {' or '.join(files)}"
            )


@dataclass(frozen=True)
class HubRepository:
    """A repository of open_clip's, or of transformers, on the hub.

    Attributes:
        name: `hf-hub:` and `owner/name`, or `owner/name@revision`.
    """

    name: str

    @property
    def label(self) -> str:
        """A name for files of results."""
        return self._repository.replace("/", "--")

    @property
    def path(self) -> Path:
        """The folder in the cache; fetched before."""
        found = self.cached
        assert found is not None, "fetched before"
        return found

    @property
    def cached(self) -> Path | None:
        """The folder in the cache; None if it is not there."""
        return repository_folder(self.name)

    @property
    def architecture(self) -> Architecture:
        """What the towers are built from, and the preprocessing that the weights want."""
        return find_architecture(self.name)

    @property
    def quick_gelu(self) -> bool:
        """Whether the weights were trained with QuickGELU."""
        return self.architecture.quick_gelu

    @property
    def _repository(self) -> str:
        return self.name.removeprefix(HUB)

    def fetch(self) -> None:
        """Downloads what the cache lacks.

        Raises:
            UserError: the hub does not have it, or cannot be asked.
        """
        repository = hub.Repository(self._repository)
        if repository.fetch(CONFIGS) is None:
            raise UserError(
                f"{printable(self.name)} has neither {' nor '.join(CONFIGS)}: it is not a "
                "repository of open_clip's or transformers' models"
            )
        repository.fetch(("preprocessor_config.json",), optional=True)
        if self.architecture.config["text_cfg"].get("hf_tokenizer_name"):
            for files in _TOKENIZER:
                repository.fetch(files, optional=True)
        repository.fetch(REPOSITORY_WEIGHTS)


Published = Tag | HubRepository
"""Weights with a name."""


def find_published(name: str, model: str | None) -> Published | None:
    """The weights that a name stands for; None for a path on disk, and for unknown names.

    Args:
        name: `hf-hub:OWNER/NAME`, a tag, or `MODEL:TAG`. A file or folder of that name is meant
            first.
        model: the model that the weights are for, if it is known; the only one that has the tag is.

    Raises:
        UserError: a tag of several models without a model, or of another model; names those that
            have it.
    """
    if Path(name).exists():
        return None
    if name.startswith(HUB):
        return HubRepository(name)
    own, colon, tag = name.rpartition(":")
    if colon and (own := own.replace("/", "-")) in open_clip.list_models():
        if model is not None and model.replace("/", "-") != own:
            raise UserError(
                f"{printable(name)} names the model {own}, and --model names {printable(model)}: "
                "leave one out"
            )
        name, model = tag, own
        if not open_clip.list_pretrained_models_by_tag(tag):
            raise UserError(_no_such_tag(tag, own))
    having = open_clip.list_pretrained_models_by_tag(name)
    if not having:
        return None
    known = (model or "").replace("/", "-")
    if known in having:
        return Tag(name, known)
    more = f" and {len(having) - _SHOWN} more" if len(having) > _SHOWN else ""
    exists = f"{name} exists for {_closest(known, having)}{more}"
    if model is None and len(having) == 1:
        return Tag(name, having[0])
    if model is None:
        raise UserError(
            f"{name} is a tag of {len(having)} models of open_clip's: {', '.join(having)}: say "
            f"which, with --model (--arch in other commands than train), or as {having[0]}:{name}"
        )
    raise UserError(f"{_no_such_tag(name, model)}. {exists}")


def _no_such_tag(tag: str, model: str) -> str:
    other = open_clip.list_pretrained_tags_by_model(model.replace("/", "-"))
    has = f"but {_closest(tag, other)}" if other else "or of any other name"
    return f"{printable(model)} has no published weights {printable(tag)}, {has}"


def model_of_weights(name: str) -> str | None:
    """The model that published weights choose; None for a path on disk, and for unknown names.

    Args:
        name: as in `find_published`.

    Raises:
        UserError: several models have the tag; names them.
    """
    found = find_published(name, None)
    return found.model if isinstance(found, Tag) else None if found is None else found.name


def fetch_published(name: str, model: str | None) -> Published | None:
    """`find_published`, and what it needs is downloaded once on every machine.

    Called by all ranks. Raises errors of `find_published` and `Published.fetch`.
    """
    found = find_published(name, model)
    if found is not None:
        once_per_machine(found.fetch)
    return found


def fetch_image_tower(architecture: Architecture) -> None:
    """Downloads timm's weights of the image tower once on every machine, for `--pretrained-image`.

    Raises:
        UserError: the tower is not one of timm's, timm has no weights for it, or the hub cannot be
            asked.
    """
    tower = architecture.config["vision_cfg"].get("timm_model_name")
    if not tower:
        raise UserError(
            f"--pretrained-image: the image tower of {architecture.short_name} is not one of "
            "timm's, and has no published weights of its own; give --pretrained TAG, or a file "
            "with --pretrained-image-path"
        )
    found = timm.get_pretrained_cfg(tower)
    place, own = (None, None) if found is None else (found.hf_hub_id, found.hf_hub_filename)
    if not place:
        raise UserError(f"--pretrained-image: timm has no weights of {tower} on the hub")
    files = (own,) if own else ("model.safetensors", "pytorch_model.bin")

    def fetch() -> None:
        if hub.Repository(place).fetch(files) is None:
            raise UserError(f"--pretrained-image: {place} on the hub has no {' or '.join(files)}")

    once_per_machine(fetch)


def _closest(word: str, known: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(word, known, n=_SHOWN, cutoff=0))


def doubt_of_preprocessing(architecture: Architecture) -> str | None:
    """A warning if nothing says how images are made, and the published weights want them otherwise.

    Args:
        architecture: with the preprocessing that is recorded beside the weights or asked for.
    """
    if architecture.preprocessing:
        return None
    published = published_preprocessing(architecture.name)
    made = architecture.all_preprocessing
    if published is None or all(made[key] == value for key, value in published.items()):
        return None
    flags = [
        f"--image-{key.replace('_', '-')} {_typed(published[key])}"
        for key in ("mean", "std", "interpolation", "resize_mode")
        if made[key] != published[key]
    ]
    return (
        f"{architecture.name}: images are made with open_clip's defaults, since nothing beside the "
        f"weights says otherwise; the published weights of this model want {' '.join(flags)}"
    )


def _typed(value: object) -> str:
    return " ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)


def published_preprocessing(name: str) -> dict[str, Any] | None:
    """The preprocessing of a model's published weights, if all of them have the same."""
    found = list[dict[str, Any]]()
    for tag in open_clip.list_pretrained_tags_by_model(name):
        settings = open_clip.get_pretrained_cfg(name, tag)
        merged = merge_preprocess_dict(PreprocessCfg(), settings)
        found.append({key: merged[key] for key in PREPROCESSING})
    return found[0] if found and all(other == found[0] for other in found) else None
