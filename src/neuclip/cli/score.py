"""`neuclip score`: CLIP scores of image-text pairs, and the filter that keeps the best.

Imports torch only when it runs.
"""

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from neuclip.cli import terminal
from neuclip.cli.embedding_flags import StoredFlags
from neuclip.cli.options import check_range
from neuclip.errors import UserError, printable, quantity

if TYPE_CHECKING:
    from neuclip.embedding.pair_scores import PairScores

_BAR = 40  # characters


@dataclass(frozen=True, kw_only=True)
class Score(StoredFlags):
    """Score each pair by the cosine similarity of its image and its first caption (CLIP score).

    Prints a histogram and the worst pairs. --fraction or --threshold, as in DataComp's baselines,
    choose the pairs to keep, and --save-path writes them.
    """

    fraction: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    """keep this share of the pairs, those of the highest scores; DataComp's baseline keeps 0.3"""
    threshold: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    """keep pairs of at least this score"""
    worst: int = 10
    """number of worst pairs to print"""


def score(command: Score) -> int:
    """Scores, prints and writes.

    Raises:
        UserError: flags contradict each other, model or data cannot be read, or nothing is kept.
    """
    check_range("fraction", command.fraction, gt=0, le=1)
    check_range("threshold", command.threshold, ge=-1, le=1)
    check_range("worst", command.worst, ge=0)
    if command.fraction is not None and command.threshold is not None:
        raise UserError("--fraction and --threshold both choose what is kept: give one of them")
    chosen = command.fraction is not None or command.threshold is not None
    if chosen != (command.save_path is not None):
        raise UserError(
            "--save-path writes what --fraction or --threshold keeps: give both, or neither"
        )
    command.check()
    from neuclip.embedding.kept_samples import write_kept
    from neuclip.embedding.pair_scores import pair_scores
    from neuclip.files import write_whole
    from neuclip.parallel import collectives

    with command.stored(texts=True) as stored:
        if not collectives.is_main():
            return 0
        found = pair_scores(stored.store)
        _print(found, command.worst)
        if command.out is not None:
            write_whole(command.out, _table(found))
            print(f"scores written to {command.out}")
        if command.save_path is not None:
            kept, threshold = found.kept_by(command.threshold, command.fraction)
            if not kept.any():
                raise UserError(
                    f"--threshold {command.threshold:g}: no pair has such a score; the highest is "
                    f"{found.scores.max():.4f}"
                )
            names = stored.names(found.positions.tolist(), found.keys, command.uid_key)
            rows = kept.nonzero()[0].tolist()
            write_kept(command.save_path, [names[row] for row in rows], names)
            print(
                f"kept {len(rows):,} of {quantity(len(found), 'pair')}, with scores from "
                f"{threshold:.4f} ({len(rows) / len(found):.1%}): {command.save_path}"
            )
    return 0


def _print(found: "PairScores", worst: int) -> None:
    facts = [
        ("pairs", f"{len(found):,}"),
        ("mean", f"{found.scores.mean():.4f}"),
        ("standard deviation", f"{found.scores.std():.4f}"),
    ]
    terminal.print_facts(facts)
    bins = [*found.histogram()]
    most = max(count for _, _, count in bins)
    for start, end, count in bins:
        bar = "#" * round(_BAR * count / most)
        print(f"  {start:7.4f} to {end:7.4f}  {count:>10,}  {bar}".rstrip())
    if worst:
        print("worst pairs")
    for row in found.worst(worst):
        key, caption = printable(found.keys[row], 60), printable(found.captions[row], 100)
        print(f"  {found.scores[row]:7.4f}  {key}  {caption}")


def _table(found: "PairScores") -> str:
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["key", "position", "score", "caption"])
    columns = (found.keys, found.positions.tolist(), found.scores.tolist(), found.captions)
    table.writerows(zip(*columns, strict=True))
    return file.getvalue()
