"""Writes the files of each format, all of them or none."""

import filecmp
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from neuclip.errors import UserError
from neuclip.export import onnx_towers, transformers_clip
from neuclip.export.card import CardText, write_card
from neuclip.export.exported_files import CARD, record_of, unchanged_files
from neuclip.files import writing
from neuclip.model.architecture import REPOSITORY_CONFIG, Architecture, model_names
from neuclip.model.clip import fits_as_designed
from neuclip.model.export_info import (
    DEFAULT_PREPROCESSING,
    preprocessing,
    save_tokenizer,
    vocabulary,
)
from neuclip.model.load import Pretrained
from neuclip.model.transformers_names import clip_weights

Form = Literal["open_clip", "hf", "safetensors", "onnx"]

_FILES = {
    "open_clip": "open_clip_model.pt",
    "safetensors": "open_clip_model.safetensors",
    "hf": "open_clip_model.safetensors",
}
_METADATA = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True)
class Export:
    """The written files.

    Attributes:
        files: paths of the files.
        usage: code that loads them.
        notes: omitted files and caveats, as sentences.
    """

    files: list[Path]
    usage: str
    notes: list[str] = field(default_factory=list[str])


def check_out(out: Path, *, overwrite: bool) -> None:
    """Checks that an export may write to a folder.

    Raises:
        UserError: it is a file, or is not empty.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(
            f"--out {out} is not empty: choose another folder, or replace files of an older export "
            "with --overwrite"
        )


def export_model(
    model: Pretrained,
    form: Form,
    out: Path,
    *,
    licence: str | None = None,
    overwrite: bool = False,
    origin: str | None = None,
) -> Export:
    """Writes towers with a model card.

    Args:
        model: the towers.
        form: `open_clip`: a checkpoint; `safetensors`: the weights alone; `hf`: a repository for
            open_clip and, if CLIPModel supports the architecture, for transformers; `onnx`: a graph
            of each tower.
        out: folder to write to; made if missing.
        licence: identifier for the model card; none: the card states none.
        overwrite: replace the files of an older export, which its card lists; other files stay.
        origin: a sentence for the card on where the weights come from, if no run trained them.

    Raises:
        UserError: the folder is not empty, or cannot be written to, or a file that no export wrote
            has the name of a new one.
    """
    check_out(out, overwrite=overwrite)
    with writing(out):
        beside = out if out.exists() else out.parent  # the folder may be a disk of its own
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=beside, prefix=f".{out.name}-", ignore_cleanup_errors=True
        ) as temporary:
            staging = Path(temporary) / "new"
            staging.mkdir()
            usage, notes = _write(model, form, staging, out)
            said = [*([origin] if origin else []), *notes]
            card = staging / CARD
            write_card(card, model, CardText(usage, said, licence, record_of(staging)))
            names, readable = sorted(path.name for path in staging.iterdir()), card.stat().st_mode
            for name in names:
                (staging / name).chmod(readable)  # safetensors lets only the owner read
            _move(staging, out)
    return Export([out / name for name in names], usage, notes)


def _move(staging: Path, out: Path) -> None:
    """Gives the files of an export their place: a folder at once, or one file after another.

    The card moves last: until then the older export's card names its files, so that the same
    command can go on after a failure.

    Raises:
        UserError: a file that no export wrote has the name of a new one.
    """
    if not out.exists():
        staging.rename(out)
        return
    before, names = unchanged_files(out), {path.name for path in staging.iterdir()}
    _check_replaceable(staging, out, names - before)
    for name in sorted(names - {CARD}):
        (staging / name).replace(out / name)
    for name in before - names:
        (out / name).unlink()  # of other weights or of another format
    (staging / CARD).replace(out / CARD)


def check_form(model: Pretrained, form: Form) -> None:
    """Checks that towers can be written in a format.

    Raises:
        UserError: open_clip could not load them, or packages are missing.
    """
    if form == "onnx":
        onnx_towers.check_packages()
    if form == "hf" and not fits_as_designed(model.clip):
        raise _not_from_repository(model)


def _not_from_repository(model: Pretrained) -> UserError:
    return UserError(
        f"--format hf: open_clip cannot load this image tower at {_size(model)} pixels from a "
        "repository; --format open_clip prints code that can"
    )


def _check_replaceable(staging: Path, out: Path, names: set[str]) -> None:
    """Checks that a folder has no other files with these names.

    Equal files may be there: an export that failed moved them.

    Raises:
        UserError: names the files.
    """
    there = (name for name in names if (out / name).exists())
    found = sorted(name for name in there if not _equal(staging / name, out / name))
    if found:
        raise UserError(
            f"--out {out}: not written by an export, or changed since: {', '.join(found)}; "
            "remove these files, or choose another folder"
        )


def _equal(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _write(model: Pretrained, form: Form, staging: Path, out: Path) -> tuple[str, list[str]]:
    """Writes the files of a format; returns code that loads them, and notes."""
    weights = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.clip.towers.state_dict().items()
    }
    config, bias = _config(model, weights), "logit_bias" in weights
    if form == "onnx":
        return _write_onnx(model, config, staging, out.name)
    designed = fits_as_designed(model.clip)
    if form == "hf" and not designed:
        raise _not_from_repository(model)
    weights_file = staging / _FILES[form]
    if form == "open_clip":
        known = {"epoch": model.checkpoint.epoch, "name": model.checkpoint.name}
        known = {key: value for key, value in known.items() if value is not None}
        with weights_file.open("wb") as file:  # torch's own writer reports no cause
            torch.save({**known, "state_dict": weights}, file)
    else:
        save_file(weights, weights_file, _METADATA)
    if form == "hf":
        repository = {"model_cfg": config, "preprocess_cfg": preprocessing(model.clip)}
        _write_json(staging / REPOSITORY_CONFIG, repository)
        save_tokenizer(model.clip, staging)
        notes = _write_transformers(model, config, weights, staging)
        both = (staging / transformers_clip.CONFIG).is_file()
        return _repository_usage(out.name, both=both), notes
    architecture, notes = model.clip.architecture, list[str]()
    name, own = architecture.short_name, bias or not architecture.published
    if own:
        name = _own_name(architecture, bias=bias)
        if architecture.repository is not None and vocabulary(model.clip) is None:
            save_tokenizer(model.clip, staging)
            config["text_cfg"] = {**config["text_cfg"], "hf_tokenizer_name": out.name}
        _write_json(staging / f"{name}.json", config)
        why = "has a logit bias" if bias else "is not one of open_clip's own models"
        notes.append(f"the model {why}: open_clip needs {name}.json (open_clip.add_model_config)")
    file, folder = f"{out.name}/{weights_file.name}", out.name if own else None
    return _file_usage(name, file, folder, _arguments(model, designed=designed)), notes


def _write_onnx(
    model: Pretrained, config: dict[str, Any], staging: Path, folder: str
) -> tuple[str, list[str]]:
    """Writes a graph of each tower, with preprocessing and tokenizer."""
    onnx_towers.write_towers(model.clip, staging)
    settings = preprocessing(model.clip)
    _write_json(staging / REPOSITORY_CONFIG, {"model_cfg": config, "preprocess_cfg": settings})
    save_tokenizer(model.clip, staging)
    words = vocabulary(model.clip)
    if words is not None:
        length = int(config["text_cfg"].get("context_length", 77))
        texts = transformers_clip.processor_files(settings, length, words)
        transformers_clip.write_texts(staging, texts)
    scale = f"logits are {model.clip.logit_scale:.6g} times the cosines"
    bias = model.clip.towers.state_dict().get("logit_bias")
    notes = [onnx_towers.facts(), scale if bias is None else f"{scale}, plus {float(bias):.6g}"]
    return onnx_towers.usage(folder, transformers=words is not None), notes


def _write_transformers(
    model: Pretrained, config: dict[str, Any], weights: dict[str, Tensor], staging: Path
) -> list[str]:
    """Writes the files of `CLIPModel` and `CLIPProcessor`, or returns why it cannot."""
    words = vocabulary(model.clip)
    reason = transformers_clip.obstacle(config)
    if words is None or reason is not None:
        reason = reason or "its tokenizer is not OpenAI's"
        return [f"no files for transformers: {reason}; open_clip can load the repository"]
    converted = clip_weights(weights)
    settings = transformers_clip.clip_config(config, weights, words)
    save_file(converted, staging / transformers_clip.WEIGHTS, _METADATA)
    _write_json(staging / transformers_clip.CONFIG, settings)
    length = settings["text_config"]["max_position_embeddings"]
    texts = transformers_clip.processor_files(preprocessing(model.clip), length, words)
    transformers_clip.write_texts(staging, texts)
    if "logit_bias" not in weights:
        return []
    bias = float(weights["logit_bias"])
    return [
        f"CLIPModel has no logit bias: add {bias:.6g} to the logits for the sigmoid's "
        "probabilities; embeddings and rankings are the same"
    ]


def _config(model: Pretrained, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The architecture, with the loss's logit bias if there is one."""
    config = dict(model.clip.architecture.config)
    if "logit_bias" in weights:
        config.setdefault("init_logit_bias", 0.0)
    return config


def _own_name(architecture: Architecture, *, bias: bool) -> str:
    """A name that none of open_clip's models has."""
    name = architecture.short_name
    if architecture.resized is not None:
        name = f"{name}-{architecture.resized}".replace(", ", "x").translate({40: None, 41: None})
    name = f"{name}-logit-bias" if bias else name
    return f"{name}-neuclip" if name in model_names() and not architecture.known else name


def _size(model: Pretrained) -> str:
    return " x ".join(str(side) for side in _pair(preprocessing(model.clip)["size"]))


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _arguments(model: Pretrained, *, designed: bool) -> dict[str, Any]:
    """What open_clip must be given: image size and preprocessing, where its own differ."""
    found = preprocessing(model.clip)
    given = {} if designed else {"force_image_size": model.clip.architecture.resized}
    for key in ("mean", "std", "interpolation", "resize_mode"):
        value = tuple(found[key]) if key in ("mean", "std") else found[key]
        if value != DEFAULT_PREPROCESSING[key]:
            given[f"image_{key}"] = value
    return given


def _file_usage(name: str, file: str, config_folder: str | None, arguments: dict[str, Any]) -> str:
    lines = ["import open_clip", ""]
    if config_folder is not None:
        lines.append(f'open_clip.add_model_config("{config_folder}")')
    after = "force_image_size" in arguments  # open_clip resizes such towers after it loads weights
    first = [f'"{name}"'] if after else [f'"{name}"', f'pretrained="{file}"']
    given = [*first, *(f"{key}={value!r}" for key, value in arguments.items())]
    lines += [
        "model, _, preprocess = open_clip.create_model_and_transforms(",
        *(f"    {each}," for each in given),
        ")",
    ]
    if after:
        lines.append(f'open_clip.load_checkpoint(model, "{file}")')
    lines.append(f'tokenizer = open_clip.get_tokenizer("{name}")')
    return "\n".join(lines)


def _repository_usage(folder: str, *, both: bool) -> str:
    lines = [
        "import open_clip",
        "",
        f'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")',
        f'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")',
    ]
    if both:
        lines += [
            "",
            "# or, the same towers:",
            "from transformers import CLIPModel, CLIPProcessor",
            "",
            f'model = CLIPModel.from_pretrained("{folder}")',
            f'processor = CLIPProcessor.from_pretrained("{folder}")',
        ]
    return "\n".join(lines)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
