"""Small evaluation sets in the layouts that DataComp publishes, with answers known in advance.

A picture is one color (r, g, b): the towers below see 1.0 of number r, 0.6 of g and 0.3 of b. A
text with "number n" is number n. So every ranking can be read off the colors: r, g, b, and then
the rest in order. `write_suite` writes all 38 sets and says what each must score.
"""

import io
import json
import random
import tarfile
from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from neuclip.evaluation.datacomp.suite import load_suite

DIM = 64
WEIGHTS = (1.0, 0.6, 0.3)


class CodedTowers:
    """Reads the numbers off colors and texts."""

    def __init__(self):
        self.images_seen = self.texts_seen = 0
        self.device = torch.device("cpu")

    @property
    def transform(self):
        return _to_tensor

    @property
    def tokenize(self):
        return _tokenize

    def encode_image(self, images):
        self.images_seen += len(images)
        colors = (images[:, :, 0, 0] * 255).round().long()
        features = torch.zeros(len(images), DIM)
        for column, weight in enumerate(WEIGHTS):
            features[torch.arange(len(images)), colors[:, column]] += weight
        return normalize(features, dim=-1)

    def encode_text(self, tokens):
        self.texts_seen += len(tokens)
        return torch.eye(DIM)[tokens[:, 0]]


def _to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _tokenize(texts):
    numbers = [text.partition("umber ")[2].rstrip(".").split() or ["0"] for text in texts]
    return torch.tensor([[int(words[0])] for words in numbers])


def picture(color, format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, format=format, lossless=True)
    return buffer.getvalue()


def write_set(folder, samples, *, shards=2, **texts):
    """Writes samples, dicts of members by extension, and text files by name."""
    (folder / "test").mkdir(parents=True)
    shards = min(shards, len(samples))
    for shard in range(shards):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard, len(samples), shards):
                for extension, content in samples[number].items():
                    member = tarfile.TarInfo(f"s{number:07}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "test" / "nshards.txt").write_text(str(shards))
    for name, lines in texts.items():
        suffix = "jsonl" if name == "instances" else "txt"
        (folder / f"{name}.{suffix}").write_text("\n".join(lines) + "\n")
    return folder


def prompts(classes):
    return {
        "classnames": [f"number {n}" for n in range(classes)],
        "zeroshot_classification_templates": ["a photo of {c}.", "{c}"],
    }


def write_classification(folder, rows, classes):
    """Rows of (color, label, metadata or none)."""
    extensions = ("png", "webp", "jpg", "jpeg")
    samples = []
    for number, (color, label, metadata) in enumerate(rows):
        extension = extensions[number % 4]
        content = picture(color, "WEBP" if extension == "webp" else "PNG")
        sample = {extension: content, "cls": str(label).encode()}
        if metadata is not None:
            buffer = io.BytesIO()
            np.save(buffer, np.array(metadata))
            sample["npy"] = buffer.getvalue()
        samples.append(sample)
    return write_set(folder, samples, **prompts(classes))


def ranking(color, classes):
    """All classes, best first."""
    scores = [sum(w for w, c in zip(WEIGHTS, color, strict=True) if c == n) for n in range(classes)]
    return sorted(range(classes), key=lambda n: (-scores[n], n))


def mean(values):
    return float(sum(map(Fraction, values), Fraction(0)) / len(values))


def classification_answer(rows, classes, groups=None, metric="acc1"):
    """What the formulas give, by loops over samples and classes."""
    ranked = [ranking(color, classes) for color, _, _ in rows]
    labels = [label for _, label, _ in rows]
    top1 = [int(r[0] == y) for r, y in zip(ranked, labels, strict=True)]
    top5 = [int(y in r[:5]) for r, y in zip(ranked, labels, strict=True)]
    recalls, f1s = [], []
    for c in sorted(set(labels)):
        hit = sum(r[0] == c == y for r, y in zip(ranked, labels, strict=True))
        chosen, occurs = sum(r[0] == c for r in ranked), labels.count(c)
        recalls.append(Fraction(hit, occurs))
        precision, recall = Fraction(hit, chosen or 1), Fraction(hit, occurs)
        f1s.append(2 * precision * recall / (precision + recall) if hit else Fraction(0))
    answer = {"acc1": mean(top1), "mean_per_class_recall": mean(recalls)}
    answer |= {"acc5": mean(top5)} if classes >= 5 else {}
    if metric == "F1-macro_all":
        answer |= {"F1-macro_all": mean(f1s), "recall-macro_all": mean(recalls)}
    if groups is not None:
        right = top5 if groups.measure == "acc_top5" else top1
        by_group = {}
        for (_, _, metadata), hit in zip(rows, right, strict=True):
            by_group.setdefault(int(metadata[groups.column]), []).append(hit)
        answer[metric] = min(mean(hits) for hits in by_group.values())
    return answer


def write_retrieval(folder, rows):
    """Rows of (color, caption numbers)."""
    samples = [
        {"png": picture(color), "txt": "\n".join(f"number {n}" for n in numbers).encode()}
        for color, numbers in rows
    ]
    return write_set(folder, samples, dataset_type=["retrieval"])


def retrieval_answer(rows):
    captions = [(number, i) for i, (_, numbers) in enumerate(rows) for number in numbers]
    # As read from the shards: image 0, 2, 4, ... and then 1, 3, 5, ...
    order = [i for shard in range(2) for i in range(shard, len(rows), 2)]
    captions.sort(key=lambda caption: order.index(caption[1]))

    def score(picture, number):
        color = rows[picture][0]
        weights = [
            sum(w for w, c in zip(WEIGHTS, color, strict=True) if c == n) for n in range(256)
        ]
        return weights[number] / sum(w * w for w in weights) ** 0.5

    def recall(k, queries, candidates, right, value):
        hits = []
        for q in queries:
            # Rounded: equal scores come out of the towers bit for bit equal.
            best = sorted(candidates, key=lambda c: -round(value(q, c), 6))[:k]
            hits.append(int(any(right(q, c) for c in best)))
        return mean(hits)

    text = recall(1, order, captions, lambda i, c: c[1] == i, lambda i, c: score(i, c[0]))
    image = recall(1, captions, order, lambda c, i: c[1] == i, lambda c, i: score(i, c[0]))
    return {
        "text_retrieval_recall@1": text,
        "image_retrieval_recall@1": image,
        "mean_recall@1": (text + image) / 2,
    }


def write_association(folder, colors, instances):
    """Instances of (cue number, candidates, associations), images by their place in `colors`."""
    lines = [
        json.dumps(
            {
                "cue": f"Number {cue}",
                "candidates": [f"s{n:07}" for n in candidates],
                "associations": [f"s{n:07}" for n in right],
            }
        )
        for cue, candidates, right in instances
    ]
    samples = [{"png": picture(color)} for color in colors]
    return write_set(folder, samples, dataset_type=["association"], instances=lines)


def association_answer(colors, instances):
    scores = []
    for cue, candidates, right in instances:

        def score(n, cue=cue):
            weights = {}
            for weight, number in zip(WEIGHTS, colors[n], strict=True):
                weights[number] = weights.get(number, 0) + weight
            return round(weights.get(cue, 0) / sum(w * w for w in weights.values()) ** 0.5, 6)

        chosen = sorted(candidates, key=lambda n: -score(n))[: len(right)]
        both = len(set(chosen) & set(right))
        scores.append((len(candidates), Fraction(both, len({*chosen, *right}))))
    return {
        "avg_jaccard_score": mean([s for _, s in scores]),
        "jaccard_score_5-6": mean([s for n, s in scores if n <= 6]),
        "jaccard_score_10-12": mean([s for n, s in scores if n >= 10]),
    }


def write_suite(data_dir, seed=0, keys=()):
    """Writes a set for every task, or for some; returns what each must score, by key."""
    rng = random.Random(seed)
    answers = {}
    for task in load_suite().select(keys):
        folder = data_dir / task.folder
        if task.kind == "retrieval":
            rows = [
                (tuple(rng.sample(range(12), 3)), rng.sample(range(12), rng.randint(1, 4)))
                for _ in range(6)
            ]
            write_retrieval(folder, rows)
            answers[task.key] = retrieval_answer(rows)
        elif task.kind == "association":
            colors = [tuple(rng.sample(range(8), 3)) for _ in range(14)]
            instances = []
            for size in (5, 6, 10, 10, 12, 12):
                candidates = rng.sample(range(14), size)
                right = rng.sample(candidates, rng.randint(1, 3))
                instances.append((rng.randrange(8), candidates, right))
            write_association(folder, colors, instances)
            answers[task.key] = association_answer(colors, instances)
        else:
            classes = rng.choice([2, 3, 6, 9])
            rows = []
            for _ in range(14):
                label = rng.randrange(classes)
                color = rng.sample(range(max(classes, 3)), 3)
                if rng.random() < 0.4:
                    color[0] = label
                # The last class never occurs, the group 5 (`Other` of FMoW) does.
                metadata = [rng.choice([0, 1, 5]), rng.randrange(9)]
                has = task.groups is not None or task.key.startswith("wilds/")
                rows.append(
                    (tuple(color), min(label, max(1, classes - 2)), metadata if has else None)
                )
            write_classification(folder, rows, classes)
            answers[task.key] = classification_answer(rows, classes, task.groups, task.metric)
    return answers


def write_imagenet(folder, numbered=False):
    """An image for each of 1000 classes, in folders as ImageNet's or ImageNet v2's."""
    content = picture((1, 2, 3))
    for number in range(1000):
        place = folder / (str(number) if numbered else f"n{10000000 + 7 * number}")
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(content)
    return folder
