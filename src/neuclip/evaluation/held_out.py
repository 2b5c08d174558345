"""Holds out a share of the training data for evaluation: `--val-split`.

The choice is a function of seed and data. Samples that belong together (equal captions, equal
images, and equal labels if training takes them for false negatives) stay on one side, so that no
evaluated image or caption was trained on. Labels that only name classes are on both sides.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neuclip.config.data_sections import ReadingConfig
from neuclip.data import groups
from neuclip.data.progress import Progress
from neuclip.data.remote.transport import PIPE
from neuclip.data.sources.part import Part
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, quantity
from neuclip.evaluation.label_classes import Prompts, folder_of, label_classes
from neuclip.evaluation.splits import EvaluationSplit
from neuclip.parallel.work_sharing import from_main

NAME = "val"
"""Name of the split."""
_FEWEST = 2
_PURPOSE = 0x5EED  # a stream of its own: the order of epochs is drawn from the same seed


@dataclass(frozen=True)
class HeldOut:
    """A source in two parts.

    Attributes:
        source: the source.
        positions: [held out] positions of the samples that are held out, ascending.
        share: the share that was asked for.
        num_groups: number of groups among the samples that are held out.
        kinds: of the groups that stay on one side.
        ids_are_keys: whether samples keep the ids of the source.
        label_key: of the labels that are class names, if there are any.
        all_groups: the groups of the source, where they were read: on the main process.
    """

    source: Source
    positions: NDArray[np.int64]
    share: float
    num_groups: int
    kinds: Sequence[groups.GroupKind] = groups.KINDS
    ids_are_keys: bool = False
    label_key: str | None = None
    all_groups: groups.Groups | None = field(default=None, repr=False)

    @cached_property
    def _kept(self) -> NDArray[np.int64]:
        """[samples to train on] Their positions, ascending."""
        kept = np.ones(len(self.source), dtype=bool)
        kept[self.positions] = False
        return np.flatnonzero(kept).astype(np.int64)

    def groups_of_rest(self, reading: ReadingConfig) -> groups.Groups:
        """The groups of the samples to train on; other processes find them in the cache folder.

        Args:
            reading: as in `hold_out`.
        """
        found = self.all_groups or groups.read_groups(self.source, reading, self.kinds)
        return found.part(self._kept)

    @cached_property
    def rest(self) -> Source:
        """The samples to train on."""
        damage = self.source.damage
        return Part(self.source, self._kept, damage=damage, ids_are_keys=self.ids_are_keys)

    @cached_property
    def split(self) -> EvaluationSplit:
        """The samples that are held out."""
        return self._labelled(NAME, Part(self.source, self.positions), "needed")

    @cached_property
    def probed_split(self) -> EvaluationSplit:
        """The samples that are held out, with the rest as training part for probes."""
        split = self._labelled(NAME, Part(self.source, self.positions), "wanted")
        training = self._labelled(f"{NAME}, the rest of the data", self.rest, "unused")
        return replace(split, training=training if training.classnames else None)

    def _labelled(self, name: str, part: Source, prompts: Prompts) -> EvaluationSplit:
        key, folder = self.label_key, folder_of(self.source)
        found = None if key is None else label_classes(part, key, folder, prompts=prompts)
        split = EvaluationSplit(name, part, [], [], origin=self._words(), allow_damage=True)
        if found is None:
            return split
        classes = {"classnames": found.classnames, "templates": found.templates}
        return replace(split, index=found.source, by_label=True, **classes)

    @cached_property
    def digest(self) -> str:
        """Digest of the positions, for the checkpoint."""
        return hashlib.sha256(self.positions.astype("<i8").tobytes()).hexdigest()[:16]

    def check_batch(self, global_batch_size: int) -> None:
        """Checks that a batch can be trained on.

        Raises:
            UserError: fewer samples are left than a batch has.
        """
        left = len(self.rest)
        if left < global_batch_size:
            raise UserError(
                f"--val-split {self.share:g} leaves {quantity(left, 'sample')} to train on, less "
                f"than a batch of {global_batch_size}: hold out a smaller share, lower "
                "--batch-size, or add data"
            )

    def _words(self) -> str:
        held, total = len(self.positions), len(self.source)
        return (
            f"held out as the split {NAME}: {held:,} of {quantity(total, 'sample')} "
            f"({held / total:.2%}) in {quantity(self.num_groups, 'group')}; samples of equal "
            f"{_named(self.kinds)} stay on one side"
        )


def choose_held_out(components: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """The positions to hold out: groups in random order, as far as they fit into the share.

    Args:
        components: [samples] a number per sample, equal for samples that stay together.
        share: the largest share of the samples to hold out.
        seed: of the run.

    Returns:
        The positions, ascending. A group that is larger than what is left of the share is trained
        on, so the share may not be reached.
    """
    _, group_of, sizes = np.unique(components, return_inverse=True, return_counts=True)
    # Raw bits instead of Generator.permutation: numpy guarantees them across versions.
    bits = np.random.PCG64(np.random.SeedSequence([seed, _PURPOSE]))
    order = np.argsort(bits.random_raw(len(sizes)), kind="stable")
    left = round(share * len(components))
    chosen = np.zeros(len(sizes), dtype=bool)
    for group in order.tolist():
        size = int(sizes[group])
        if size <= left:
            chosen[group] = True
            left -= size
        if not left:
            break
    return np.flatnonzero(chosen[group_of]).astype(np.int64)


def hold_out(
    source: Source,
    reading: ReadingConfig,
    share: float,
    seed: int,
    progress: Progress | None = None,
) -> HeldOut:
    """Holds out a share of a source; the main process chooses, and all ranks get its choice.

    Args:
        source: the training data.
        reading: how it was opened; names the label key, and says whether labels join samples.
        share: the largest share of the samples to hold out.
        seed: of the run.
        progress: called while captions and images are compared.

    Raises:
        UserError: fewer than two samples can be held out, or the source is remote.
    """
    read: list[groups.Groups] = []

    def choose() -> tuple[NDArray[np.int64], int]:
        _require_local(source, share)
        read.append(groups.read_groups(source, reading, _kinds(reading), progress))
        components = groups.components(read[0])
        positions = choose_held_out(components, share, seed)
        if len(positions) < _FEWEST:
            raise UserError(_too_few(components, share, len(positions), _kinds(reading)))
        return positions, len(np.unique(components[positions]))

    positions, number = from_main(choose)
    return HeldOut(
        source,
        positions,
        share,
        number,
        _kinds(reading),
        ids_are_keys=reading.data_size is not None,
        label_key=reading.label_key,
        all_groups=read[0] if read else None,
    )


def _kinds(reading: ReadingConfig) -> Sequence[groups.GroupKind]:
    return groups.KINDS if reading.label_key and reading.labels_join else ("caption", "image")


def _named(kinds: Sequence[groups.GroupKind]) -> str:
    *first, last = (f"{kind}s" for kind in kinds)
    return f"{', '.join(first)} or {last}"


def _require_local(source: Source, share: float) -> None:
    """Checks that captions and images can be compared without downloading all of them."""
    starts = np.cumsum([0, *(span.samples for span in source.layout.spans)])[:-1]
    for start in starts.tolist():
        file = str(source.file_of(start))
        if "://" in file or file.startswith(PIPE):
            raise UserError(
                f"--val-split {share:g} compares all captions and images, and {file} is not on "
                "this machine: download the data first, or give --val-data"
            )


def _too_few(
    components: NDArray[np.int64], share: float, found: int, kinds: Sequence[groups.GroupKind]
) -> str:
    total, sizes = len(components), np.unique(components, return_counts=True)[1]
    wanted = round(share * total)
    start = f"--val-split {share:g} of {quantity(total, 'sample')} holds out {found}"
    if wanted < _FEWEST:
        return (
            f"{start}, and an evaluation needs at least {_FEWEST}: hold out a larger share, or "
            "give data of their own with --val-data"
        )
    return (
        f"{start} instead of {wanted}: samples of equal {_named(kinds)} stay together, and they "
        f"make only {quantity(len(sizes), 'group')}, the smallest of "
        f"{quantity(int(sizes.min()), 'sample')}; hold out a larger share, or give data of their "
        "own with --val-data"
    )
