"""Architectures: what towers are built from, by name, from a JSON file, or as recorded.

An architecture is the content of a repository's `open_clip_config.json`: the configuration of the
towers, and the preprocessing of images. Checkpoints and exports record it whole.
"""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from neuclip.config.sections import ModelConfig
from neuclip.data.remote import hub
from neuclip.errors import UserError, nearest, printable
from neuclip.model import transformers_siglip
from neuclip.model.patches import check_patches, grid
from neuclip.model.transformers_names import architecture_of, preprocessing_of
from neuclip.untrusted import MAX_JSON, read_file, read_json

REPOSITORY_CONFIG = "open_clip_config.json"
_TRANSFORMERS_CONFIG = "config.json"
LOCAL = "local-dir:"
HUB = hub.PREFIX
REPOSITORY_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
"""The files of a repository's weights, in the order of preference."""
CONFIGS = (REPOSITORY_CONFIG, _TRANSFORMERS_CONFIG)
"""The file of a repository's architecture: open_clip's, or transformers'."""

_LISTING = "python -c 'import open_clip; print(*open_clip.list_models())'"

_BLOCKS = 1000
"""Most blocks of a tower; the deepest known models have fewer than 100."""

OWN_CONFIGS = Path(__file__).parent / "model_configs"
open_clip.add_model_config(OWN_CONFIGS)


@dataclass(frozen=True)
class Architecture:
    """What towers are built from.

    Attributes:
        name: as in `find_architecture`.
        config: `embed_dim`, `vision_cfg`, `text_cfg`, ... as in open_clip's configuration files.
        preprocessing: `mean`, `std`, `interpolation` and `resize_mode`, as far as they are known;
            open_clip's defaults stand for the rest.
        resized: the image size, if it is not the one the towers were designed for.
    """

    name: str
    config: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    resized: int | tuple[int, int] | None = None

    @property
    def repository(self) -> Path | None:
        """The folder of the repository that the name is, on disk or in the hub's cache.

        None for other names, and for a repository that the cache does not hold.
        """
        return repository_folder(self.name)

    @property
    def short_name(self) -> str:
        """The name without the folders of a path."""
        return ModelConfig(name=self.name).short_name

    @cached_property
    def known(self) -> bool:
        """Whether open_clip builds exactly these towers by the name."""
        return self.name in open_clip.list_models() and self.config == _configuration(self.name)

    @cached_property
    def takes_known_files(self) -> bool:
        """Whether what it takes from a hub, such as a tokenizer, is what the name stands for."""
        own = _configuration(self.name)
        return own is not None and _from_hub(own) == _from_hub(self.config)

    @property
    def published(self) -> bool:
        """Whether open_clip ships exactly these towers under the name."""
        return self.known and not (OWN_CONFIGS / f"{self.name}.json").is_file()

    @property
    def all_preprocessing(self) -> dict[str, Any]:
        """The preprocessing with open_clip's defaults where nothing else is known."""
        return merge_preprocess_dict(PreprocessCfg(), dict(self.preprocessing))

    def changed(self, settings: ModelConfig, *, recorded: bool = False) -> "Architecture":
        """The architecture with the sizes, the activation and the preprocessing asked for.

        Args:
            settings: of the towers; what is none stays as it is.
            recorded: the settings are a record of an earlier run, so that open_clip built them.

        Raises:
            UserError: the image size is not a multiple of the patch.
        """
        asked = {
            "mean": settings.image_mean,
            "std": settings.image_std,
            "interpolation": settings.image_interpolation,
            "resize_mode": settings.image_resize_mode,
        }
        found = self.preprocessed({k: v for k, v in asked.items() if v is not None})
        size, config = settings.force_image_size, deepcopy(dict(self.config))
        if settings.force_quick_gelu:
            config["quick_gelu"] = True
        if settings.force_context_length is not None:
            config["text_cfg"]["context_length"] = settings.force_context_length
        if size is not None:
            if not recorded:
                check_patches(self.short_name, config["vision_cfg"], size)
            config["vision_cfg"]["image_size"] = size
        return replace(found, config=config, resized=self.resized if size is None else size)

    @property
    def quick_gelu(self) -> bool:
        """Whether open_clip's own towers compute QuickGELU instead of GELU."""
        return bool(self.config.get("quick_gelu"))

    @property
    def patches(self) -> tuple[int, int] | None:
        """Rows and columns of the grid of patches; None for towers without a fixed grid."""
        return grid(self.config["vision_cfg"])

    def preprocessed(self, preprocessing: Mapping[str, Any]) -> "Architecture":
        """The architecture with this preprocessing laid over its own."""
        known = {k: v for k, v in preprocessing.items() if k in PREPROCESSING and v is not None}
        return replace(self, preprocessing={**self.preprocessing, **known})

    def record(self) -> dict[str, Any]:
        """The architecture as plain values, for a checkpoint; see `recorded`."""
        values = {
            "name": self.name,
            "model_cfg": self.config,
            "preprocess_cfg": self.all_preprocessing,
            "resized": self.resized,
        }
        return json.loads(json.dumps(values))


PREPROCESSING = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""What is recorded of the preprocessing of images, beside their size."""


def recorded(record: Mapping[str, Any], path: Path) -> Architecture:
    """The architecture that `Architecture.record` was written of.

    Args:
        record: as a checkpoint holds it.
        path: the checkpoint, for messages.

    Raises:
        UserError: the record is not as `Architecture.record` makes it.
    """
    size, name, preprocessing = (record.get(k) for k in ("resized", "name", "preprocess_cfg"))
    size = tuple(size) if isinstance(size, list) else size
    sides = size if isinstance(size, tuple) else () if size is None else (size, size)
    whole = len(sides) in (0, 2) and all(isinstance(side, int) for side in sides)
    if not (isinstance(name, str) and isinstance(preprocessing, dict) and whole):
        raise UserError(f"checkpoint {path}: its entry neuclip/architecture is malformed")
    place = f"checkpoint {path}: the recorded architecture"
    _check_form(record.get("model_cfg"), place)
    _check_blocks(record["model_cfg"], place)
    _check_preprocessing(preprocessing, place)
    return Architecture(name, record["model_cfg"], {}, size).preprocessed(preprocessing)


def changes_of_flags(flags: Mapping[str, str]) -> ModelConfig:
    """Image size and preprocessing from open_clip's record of a run's flags."""
    numbers = {key: _NUMBER.findall(flags.get(key, "")) for key in _LISTS}
    given: dict[str, Any] = {key: tuple(map(float, found)) for key, found in numbers.items()}
    size = tuple(int(number) for number in numbers["force_image_size"])
    given["force_image_size"] = size[0] if len(size) == 1 else size
    given |= {key: flags.get(key) for key in ("image_interpolation", "image_resize_mode")}
    length = flags.get("force_context_length", "")
    given["force_context_length"] = int(length) if length.isdigit() else None
    given["force_quick_gelu"] = flags.get("force_quick_gelu") == "True"
    return ModelConfig(**{key: value for key, value in given.items() if value})


_LISTS = ("force_image_size", "image_mean", "image_std")
_NUMBER = re.compile(r"[\d.]+")


def find_architecture(name: str) -> Architecture:
    """Finds an architecture.

    Args:
        name: a model of open_clip or of `model_configs`; a JSON file in the form of open_clip's
            configuration files; `local-dir:` and the path of a Hugging Face repository on disk; or
            `hf-hub:` and the name of a repository in the hub's cache (nothing is downloaded here).

    Raises:
        UserError: no such architecture (names the nearest ones), or one that cannot be trained.
    """
    if name.startswith(LOCAL):
        found = _of_repository(name, Path(name.removeprefix(LOCAL)))
    elif name.startswith(HUB):
        folder = repository_folder(name)
        if folder is None:
            raise UserError(f"{printable(name)} is not in the hub's cache on this machine")
        found = _of_repository(name, folder)
    elif name.endswith(".json"):
        found = _of_file(name, Path(name))
    else:
        known = name.replace("/", "-")  # OpenAI's ViT-B/32, as open_clip reads it
        config = _configuration(known)
        if config is None:
            raise UserError(f"unknown model {printable(name)!r}; {_advice(name)}")
        found = Architecture(known, config, {})
    _check_blocks(found.config, f"model {printable(name)}")
    if "multimodal_cfg" in found.config:
        plain = name.removeprefix("coca_")
        raise UserError(
            f"model {printable(name)} is a CoCa model, which also generates captions; neuclip "
            f"trains pairs of towers, such as {plain if plain in model_names() else 'ViT-B-32'}"
        )
    return found


def model_names() -> list[str]:
    """The models that can be built by name."""
    return [name for name in open_clip.list_models() if not _is_coca(name)]


def _configuration(name: str) -> dict[str, Any] | None:
    """The configuration that open_clip or this package has under a name."""
    return open_clip.get_model_config(name) if name in open_clip.list_models() else None


def _is_coca(name: str) -> bool:
    return "multimodal_cfg" in (_configuration(name) or {})


def repository_folder(name: str) -> Path | None:
    """The folder of a repository, on disk (`local-dir:`) or in the hub's cache (`hf-hub:`)."""
    if name.startswith(LOCAL):
        return Path(name.removeprefix(LOCAL))
    if not name.startswith(HUB):
        return None
    config = hub.in_cache(name.removeprefix(HUB), CONFIGS)
    return None if config is None else config.parent


def _from_hub(config: Mapping[str, Any]) -> list[object]:
    """What a configuration takes from a hub."""
    text, vision = config["text_cfg"], config["vision_cfg"]
    names = [text.get(key) for key in ("hf_model_name", "hf_tokenizer_name")]
    return [*names, vision.get("timm_model_name")]


def is_repository(path: Path) -> bool:
    """Whether a folder is a repository of open_clip, or one of transformers."""
    if (path / REPOSITORY_CONFIG).is_file():
        return True
    other = path / _TRANSFORMERS_CONFIG
    try:
        return b'"model_type"' in read_file(other, MAX_JSON)
    except OSError:
        return False


def _of_repository(name: str, folder: Path) -> Architecture:
    """The architecture of a repository on disk."""
    if (folder / REPOSITORY_CONFIG).is_file() or not is_repository(folder):
        return _of_file(name, folder / REPOSITORY_CONFIG)
    file, processor = folder / _TRANSFORMERS_CONFIG, folder / "preprocessor_config.json"
    content, settings = _read_json(name, file), dict[str, Any]()
    if processor.is_file():
        settings = preprocessing_of(_read_json(name, processor))
        _check_preprocessing(settings, f"model {name}: {processor}")
    if content.get("model_type") == transformers_siglip.MODEL_TYPE:
        try:
            config = transformers_siglip.architecture_of(content, str(file))
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            why = printable(str(error))
            raise UserError(f"{file} is not as transformers writes it ({why})") from None
        found = Architecture(name, config, {})
        settings |= {"resize_mode": "squash"}  # its processor has no crop
        return found.preprocessed(transformers_siglip.PREPROCESSING).preprocessed(settings)
    return Architecture(name, architecture_of(content, str(file)), {}).preprocessed(settings)


def _of_file(name: str, path: Path) -> Architecture:
    """The architecture in a JSON file: a repository's, or one in the form of open_clip's files."""
    whole = _read_json(name, path)
    config = whole.get("model_cfg", whole)
    _check_form(config, f"model {name}: {path}")
    preprocessing = whole.get("preprocess_cfg", {})
    _check_preprocessing(preprocessing, f"model {name}: {path}")
    return Architecture(name, config, {}).preprocessed(preprocessing)


def _check_form(config: object, place: str) -> None:
    """Checks that a configuration has the sections that every model of open_clip has.

    Raises:
        UserError: a section is missing or of another kind.
    """
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    found = config if isinstance(config, dict) else {}
    wrong = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
    wrong += [] if wrong or found["embed_dim"] > 0 else ["positive embed_dim"]
    if wrong:
        raise UserError(
            f"{place} is not a model configuration of open_clip (no {', '.join(wrong)}); its "
            "model_configs/ViT-B-32.json is an example"
        )


def _check_blocks(config: Mapping[str, Any], place: str) -> None:
    """Checks the number of blocks: open_clip makes one after another, however many are asked for.

    Raises:
        UserError: a tower has more than any model.
    """
    for part in ("vision_cfg", "text_cfg"):
        layers = config[part].get("layers")
        numbers = layers if isinstance(layers, list) else [layers]
        if sum(number for number in numbers if isinstance(number, int)) > _BLOCKS:
            shown = printable(repr(layers))
            raise UserError(f"{place}: {part}.layers is {shown}; at most {_BLOCKS:,} are built")


def _check_preprocessing(found: object, place: str) -> None:
    """Checks what open_clip does not check before images are read.

    Raises:
        UserError: `mean` or `std` is not three numbers, or the whole is not a mapping.
    """
    if not isinstance(found, dict):
        raise UserError(f"{place}: preprocess_cfg is not a mapping")
    for key in ("mean", "std"):
        value = found.get(key)
        numbers = isinstance(value, list) and all(isinstance(n, int | float) for n in value)
        if value is not None and not (numbers and len(value) == 3):
            raise UserError(
                f"{place}: preprocess_cfg.{key} is {printable(repr(value))}; three numbers are "
                "expected"
            )


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except OSError as error:
        raise UserError(f"model {name}: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"model {name}: {path} is not JSON: {printable(str(error))}") from None
    return tree if isinstance(tree, dict) else {}


def _advice(name: str) -> str:
    """What to give instead of a name that no model has."""
    if is_repository(Path(name)):
        return f"the repository on disk is --model {LOCAL}{name}"
    advice = nearest(name, model_names(), _LISTING)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        advice += f". A repository on the hub is --model {HUB}{name}"
    return advice
