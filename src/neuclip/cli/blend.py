"""`neuclip blend`: mixes the weights of two models, evaluates each mix, and writes the best.

Imports torch only when the options are checked.
"""

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from neuclip.cli import terminal
from neuclip.cli.checkpoint_flags import CheckpointFlags
from neuclip.cli.data import EvaluatedReadingFlags
from neuclip.cli.eval import recorded_reading
from neuclip.cli.export import check_licence
from neuclip.cli.options import Switch, check_range
from neuclip.config.sections import EvaluationConfig
from neuclip.errors import UserError, quantity
from neuclip.evaluation.blend_choice import Mix, choose, has_barrier
from neuclip.run_folder import is_canary

if TYPE_CHECKING:
    from neuclip.config.run_config import RunConfig
    from neuclip.data.progress import Progress
    from neuclip.evaluation.interfaces import EvaluationSettings
    from neuclip.evaluation.splits import EvaluationSplit
    from neuclip.model.blending import BlendEnds

_MOST_ALPHAS = 1001


@dataclass(frozen=True, kw_only=True)
class Blend(CheckpointFlags, EvaluatedReadingFlags):
    """Mix the weights of two models of one architecture (WiSE-FT), and find the best mix.

    The weights of a mix are (1 - alpha) OLD + alpha NEW: OLD knows what fine-tuning forgot, and NEW
    knows your data. Each mix is evaluated in float32 on your data (--val-data) and on data that
    show what is forgotten (--canary). The best mean of both wins; with --max-canary-loss, the best
    on your data. --epoch, --iter, --best and --no-ema choose among the weights of NEW.
    """

    old: Annotated[Positional[Path], arg(metavar="OLD", help_behavior_hint="")]
    """the model before fine-tuning: run folder, checkpoint file, or Hugging Face open_clip
    repository on disk; or weights to download: hf-hub:OWNER/NAME, or a tag of open_clip's"""
    new: Annotated[Positional[Path], arg(metavar="NEW", help_behavior_hint="")]
    """the fine-tuned model, in any of these forms"""
    alphas: Annotated[str, arg(metavar="A,B,..,Z")] = "0,0.1,..,1"
    """shares of NEW, from 0 to 1: a list, in which two dots continue the last step"""
    val_data: Annotated[
        str | None, arg(metavar="DATA[::DATA]", help_behavior_hint="(default: the run's)")
    ] = None
    """evaluation splits of your own data, as for `neuclip eval`"""
    canary: Annotated[
        str | None,
        arg(metavar="DATA[::DATA]", help_behavior_hint="(default: the run's, without --val-data)"),
    ] = None
    """data outside your domain, in the same forms, that show what is forgotten"""
    val_templates: Annotated[
        str | None, arg(metavar="FILE", help_behavior_hint="(default: the data's own)")
    ] = None
    """prompts for the class names of the splits: a text file with one a line, or the prompts
    separated by ::, as in 'a photo of a {c}.'"""
    max_canary_loss: Annotated[
        float | None, arg(metavar="POINTS", help_behavior_hint="(default: best mean)")
    ] = None
    """choose the best on your data among the mixes that lose at most this many percentage points
    on the canary against OLD"""
    figure: Annotated[Path, arg(metavar="FILE")] = Path("blend.png")
    """drawing of the results, .png or .svg"""
    out: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: nothing is written)")
    ] = None
    """folder for the weights of the best mix"""
    format: Literal["hf", "open_clip", "safetensors"] = "hf"
    """format of the weights, as for `neuclip export`; hf needs no --arch later"""
    license: Annotated[
        str | None, arg(metavar="ID", help_behavior_hint="(default: the card states none)")
    ] = None
    """licence for the model card, such as mit or cc-by-4.0"""
    overwrite: Switch = False
    """replace the files of an older export"""
    allow_damage: Switch = False
    """evaluate the readable samples of a corrupt set instead of refusing it"""
    batch_size: int = 256
    """images or texts per forward pass"""
    workers: int = 2
    """data workers"""
    device: Annotated[str, arg(metavar="{auto,cpu,cuda,cuda:N,mps}")] = "auto"
    """device to compute on"""


def parse_alphas(text: str) -> list[float]:
    """The values of `--alphas`, in rising order.

    Args:
        text: numbers joined by commas; `..` continues the step between the two numbers before it
            up to the number after it, as in `0,0.1,..,1`.

    Raises:
        UserError: a value is not a number from 0 to 1 or is given twice, or the steps miss the end.
    """
    values = list[Decimal]()
    words = [word.strip() for word in text.split(",")]
    for place, word in enumerate(words):
        if word in {"..", "..."}:
            if len(values) < 2 or place + 1 == len(words):
                raise _bad_alphas(text, "the dots need two numbers before them and one after")
            values += _between(values[-2], values[-1], _alpha(words[place + 1], text), text)
        else:
            values.append(_alpha(word, text))
    if len(set(values)) < len(values):
        raise _bad_alphas(text, "a number is given twice")
    return [float(value) for value in sorted(values)]


def _alpha(word: str, text: str) -> Decimal:
    try:
        value = Decimal(word)
    except InvalidOperation:
        raise _bad_alphas(text, f"{word!r} is not a number") from None
    if not value.is_finite() or not 0 <= value <= 1:
        raise _bad_alphas(text, f"{word} is not between 0 (OLD) and 1 (NEW)")
    return value


def _between(before: Decimal, last: Decimal, end: Decimal, text: str) -> list[Decimal]:
    """The numbers after `last` and before `end`, in steps of `last - before`."""
    step = last - before
    if step == 0 or (end - last) / step <= 0:
        raise _bad_alphas(text, f"steps of {step} from {last} do not lead to {end}")
    count, rest = divmod(end - last, step)
    if rest:
        raise _bad_alphas(text, f"steps of {step} from {last} miss {end}")
    if count > _MOST_ALPHAS:
        raise _bad_alphas(text, f"more than {_MOST_ALPHAS:,} mixes")
    return [last + step * number for number in range(1, int(count))]


def _bad_alphas(text: str, reason: str) -> UserError:
    return UserError(f"--alphas {text}: {reason}; examples: 0,0.1,..,1 and 0,0.25,0.5,1")


def blend(command: Blend) -> int:
    """Evaluates mixes, prints and draws the results, and writes the best mix.

    Raises:
        UserError: flags, models or data cannot be used; before anything is evaluated, except for
            corrupt samples.
    """
    alphas = _checked(command)

    import torch

    from neuclip.evaluation.interfaces import EvaluationSettings
    from neuclip.evaluation.own_splits import open_own_splits
    from neuclip.export import check_form, check_out
    from neuclip.model.blending import open_ends
    from neuclip.model.checkpoint_choice import CheckpointChoice
    from neuclip.model.load import load_pretrained
    from neuclip.parallel import collectives
    from neuclip.parallel.process_group import open_process_group
    from neuclip.report import check_replaceable
    from neuclip.report.blend_curve import WRITER

    check_replaceable([command.figure], WRITER, "--figure")
    if command.out is not None:
        check_out(command.out, overwrite=command.overwrite)
    # The ranks only share work and gather features, for which gloo serves any device.
    with open_process_group(torch.device("cpu")) as launch, terminal.progress() as progress:
        # What is asked for is checked first: loading large models takes longer.
        asked = _asked(command)
        splits = open_own_splits(asked, command.data_config(), None, progress)
        new = load_pretrained(command.choice(command.new), command.device, launch.local_rank)
        if command.out is not None:
            check_form(new, command.format)
        old = CheckpointChoice(command.old, arch=command.arch)
        ends = open_ends(old, new)
        if command.val_data is None:
            splits = _recorded_splits(command, ends.checkpoint.config, progress)
        _check_splits(command, splits)
        main = collectives.is_main()
        settings = EvaluationSettings(
            batch_size=command.batch_size,
            workers=command.workers,
            stall_limit=command.data_config().data_timeout,
            allow_damage=command.allow_damage,
            gallery_queries=0,
            progress=progress if main else None,
        )
        if main:
            _announce(command, alphas, splits)
        mixes = _evaluate(ends, alphas, splits, settings)
        chosen = choose(mixes, command.max_canary_loss)
        if main:
            _show(command, mixes, chosen)
            if command.out is not None:
                _write(command, ends, chosen, command.out)
    return 0


def _checked(command: Blend) -> list[float]:
    """Checks what needs neither models nor data; returns the alphas."""
    check_range("batch-size", command.batch_size, ge=1)
    check_range("workers", command.workers, ge=0)
    check_range("max-canary-loss", command.max_canary_loss, ge=0, le=100)
    check_licence(command.license)
    alphas = parse_alphas(command.alphas)
    if command.max_canary_loss is not None and 0.0 not in alphas:
        raise UserError(f"--max-canary-loss compares with OLD: add 0 to --alphas {command.alphas}")
    if command.figure.suffix not in {".png", ".svg"}:
        raise UserError(f"--figure {command.figure}: give a name that ends in .png or .svg")
    for flag, given in (("license", command.license is not None), ("overwrite", command.overwrite)):
        if given and command.out is None:
            raise UserError(f"--{flag} has no effect without --out, the folder for the best mix")
    return alphas


def _asked(command: Blend) -> EvaluationConfig:
    """The data on the command line; templates only where they are all the data."""
    whole = command.val_data is not None
    return EvaluationConfig(
        val_data=command.val_data,
        canary=command.canary if whole else None,
        val_templates=command.val_templates if whole else None,
    )


def _recorded_splits(
    command: Blend, config: "RunConfig | None", progress: "Progress"
) -> "list[EvaluationSplit]":
    """The splits that NEW was trained with; flags replace its canary and its templates."""
    from neuclip.evaluation.own_splits import reopen_own_splits

    if config is None:
        return []
    flags = {"canary": command.canary, "val_templates": command.val_templates}
    given = {key: value for key, value in flags.items() if value is not None}
    evaluation = config.evaluation.model_copy(update=given)
    return reopen_own_splits(
        config.model_copy(update={"evaluation": evaluation}),
        recorded_reading(config.data, command.reading),
        progress,
    )


def _check_splits(command: Blend, splits: "Sequence[EvaluationSplit]") -> None:
    """Checks that there are data to choose by.

    Raises:
        UserError: names the missing flag.
    """
    if all(is_canary(split.name) for split in splits):
        raise UserError(
            f"{command.new} records no evaluation splits: give your own data with --val-data"
        )
    if command.max_canary_loss is not None and not any(is_canary(s.name) for s in splits):
        raise UserError("--max-canary-loss needs a canary: give one with --canary")


def _evaluate(
    ends: "BlendEnds",
    alphas: Sequence[float],
    splits: "Sequence[EvaluationSplit]",
    settings: "EvaluationSettings",
) -> list[Mix]:
    from neuclip.evaluation.evaluate import evaluate
    from neuclip.evaluation.interfaces import EvaluatedModel
    from neuclip.evaluation.zero_shot import ClassVectors

    mixes = list[Mix]()
    with _each_warning_once():
        for alpha in alphas:
            ends.take(alpha)
            vectors = ClassVectors(ends.encoder, settings)
            own, canary = list[float](), list[float]()
            for split in splits:
                found = evaluate(EvaluatedModel(ends.encoder), split, settings, vectors).metrics
                if "main_metric" not in found:
                    raise UserError(f"{split.name} has neither class names nor pairs to evaluate")
                (canary if is_canary(split.name) else own).append(found["main_metric"])
            mixes.append(Mix(alpha, _mean(own), _mean(canary) if canary else None))
    return mixes


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def _each_warning_once() -> Generator[None]:
    """Logs warnings about splits with the first mix only: every mix reads the same data."""
    logger = logging.getLogger("neuclip.evaluation.split_evaluation")
    said = set[str]()

    def first(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        known = message in said
        said.add(message)
        return not known

    logger.addFilter(first)
    try:
        yield
    finally:
        logger.removeFilter(first)


def _announce(command: Blend, alphas: Sequence[float], splits: "Sequence[EvaluationSplit]") -> None:
    print(f"mixing {command.old} (OLD) and {command.new} (NEW): {quantity(len(alphas), 'mix')}")
    for label, canary in (("own data", False), ("canary", True)):
        names = [
            f"{split.name.removeprefix('canary:')} ({_metric(split)})"
            for split in splits
            if is_canary(split.name) == canary
        ]
        if names:
            terminal.print_line(f"{label}: {', '.join(names)}", hang=2)
    if not any(is_canary(split.name) for split in splits):
        terminal.say("no canary: forgetting is not seen; add data outside your domain (--canary)")


def _metric(split: "EvaluationSplit") -> str:
    return "zero-shot top-1" if split.classnames else "mean recall@1"


def _show(command: Blend, mixes: Sequence[Mix], chosen: Mix) -> None:
    from neuclip.files import write_whole
    from neuclip.report.blend_curve import draw_blend

    print()
    terminal.print_mixes(mixes, chosen)
    print()
    if command.max_canary_loss is not None:
        rule = (
            "best on own data of the mixes that lose at most "
            f"{quantity(command.max_canary_loss, 'point')} on the canary"
        )
    else:
        rule = "best on own data" if chosen.canary is None else "best mean of own data and canary"
    print(f"chosen: alpha {chosen.alpha:g}, the {rule}")
    if len(mixes) > 1 and chosen.alpha == 0:
        terminal.say("no mix is better than OLD by this rule")
    if has_barrier(mixes):
        terminal.say(
            "mixes between OLD and NEW are worse than both: training went too far from OLD for "
            "its weights to be mixed; fine-tune with a lower --lr or for fewer epochs"
        )
    form = command.figure.suffix.removeprefix(".")
    write_whole(command.figure, draw_blend(mixes, chosen, form))
    print(f"wrote {command.figure}")


def _write(command: Blend, ends: "BlendEnds", chosen: Mix, out: Path) -> None:
    from neuclip.export import export_model

    ends.take(chosen.alpha)
    old, new = (path.name or str(path) for path in (command.old, command.new))
    done = export_model(
        ends.as_pretrained(out),
        command.format,
        out,
        licence=command.license,
        overwrite=command.overwrite,
        origin=f"the weights are {1 - chosen.alpha:.3g} x {old} + {chosen.alpha:.3g} x {new} "
        "(neuclip blend)",
    )
    for path in done.files:
        print(f"  {path}  {path.stat().st_size:,} bytes")
    for note in done.notes:
        terminal.say(note)
