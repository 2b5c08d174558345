"""`neuclip export`: writes trained towers as files for open_clip, transformers and ONNX Runtime.

Imports torch only when it runs.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.checkpoint_flags import CheckpointFlags
from neuclip.cli.options import Switch
from neuclip.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportCommand(CheckpointFlags):
    """Write trained towers for open_clip, Hugging Face or ONNX Runtime, with a model card.

    Formats: open_clip, a checkpoint (.pt) for create_model_and_transforms(..., pretrained=FILE);
    safetensors, the bare weights; hf, a repository on disk for open_clip's local-dir: and, if
    CLIPModel supports the architecture, for transformers; onnx, a graph of each tower, compared
    with torch in ONNX Runtime (pip install 'neuclip[onnx]'). Weights are written in float32.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN", help_behavior_hint="")]
    """run folder, checkpoint file, or Hugging Face open_clip repository on disk; or weights to
    download: hf-hub:OWNER/NAME[@REVISION], MODEL:TAG, or a tag of open_clip's"""
    out: Annotated[Path, arg(metavar="DIR", help_behavior_hint="")]
    """folder to write to"""
    format: Literal["open_clip", "hf", "safetensors", "onnx"] = "open_clip"
    """format of the files"""
    license: Annotated[
        str | None, arg(metavar="ID", help_behavior_hint="(default: the card states none)")
    ] = None
    """licence for the model card, such as mit or cc-by-4.0"""
    overwrite: Switch = False
    """replace the files of an older export"""


def check_licence(identifier: str | None) -> None:
    """Checks the form of `--license`.

    Raises:
        UserError: it is not an identifier.
    """
    if identifier is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", identifier):
        raise UserError(
            f"--license {identifier!r} is not a licence identifier; examples: mit, cc-by-4.0"
        )


def export(command: ExportCommand) -> int:
    """Exports towers and prints the written files.

    Raises:
        UserError: the checkpoint cannot be read, a package is missing, or the folder is not empty
            or not writable.
    """
    check_licence(command.license)

    from neuclip.export import check_out, export_model
    from neuclip.export.onnx_towers import check_packages
    from neuclip.model.load import load_pretrained

    if command.format == "onnx":
        check_packages()
    check_out(command.out, overwrite=command.overwrite)
    model = load_pretrained(command.choice(command.run), "cpu")
    checkpoint = model.checkpoint
    average = ", moving average of the weights" if checkpoint.averaged else ""
    print(f"exporting {checkpoint.shown} ({checkpoint.arch}{average})", flush=True)
    done = export_model(
        model,
        command.format,
        command.out,
        licence=command.license,
        overwrite=command.overwrite,
    )
    for path in done.files:
        print(f"  {path}  {path.stat().st_size:,} bytes")
    for note in done.notes:
        terminal.say(note)
    print(f"\n{done.usage}")
    return 0
