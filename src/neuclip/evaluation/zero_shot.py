"""Zero-shot classification with prompt templates, as CLIP (arXiv 2103.00020) and DataComp do it.

    class vector = normalise(mean over templates of normalise(text feature))

Two rules say which classes are right, and how equal scores count (see `ranking`):

- Own splits: two names can share one image (Latin A and Greek Alpha), so every class of any sample
  with a pixel-identical image is right. Ties count against the model.
- DataComp: the sample's own class alone is right. The first of equal scores is chosen.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from neuclip.errors import UserError
from neuclip.evaluation.embed import require_finite
from neuclip.evaluation.interfaces import (
    EncodedImages,
    EncodedSplit,
    EvaluationSettings,
    ImageTextEncoder,
    first_of_each,
)
from neuclip.evaluation.metrics import Choices, accuracies
from neuclip.evaluation.ranking import Scores, Ties, rank_by
from neuclip.parallel.work_sharing import share_out


@dataclass(frozen=True)
class Rules:
    """Which classes are right, and how equal scores count.

    Attributes:
        by_image: the classes of all samples with the same image are right, not the sample's alone.
        ties: the rule for equal scores.
    """

    by_image: bool
    ties: Ties


OWN_RULES = Rules(by_image=True, ties="against")
DATACOMP_RULES = Rules(by_image=False, ties="first")


class ClassVectors:
    """Computes class vectors; lists with equal names and templates are computed once.

    Args:
        encoder: the towers.
        settings: batch size and precision.
    """

    def __init__(self, encoder: ImageTextEncoder, settings: EvaluationSettings) -> None:
        self._encoder, self._settings = encoder, settings
        self._vectors: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    def __call__(self, classnames: list[str], templates: list[str]) -> Float[Tensor, "classes dim"]:
        """One unit vector per class; see `class_vectors`."""
        key = tuple(classnames), tuple(templates)
        if key not in self._vectors:
            with self._settings.autocast():
                self._vectors[key] = class_vectors(
                    self._encoder, classnames, templates, self._settings.batch_size
                )
        return self._vectors[key]


def class_vectors(
    encoder: ImageTextEncoder, classnames: list[str], templates: list[str], batch_size: int
) -> Float[Tensor, "classes dim"]:
    """One unit vector per class, from all its prompts; the ranks share the classes.

    Args:
        encoder: the towers.
        classnames: names of the classes.
        templates: prompts in which `{c}` stands for the name.
        batch_size: prompts per forward pass, at least those of one class.

    Raises:
        UserError: a vector is not finite.
    """
    at_once = max(1, batch_size // len(templates))
    groups = [classnames[i : i + at_once] for i in range(0, len(classnames), at_once)]

    def encode(pieces: range) -> list[Tensor]:
        mine = groups[pieces.start : pieces.stop]
        prompts = [[t.replace("{c}", name) for name in group for t in templates] for group in mine]
        vectors: list[Tensor] = []
        # The next prompts (of ImageNet's 80,000) are tokenized while the text tower runs.
        with ThreadPoolExecutor(1) as ahead, torch.no_grad():
            for tokens in ahead.map(encoder.tokenize, prompts):
                features = normalize(encoder.encode_text(tokens).float(), dim=-1)
                means = features.unflatten(0, (-1, len(templates))).mean(dim=1)
                vectors.append(normalize(means, dim=-1))
        return [torch.cat(vectors).cpu()] if vectors else []

    vectors = torch.cat(share_out(len(groups), encode)).to(encoder.device)
    return require_finite(vectors, "text", classnames)


def classify(
    encoded: EncodedImages | EncodedSplit,
    vectors: Float[Tensor, "classes dim"],
    classnames: list[str],
    rules: Rules,
) -> Choices:
    """Chooses the class vector nearest to each image; see `choose`."""
    vectors = vectors.to(encoded.image_features.device)
    return choose(encoded, lambda rows: rows @ vectors.T, classnames, rules)


def choose(
    encoded: EncodedImages | EncodedSplit, score: Scores, classnames: list[str], rules: Rules
) -> Choices:
    """Chooses the class with the best score for each image.

    Args:
        encoded: the images.
        score: the scores of all classes for some images' features.
        classnames: names of the classes.
        rules: which classes are right, and how ties count.

    Raises:
        UserError: a sample has no class, or a class without a name.
    """
    check_classes(encoded, classnames)
    target = encoded.class_indices
    image = encoded.image_groups if rules.by_image else torch.arange(len(target))
    labels = torch.stack([image, target], dim=1).unique(dim=0)
    features = encoded.image_features[first_of_each(image)]
    ranking = rank_by(features, score, len(classnames), labels, rules.ties)
    return Choices(
        ahead=ranking.ahead[image],
        chosen=ranking.best[image],
        target=target,
        num_right=torch.bincount(labels[:, 0])[image],
        num_classes=len(classnames),
    )


def zero_shot_metrics(choices: Choices) -> dict[str, float]:
    """Metrics of a split of one's own; `main_metric` is top-1 accuracy."""
    found = accuracies(choices)
    counts = {"num_classes": choices.num_classes, "num_samples": len(choices.target)}
    found |= {key: float(count) for key, count in counts.items()}
    return {**found, "chance": choices.chance, "main_metric": found["acc1"]}


def check_classes(encoded: EncodedImages | EncodedSplit, classnames: list[str]) -> None:
    """Checks that every sample is of a class that has a name.

    Raises:
        UserError: a sample has no class, or a class without a name.
    """
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
