"""Zero-shot classification with prompt templates, as CLIP (arXiv 2103.00020) and DataComp do it.

    class vector = normalise(mean over templates of normalise(text feature))

Several names can have one picture (Latin A and Greek Alpha). The labels of a picture are the
classes of all samples of the split whose pictures are pixel-identical to it; any of them is right.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from neuclip.errors import UserError
from neuclip.evaluation.embed import require_finite
from neuclip.evaluation.interfaces import (
    EncodedImages,
    EncodedSplit,
    ImageTextEncoder,
    ZeroShotResult,
    first_of_each,
)
from neuclip.evaluation.metrics import Choices, accuracy, mean_per_class_recall
from neuclip.evaluation.ranking import best_candidate, wrong_ahead
from neuclip.parallel.work_sharing import share_out


def class_vectors(
    encoder: ImageTextEncoder, classnames: list[str], templates: list[str], batch_size: int
) -> Float[Tensor, "classes dim"]:
    """One unit vector per class, from all its prompts; the processes share the classes out.

    Args:
        encoder: The towers.
        classnames: One name per class.
        templates: Prompts in which `{c}` stands for the name.
        batch_size: Prompts per forward pass (or the prompts of one class, if that is more).

    Raises:
        UserError: a vector is not finite.
    """
    at_once = max(1, batch_size // len(templates))
    groups = [classnames[i : i + at_once] for i in range(0, len(classnames), at_once)]

    def encode(pieces: range) -> list[Tensor]:
        mine = groups[pieces.start : pieces.stop]
        prompts = [[t.replace("{c}", name) for name in group for t in templates] for group in mine]
        vectors: list[Tensor] = []
        # Of ImageNet's 80,000 prompts the next are cut into tokens while the towers work on these.
        with ThreadPoolExecutor(1) as ahead, torch.no_grad():
            for tokens in ahead.map(encoder.tokenize, prompts):
                features = normalize(encoder.encode_text(tokens).float(), dim=-1)
                means = features.unflatten(0, (-1, len(templates))).mean(dim=1)
                vectors.append(normalize(means, dim=-1))
        return [torch.cat(vectors).cpu()] if vectors else []

    vectors = torch.cat(share_out(len(groups), encode)).to(encoder.device)
    return require_finite(vectors, "text", classnames)


def classify(
    encoded: EncodedSplit, vectors: Float[Tensor, "classes dim"], classnames: list[str]
) -> ZeroShotResult:
    """Accuracy of choosing the class vector nearest to each picture.

    The recall of a class counts the samples of that class, right when any label of their picture
    is chosen. Ties count against the model (see `ranking`).

    Raises:
        UserError: a sample has no class, or one that has no name.
    """
    classes = encoded.class_indices
    _check_classes(encoded, classnames)
    labels = torch.stack([encoded.image_groups, classes], dim=1).unique(dim=0)
    pictures = encoded.image_features[first_of_each(encoded.image_groups)]
    ahead = wrong_ahead(pictures, vectors.to(pictures.device), labels)[encoded.image_groups]
    labels_of_picture = torch.bincount(labels[:, 0])[encoded.image_groups].double()
    return ZeroShotResult(
        acc1=accuracy(ahead < 1),
        acc5=accuracy(ahead < 5) if len(classnames) >= 5 else None,
        mean_per_class_recall=mean_per_class_recall(ahead < 1, classes),
        num_classes=len(classnames),
        num_samples=len(encoded),
        chance=float(labels_of_picture.mean()) / len(classnames),
        right=ahead < 1,
    )


def choose_classes(
    encoded: EncodedImages, vectors: Float[Tensor, "classes dim"], classnames: list[str]
) -> Choices:
    """What the benchmarks count: one label for each sample, of equal scores the first class.

    Raises:
        UserError: a sample has no class, or one that has no name.
    """
    _check_classes(encoded, classnames)
    target = encoded.class_indices
    right = torch.stack([torch.arange(len(target)), target], dim=1)
    vectors = vectors.to(encoded.image_features.device)
    return Choices(
        ahead=wrong_ahead(encoded.image_features, vectors, right, ties="first"),
        chosen=best_candidate(encoded.image_features, vectors),
        target=target,
        num_classes=len(classnames),
    )


def _check_classes(encoded: EncodedImages, classnames: list[str]) -> None:
    classes = encoded.class_indices
    bad = ((classes < 0) | (classes >= len(classnames))).nonzero().flatten()
    if len(bad) == 0:
        return
    first = int(bad[0])
    value = int(classes[first])
    found = "has no class (.cls)" if value == -1 else f"has class {value}"
    raise UserError(
        f"sample {encoded.keys[first]!r} {found}, but the split has {len(classnames)} class names: "
        f"expected 0..{len(classnames) - 1} ({len(bad)} such samples of {len(encoded)})"
    )
