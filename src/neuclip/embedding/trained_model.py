"""The model of `neuclip.load`: embeds images and texts, classifies, and compares.

Images are read, cut into batches and encoded by the code of `neuclip eval`: for the same images in
the same order, batch size and device, the features are the same to the last bit.
"""

import contextlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuclip import console
from neuclip.data.decode import image_endings
from neuclip.data.opening import open_source
from neuclip.data.samples import Damage
from neuclip.data.sources.image_list import GivenImage, ImageList
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, quantity
from neuclip.evaluation.class_names import DEFAULT_TEMPLATE, checked_templates
from neuclip.evaluation.embed import encode_images, encode_texts, start_reading
from neuclip.evaluation.interfaces import EvaluationSettings
from neuclip.evaluation.zero_shot import ClassVectors
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import Pretrained, load_towers

Images = GivenImage | Sequence[GivenImage] | Source
"""Paths or images of Pillow; or one text: a path, or data as for `--train-data`."""

Unreadable = Literal["raise", "nan"]
"""What an unreadable image is: an error, or a row of NaN."""


@dataclass(frozen=True)
class Classification:
    """Images by class.

    Attributes:
        class_names: the classes.
        probabilities: softmax over the classes of cosine similarity / temperature of the model;
            NaN for an unreadable image.
    """

    class_names: tuple[str, ...]
    probabilities: Float[Tensor, "images classes"]

    @property
    def labels(self) -> list[str | None]:
        """The most probable class of each image; None for an unreadable one."""
        return [None if best is None else best[0][0] for best in self.top(1)]

    def top(self, k: int) -> list[list[tuple[str, float]] | None]:
        """The k most probable classes of each image with their probabilities, best first.

        Args:
            k: number of classes; at most all of them.
        """
        found = self.probabilities.topk(min(k, len(self.class_names)), dim=1)
        return [
            None
            if values[0] != values[0]  # NaN
            else [(self.class_names[i], value) for i, value in zip(rows, values, strict=True)]
            for rows, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]


class TrainedModel:
    """A trained model, ready to use. `neuclip.load` makes it.

    Features have unit norm, are float32, and are on the CPU.

    Args:
        loaded: the model of a checkpoint.
        batch_size: images or texts per forward pass.
        workers: processes that read images; 0: read in this process.
    """

    def __init__(self, loaded: Pretrained, batch_size: int = 256, workers: int = 2) -> None:
        self._loaded = loaded
        self._settings = EvaluationSettings(batch_size=batch_size, workers=workers)

    def __repr__(self) -> str:
        return f"TrainedModel({self.arch}, {self._loaded.checkpoint.shown}, {self.device})"

    @property
    def arch(self) -> str:
        """Name of the architecture."""
        return self._loaded.checkpoint.arch

    @property
    def device(self) -> torch.device:
        """Where the towers are."""
        return self._loaded.encoder.device

    @property
    def embed_dim(self) -> int:
        """Dimension of the features."""
        return self._loaded.clip.embed_dim

    @property
    def logit_scale(self) -> float:
        """1 / temperature."""
        return self._loaded.clip.logit_scale

    @property
    def towers(self) -> nn.Module:
        """The towers, as open_clip builds them."""
        return self._loaded.clip.towers

    def embed_images(
        self, images: Images, *, unreadable: Unreadable = "raise"
    ) -> Float[Tensor, "images dim"]:
        """Features of images: row i is the i-th image, or the sample at position i of a source.

        Args:
            images: paths and images of Pillow; or data: a `Source`, or a text as for
                `--train-data`, such as a folder or `shards/{0000..0009}.tar`.
            unreadable: "raise" raises the first error after all images were tried; "nan" returns
                NaN for them.

        Raises:
            UserError: there is no image, none can be read, one cannot and `unreadable` is
                "raise", or `unreadable` is neither.
        """
        _check_unreadable(unreadable)
        with _opened(images) as source, console.progress() as progress:
            settings = replace(self._settings, progress=progress)
            if len(source) <= settings.batch_size:  # a process would start for one batch
                settings = replace(settings, workers=0)
            encoder = self._loaded.encoder
            batches = start_reading(encoder, source, settings, title="embedding images")
            found = encode_images(encoder, batches, allow_damage=True)
        if found.damage and unreadable == "raise":
            raise _unreadable(found.damage, len(source))
        positions = _positions(source, found.sample_ids)
        features = torch.full((len(source), self.embed_dim), torch.nan)
        features[positions] = found.image_features.cpu()
        return features

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Features of texts. Only the beginning of a text that exceeds the context counts.

        Raises:
            UserError: there is no text.
        """
        if isinstance(texts, str):
            raise UserError(f"a list of texts is expected, not one text: [{texts[:40]!r}]")
        if not texts:
            raise UserError("the list of texts is empty")
        return encode_texts(self._loaded.encoder, list(texts), self._settings.batch_size).cpu()

    def class_vectors(
        self, class_names: Sequence[str], templates: Sequence[str] = (DEFAULT_TEMPLATE,)
    ) -> Float[Tensor, "classes dim"]:
        """One unit vector per class: the mean over templates of its prompts' features.

        Args:
            class_names: the classes.
            templates: prompts in which `{c}` stands for the name of a class.

        Raises:
            UserError: a name is empty or given twice, or a template has no `{c}`.
        """
        names = checked_names(class_names)
        if isinstance(templates, str):
            raise UserError(f"templates: a list is expected, not the text {templates[:40]!r}")
        prompts = checked_templates([*templates] or [DEFAULT_TEMPLATE], "templates")
        return ClassVectors(self._loaded.encoder, self._settings)(names, prompts).cpu()

    def classify(
        self,
        images: Images | Float[Tensor, "images dim"],
        class_names: Sequence[str],
        templates: Sequence[str] = (DEFAULT_TEMPLATE,),
        *,
        unreadable: Unreadable = "raise",
    ) -> Classification:
        """Zero-shot classification.

        Args:
            images: as for `embed_images`, or features that it has returned.
            class_names: the classes.
            templates: prompts in which `{c}` stands for the name of a class.
            unreadable: as for `embed_images`.

        Raises:
            UserError: as for `embed_images` and `class_vectors`.
        """
        vectors = self.class_vectors(class_names, templates)
        features = self._image_features(images, unreadable)
        logits = self.logit_scale * (features @ vectors.T)
        return Classification(tuple(class_names), logits.softmax(dim=1))

    def similarity(
        self,
        images: Images | Float[Tensor, "images dim"],
        texts: Sequence[str] | Float[Tensor, "texts dim"],
        *,
        unreadable: Unreadable = "raise",
    ) -> Float[Tensor, "images texts"]:
        """Cosine similarity of each image with each text.

        Args:
            images: as for `embed_images`, or features.
            texts: texts, or features.
            unreadable: as for `embed_images`.

        Raises:
            UserError: as for `embed_images` and `embed_texts`, or features of another dimension.
        """
        rows = self._image_features(images, unreadable)
        given = isinstance(texts, Tensor)
        columns = self._checked(texts, "texts") if given else self.embed_texts(texts)
        return rows @ columns.T

    def _image_features(
        self, images: Images | Float[Tensor, "images dim"], unreadable: Unreadable
    ) -> Float[Tensor, "images dim"]:
        if isinstance(images, Tensor):
            return self._checked(images, "images")
        return self.embed_images(images, unreadable=unreadable)

    def _checked(self, features: Tensor, what: str) -> Tensor:
        """Features that a user gives, on the CPU, in float32.

        Raises:
            UserError: they are not rows of the model's dimension.
        """
        if features.ndim != 2 or features.shape[1] != self.embed_dim:
            raise UserError(
                f"{what}: features of this model have the shape [{what}, {self.embed_dim}], and "
                f"these have {list(features.shape)}"
            )
        return features.cpu().float()


def load(
    model: str | Path,
    *,
    arch: str | None = None,
    epoch: int | Literal["best"] | None = None,
    device: str = "auto",
    batch_size: int = 256,
    workers: int = 2,
) -> TrainedModel:
    """Loads a trained model: the first of three lines to embeddings.

        model = neuclip.load("logs/first")
        images = model.embed_images(["cat.jpg", "dog.jpg"])
        similarity = images @ model.embed_texts(["a cat", "a dog"]).T

    The moving average of the weights is taken if the run kept it.

    Args:
        model: a run folder, a checkpoint file, or a Hugging Face open_clip repository on disk; or
            weights to download: `hf-hub:OWNER/NAME[@REVISION]`, `MODEL:TAG`, or a tag of
            open_clip's.
        arch: architecture, for a checkpoint that does not record it, or a tag of several models.
        epoch: of a run folder, the checkpoint after this epoch; "best": the one that
            `--best-metric` kept; None: the latest.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`. The precision is that of the run, as in
            `neuclip eval`; float32 for checkpoints of others.
        batch_size: images or texts per forward pass.
        workers: processes that read images; 0: read in this process.

    Raises:
        UserError: no such checkpoint, no architecture known, or weights of another architecture.
    """
    if batch_size < 1 or workers < 0:
        raise UserError(
            f"batch_size {batch_size}, workers {workers}: at least 1 and at least 0 are expected"
        )
    number = None if epoch == "best" else epoch
    choice = CheckpointChoice(Path(model), number, arch=arch, best=epoch == "best")
    return TrainedModel(load_towers(choice, device), batch_size, workers)


def checked_names(class_names: Sequence[str], where: str = "class names") -> list[str]:
    """The names of classes, each of them once.

    Args:
        class_names: the names.
        where: what holds them, for the message.

    Raises:
        UserError: there is none, one is empty, or one is there twice.
    """
    if isinstance(class_names, str):
        raise UserError(f"{where}: a list is expected, not the text {class_names[:40]!r}")
    names = [name.strip() for name in class_names]
    if not names:
        raise UserError(f"{where}: none is given")
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"{where}: number {number} is empty")
        if seen.setdefault(name, number) != number:
            raise UserError(
                f"{where}: number {number}, {name!r}, is the same as number {seen[name]}: an image "
                "could be of either"
            )
    return names


@contextmanager
def _opened(images: Images) -> Generator[Source]:
    """The images as a source, which is closed after the block if it was opened here.

    Raises:
        UserError: there are none, or the data cannot be opened.
    """
    if isinstance(images, Source):
        yield images
    elif isinstance(images, str | Path) and not _is_image_file(images):
        with contextlib.closing(open_source(str(images), captions="optional")) as source:
            yield source
    else:
        yield ImageList([images] if isinstance(images, GivenImage) else images)


def _check_unreadable(given: str) -> None:
    if given not in get_args(Unreadable):
        raise UserError(f"unreadable={given!r}: 'raise' or 'nan' is expected")


def _is_image_file(path: str | Path) -> bool:
    return Path(path).suffix[1:].lower() in image_endings()


def _positions(source: Source, ids: Tensor) -> Tensor:
    """The positions in the source of samples by their ids."""
    by_id = {source.sample_id(position): position for position in range(len(source))}
    return torch.tensor([by_id[number] for number in ids.tolist()])


def _unreadable(damage: Sequence[Damage], images: int) -> UserError:
    shown = "".join(f"\n  {found.key}: {found.kind}: {found.detail}" for found in damage[:5])
    more = f"\n  and {len(damage) - 5} more" if len(damage) > 5 else ""
    return UserError(
        f"{len(damage)} of {quantity(images, 'image')} cannot be read{shown}{more}\n"
        "unreadable='nan' returns NaN for them"
    )
