"""`neuclip push`: uploads an export to the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.options import Switch
from neuclip.errors import quantity


@dataclass(frozen=True)
class Push:
    """Upload what `neuclip export` wrote to the Hugging Face hub, in one commit.

    The repository is made if it is missing, public unless --private is given or the organisation
    has another default. The access token comes from HF_TOKEN or `hf auth login` (the file `token`
    in HF_HOME); HF_ENDPOINT chooses the hub. Files that the export did not write stay here.
    """

    export: Annotated[Positional[Path], arg(metavar="EXPORT_FOLDER", help_behavior_hint="")]
    """folder that `neuclip export` wrote, best with --format hf"""
    repository: Annotated[Positional[str], arg(metavar="OWNER/NAME", help_behavior_hint="")]
    """repository of models on the hub"""
    private: Switch = False
    """make a new repository private; a public one is refused"""
    revision: Annotated[str | None, arg(metavar="BRANCH", help_behavior_hint="(default: main)")] = (
        None
    )
    """branch to commit to; made from main if it is missing"""
    message: Annotated[
        str | None, arg(metavar="TEXT", help_behavior_hint="(default: Upload EXPORT_FOLDER)")
    ] = None
    """message of the commit"""
    dry_run: Switch = False
    """show what would go where, without the network"""


def push(command: Push) -> int:
    """Uploads an export, and prints where it is.

    Raises:
        UserError: the folder is not an export, a name is malformed, the network is not allowed,
            there is no token, or the hub refuses.
    """
    from neuclip.export import push as upload
    from neuclip.export.exported_files import read_exported_files

    to = upload.Destination(
        command.repository.removeprefix("hf-hub:"), command.revision or upload.MAIN,
        private=command.private,
    )  # fmt: skip
    upload.check_destination(to)
    files = upload.for_hub(read_exported_files(command.export), to.repository)
    if not command.dry_run:
        upload.check_online()
    name = command.export.resolve().name
    message = command.message or f"Upload {name} with neuclip"
    where = f"{to.page}, branch {to.branch}" + (", private" if to.private else "")
    total = quantity(len(files.files), "file")
    terminal.print_plain(f"{command.export} -> {where}: {message!r}")
    width = max(map(len, files.files))
    for file, size in files.files.items():
        terminal.print_plain(f"  {file:{width}}  {size:>15,} bytes")
    terminal.print_plain(f"  {total:{width}}  {sum(files.files.values()):>15,} bytes")
    if files.others:
        terminal.say(f"left out, not of the export: {upload.shown_names(files.others)}")
    if command.dry_run:
        terminal.print_plain("nothing was sent (--dry-run)")
        return 0
    done = upload.push(files, to, message)
    if done.stay:
        terminal.say(f"other files stay in {to.repository}: {upload.shown_names(done.stay)}")
    said = "pushed" if done.changed else "nothing had changed since"
    terminal.print_plain(f"{said} {done.commit}")
    terminal.print_plain(f"to load it: {to.loading(files)}")
    return 0
