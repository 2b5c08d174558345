"""The labelled samples that probes are trained on, in the classes of the set that is evaluated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neuclip.data.sources.source import Source
from neuclip.errors import UserError, printable, quantity
from neuclip.evaluation.interfaces import EncodedImages
from neuclip.evaluation.label_classes import match_classes
from neuclip.evaluation.splits import EvaluationSplit


@runtime_checkable
class ProbedSet(Protocol):
    """An evaluation set whose classes probes choose among."""

    @property
    def title(self) -> str:
        """Name to display."""
        ...

    @property
    def index(self) -> Source:
        """The samples."""
        ...

    @property
    def classnames(self) -> list[str]:
        """Names of the classes; nothing for a set without classes."""
        ...

    @property
    def training(self) -> EvaluationSplit | None:
        """Its training part, if it has one."""
        ...


def training_data(
    data: ProbedSet, shared: Sequence[EvaluationSplit]
) -> tuple[EvaluationSplit, ...]:
    """What a set's probes are trained on; nothing if it has no classes or no training data."""
    if not data.classnames:
        return ()
    if shared:
        return tuple(shared)
    return () if data.training is None else (data.training,)


def why_no_probes(data: ProbedSet, shared: Sequence[EvaluationSplit]) -> str | None:
    """Why a set has no probes; None if it has."""
    if training_data(data, shared):
        return None
    if not data.classnames:
        return "it has no classes"
    return (
        "it has no training part (the folder train/ beside test/, as in clip-benchmark's sets); "
        "--probe-data names labelled data to train on"
    )


def check_training_data(data: ProbedSet, shared: Sequence[EvaluationSplit]) -> None:
    """Checks what paths and class names tell of a set's training data, before any image is read.

    Args:
        data: the set.
        shared: the data of `--probe-data`, for all sets; nothing: each set's own training part.

    Raises:
        UserError: they are those that are evaluated, or have none of the classes.
    """
    parts = training_data(data, shared)
    if parts and shared:
        require_apart(parts, data)
    for part in parts:
        match_classes(part.classnames, data.classnames, part.title)


def require_apart(parts: Sequence[EvaluationSplit], data: ProbedSet) -> None:
    """Checks that no training sample is read from a file or folder that is evaluated.

    Raises:
        UserError: some are.
    """
    evaluated = set(_local_files(data.index))
    inside = {path for path in evaluated if path.is_dir()}
    above = {
        parent for folder in {path.parent for path in evaluated} for parent in _upwards(folder)
    }
    for part in parts:
        for file in _local_files(part.index):
            if (
                file in evaluated
                or file in above
                or (inside and not inside.isdisjoint(_upwards(file.parent)))
            ):
                raise UserError(
                    f"probes would be trained on samples that are evaluated: {file} is in "
                    f"--probe-data and in {data.title}; give other data"
                )


def _local_files(source: Source) -> Iterator[Path]:
    """The files or folders of the samples, without addresses; links of folders are followed."""
    resolved: dict[Path, Path] = {}  # there may be a million files, of a few folders
    for file in dict.fromkeys(str(source.file_of(position)) for position in range(len(source))):
        if "://" not in file:
            folder = Path(file).parent
            if folder not in resolved:
                resolved[folder] = folder.resolve()
            yield resolved[folder] / Path(file).name


def _upwards(folder: Path) -> tuple[Path, ...]:
    """A folder and all folders above it."""
    return folder, *folder.parents


@dataclass(frozen=True)
class ProbeSamples:
    """The training samples of a set's classes.

    Attributes:
        features: of their images.
        classes: class of each among those of the evaluated set.
        unlabelled: samples without a label, which are left out.
        others: samples of classes that are not evaluated, which are left out.
        damaged: corrupt samples, which are left out.
        untrained: classes of evaluated samples without a training sample, with the number of
            evaluated samples.
    """

    features: Float[Tensor, "samples dim"]
    classes: Int64[Tensor, " samples"]
    unlabelled: int
    others: int
    damaged: int
    untrained: dict[int, int]

    @classmethod
    def of(
        cls,
        parts: Sequence[EvaluationSplit],
        encoded: Sequence[EncodedImages],
        data: ProbedSet,
        images: EncodedImages,
    ) -> "ProbeSamples":
        """The samples of all parts.

        Raises:
            UserError: none is of a class that is evaluated, or all are of one.
        """
        features: list[Tensor] = []
        classes: list[Tensor] = []
        unlabelled = others = 0
        for part, found in zip(parts, encoded, strict=True):
            places = match_classes(part.classnames, data.classnames, part.title)
            known = [-1 if place is None else place for place in places]
            number = torch.tensor([*known, -1])[found.class_indices]  # -1 stays -1
            kept = (number >= 0).nonzero().flatten()
            features.append(found.image_features[kept.to(found.image_features.device)])
            classes.append(number[kept])
            unlabelled += int((found.class_indices < 0).sum())
            others += int(((number < 0) & (found.class_indices >= 0)).sum())
        target = torch.cat(classes)
        present = target.unique()
        if len(present) < 2:
            what = f"are of class {printable(data.classnames[int(present[0])], 60)!r}"
            raise UserError(
                f"{data.title}: probes need training samples of two classes at least, and all "
                f"{quantity(len(target), 'sample')} of {', '.join(p.title for p in parts)} {what}"
                if len(present)
                else f"{data.title}: no training sample of {', '.join(p.title for p in parts)} is "
                "of a class that is evaluated"
            )
        evaluated, sizes = images.class_indices.unique(return_counts=True)
        pairs = zip(evaluated.tolist(), sizes.tolist(), strict=True)
        trained = set(present.tolist())
        return cls(
            torch.cat(features),
            target,
            unlabelled,
            others,
            sum(len(found.damage) for found in encoded)
            + sum(len(part.index.damage) for part in parts),
            {number: size for number, size in pairs if number not in trained},
        )

    def counts(self) -> dict[str, float]:
        """Numbers of training samples, and of evaluated samples that cannot be right."""
        found = {"num_probe_samples": float(len(self.classes))}
        for key, count in (
            ("num_probe_unlabelled", self.unlabelled),
            ("num_probe_other_classes", self.others),
            ("num_probe_damaged", self.damaged),
            ("num_untrained", sum(self.untrained.values())),
        ):
            if count:
                found[key] = float(count)
        return found
