"""Chooses the concepts that no training pair shows, and the pictures to evaluate them with."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from neuclip.data.icons.pair_folder import chance
from neuclip.data.outlines import Outlines, nearest


def held_out_concepts(
    words: Mapping[str, Collection[str]],
    candidates: Collection[str],
    count: int,
    *,
    least_uses: int,
    seed: int,
) -> list[str]:
    """Concepts to hold out, each of words that training still shows in other concepts.

    Args:
        words: the words of every concept in training.
        candidates: concepts that may be held out.
        count: number of concepts wanted.
        least_uses: number of concepts with a word that must remain in training, for each word.
        seed: decides the choice.
    """
    uses = Counter(word for each in words.values() for word in set(each))
    order = sorted(candidates)
    chance(seed, "held out").shuffle(order)
    chosen: list[str] = []
    for concept in order:
        own = set(words[concept])
        if all(uses[word] - 1 >= least_uses for word in own):
            chosen.append(concept)
            uses.subtract(own)
        if len(chosen) == count:
            break
    return chosen


def few_of_each(
    members: Sequence[int],
    concept: Callable[[int], str],
    style: Callable[[int], str],
    *,
    least: int,
    most: int,
) -> list[int]:
    """A few pictures of each concept, in as many styles as there are.

    Args:
        members: positions of pictures, those to be taken first.
        concept: of a picture.
        style: of a picture, such as its set.
        least: a concept with fewer pictures is left out.
        most: number of pictures of a concept.

    Returns:
        Positions in ascending order.
    """
    by_concept: dict[str, list[int]] = defaultdict(list)
    for member in members:
        by_concept[concept(member)].append(member)
    kept: list[int] = []
    for own in by_concept.values():
        if len(own) < least:
            continue
        seen: Counter[str] = Counter()
        ranked: list[tuple[int, int, int]] = []
        for number, member in enumerate(own):
            ranked.append((seen[style(member)], number, member))
            seen[style(member)] += 1
        kept += [member for _, _, member in sorted(ranked)[:most]]
    return sorted(kept)


def unlike(
    members: Sequence[int], train: Sequence[int], outlines: Outlines, limit: float
) -> list[int]:
    """The pictures that resemble no training picture.

    Args:
        members: positions of pictures.
        train: positions of the training pictures.
        outlines: of all pictures.
        limit: correlation of outlines from which two pictures count as one.
    """
    best, _ = nearest(outlines[list(members)], outlines[list(train)])
    return [member for member, value in zip(members, best, strict=True) if value < limit]
