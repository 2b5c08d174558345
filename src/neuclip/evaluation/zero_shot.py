"""Zero-shot classification with prompt templates, as CLIP (arXiv 2103.00020) and DataComp do it.

    class vector = normalise(mean over templates of normalise(text feature))

Several names can have one picture (Latin A and Greek Alpha). The labels of a picture are the
classes of all samples of the split whose pictures are pixel-identical to it; any of them is right.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from neuclip.errors import UserError
from neuclip.evaluation.interfaces import (
    EncodedSplit,
    ImageTextEncoder,
    ZeroShotResult,
    first_of_each,
)
from neuclip.evaluation.ranking import wrong_ahead


def class_vectors(
    encoder: ImageTextEncoder, classnames: list[str], templates: list[str], batch_size: int
) -> Float[Tensor, "classes dim"]:
    """One unit vector per class, from all its prompts.

    Args:
        encoder: The towers.
        classnames: One name per class.
        templates: Prompts in which `{c}` stands for the name.
        batch_size: Prompts per forward pass (or the prompts of one class, if that is more).
    """
    at_once = max(1, batch_size // len(templates))
    vectors: list[Tensor] = []
    for start in range(0, len(classnames), at_once):
        names = classnames[start : start + at_once]
        prompts = [template.replace("{c}", name) for name in names for template in templates]
        with torch.no_grad():
            features = normalize(encoder.encode_text(encoder.tokenize(prompts)).float(), dim=-1)
        means = features.view(len(names), len(templates), -1).mean(dim=1)
        vectors.append(normalize(means, dim=-1))
    return torch.cat(vectors)


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
    right = (ahead < 1).double()
    labels_of_picture = torch.bincount(labels[:, 0])[encoded.image_groups].double()
    per_class = torch.zeros(len(classnames), dtype=torch.double).index_add_(0, classes, right)
    samples_of_class = torch.bincount(classes, minlength=len(classnames))
    occurs = samples_of_class > 0
    return ZeroShotResult(
        acc1=float(right.mean()),
        acc5=float((ahead < 5).double().mean()) if len(classnames) >= 5 else None,
        mean_per_class_recall=float((per_class[occurs] / samples_of_class[occurs]).mean()),
        num_classes=len(classnames),
        num_samples=len(encoded),
        chance=float(labels_of_picture.mean()) / len(classnames),
    )


def _check_classes(encoded: EncodedSplit, classnames: list[str]) -> None:
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
