"""The suspects: changed recipes, where a better normalizer may win or lose.

`predictions.md` has what was expected of each, written before it ran. They choose on the
development splits; no test split evaluates them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from studies.quality.cell import BATCH, Cell
from studies.quality.datasets import DATA_SETS, GLYPHS, DataSet
from studies.quality.recipes import (
    AUGMENTATION,
    BARE_NAMES,
    BOUNDED,
    LOWEST_TEMPERATURE,
    NAMED,
    RECIPES,
    Recipe,
    Section,
    Value,
    cell,
    lengthened,
    values,
)


@dataclass(frozen=True)
class Suspect:
    """A recipe with one change.

    Attributes:
        change: in words, for tables.
        recipe: with the change, if it is one of the recipe's own settings.
        label: distinguishes its cells from those of the recipe; empty: the recipe's note does.
        settings: of the method, changed.
        sections: settings of other sections, changed.
    """

    change: str
    recipe: Recipe
    label: str
    settings: Mapping[str, Value]
    sections: Mapping[str, Section]

    @property
    def method(self) -> str:
        """The method whose recipe it changes."""
        return self.recipe.method

    def cell(self, data: str, seed: int = 0, longer: int = 1) -> Cell:
        """The run on a data set, at batch 64.

        Args:
            data: name of the data set.
            seed: of the run.
            longer: factor on the passes of the data set.
        """
        found = cell(self.recipe, data, batch=BATCH, seed=seed)
        about = replace(DATA_SETS[data], passes=longer * DATA_SETS[data].passes)
        sections = {name: values(section, about) for name, section in self.sections.items()}
        changed_cell = replace(
            found,
            note="-".join(filter(None, (found.note, self.label))),
            method={**found.method, **values(self.settings, about)},
            sections=sections,
        )
        return lengthened(changed_cell, longer)


POOL = RECIPES["neuclip_pool"]
QUEUE = RECIPES["infonce_queue"]
FOLLOWING = RECIPES["rgcl_queue"]
SOFTER_BATCH = replace(RECIPES["rgcl_batch"], value=1.0)
MASK: Section = {"false_negatives": "mask"}
CONCEPTS: Section = {**MASK, "label_key": BARE_NAMES["data"]["caption_key"]}
MASKED_NAMES: Mapping[str, Section] = {**BARE_NAMES, "data": {**BARE_NAMES["data"], **MASK}}
TOKENS: Section = {"token_weight": 1.0}
CROPPED: Mapping[str, Section] = {
    **BARE_NAMES,
    "data": {**BARE_NAMES["data"], "aug_cfg": {"scale": AUGMENTATION["scale"]}},
}
"""The same, and crops of the images, whose colours stay."""
SETS: Mapping[str, Sequence[str]] = {
    "emoji": (
        "emojione", "emojione-monotone", "emojione-v1", "fluent-emoji", "fluent-emoji-flat",
        "fluent-emoji-high-contrast", "noto", "noto-v1", "twemoji",
    ),
}  # fmt: skip
"""The sets in `train`, where prompts name them."""


def _prompts_by_set(data: DataSet) -> str:
    return "::".join(f"{name}:{{c}}" for name in SETS.get(data.name, ())) or "{c}"


SET_NAMED: Mapping[str, Section] = {
    "data": {"caption_key": "name"},
    "evaluation": {"val_templates": _prompts_by_set},
}
"""Captions such as `noto:grinning-face`, and prompts of that form for all sets."""


def _suspect(
    change: str,
    label: str = "",
    recipe: Recipe = POOL,
    sections: Mapping[str, Section] | None = None,
    **settings: Value,
) -> Suspect:
    return Suspect(change, recipe, label, settings, sections or {})


def _rho(value: float | str) -> Recipe:
    return replace(POOL, value=value)


def _temperature(value: float) -> Recipe:
    return replace(POOL, key="temperature", value=value)


def _of_data(share: float) -> Callable[[DataSet], int]:
    """Embeddings: a share of the training pairs."""
    return lambda data: round(share * data.about)


def _steps(share: float) -> Callable[[DataSet], int]:
    """Steps: a share of the run."""
    return lambda data: round(share * data.passes * data.about / BATCH)


def _passes(share: float) -> Callable[[DataSet], float]:
    """Passes: a share of the run."""
    return lambda data: share * data.passes


def _union(
    batches: int, change: str = "", label: str = "", rho: float = 2.0, **settings: Value
) -> Suspect:
    """A union with a queue of some batches, whose embeddings weigh as much as the batch's own."""
    words = [f"union with a queue of {batches} batches, rho {rho:g}", change]
    labels = [f"union{batches}", label]
    return _suspect(
        "; ".join(filter(None, words)), "-".join(filter(None, labels)),
        _rho(rho), pool_size=batches * BATCH, gradient="union", gamma=1 / (batches + 1),
        gamma_schedule="final", **settings,
    )  # fmt: skip


RIVAL: Mapping[str, Value] = {"queue_alignment": "mean", "queue_positives": "anchor"}
"""What `rgcl_queue` has, for InfoNCE."""
ALONG = "the queue moves along, positives constant in its part"
AS_ON_GLYPHS = {"pool_size": 8192 / GLYPHS.about, "gradient_size": 2048 / GLYPHS.about}
"""The pool and the gradient's part of it, as shares of the glyphs, on which they were chosen."""

SUSPECTS = (
    # The effective number of negatives follows from rho: n_eff = m exp(-rho).
    _suspect("rho 5", recipe=_rho(5.0)),
    _suspect("rho 3.5", recipe=_rho(3.5)),
    _suspect("rho 2", recipe=_rho(2.0)),
    _suspect(
        "temperature by InfoNCE", "infonce", _temperature(0.07), name="pool_infonce_temperature"
    ),
    _suspect(
        "constant temperature 0.03", "constant", _temperature(0.03),
        name="pool_constant_temperature",
    ),
    _suspect(
        "temperature of 0.03 or more, captions name the concept alone", f"{BOUNDED}-{NAMED}",
        sections=BARE_NAMES, temperature_min=LOWEST_TEMPERATURE,
    ),
    _suspect("temperature of 0.05 or more", "bound0.05", temperature_min=0.05),
    _suspect("temperature of 0.07 or more", "bound0.07", temperature_min=0.07),
    _suspect(
        "temperature of 0.09 or more", "bound0.09", temperature=0.09, temperature_min=0.09,
    ),
    # Pairs that are no negatives.
    _suspect("equal concepts masked", "mask-concept", sections={"data": CONCEPTS}),
    _suspect("equal captions masked", "mask", sections={"data": MASK}),
    _suspect("GloFND 5e-4", "glofnd0.0005", glofnd_alpha=5e-4),
    _suspect("equal concepts masked", "mask-concept", RECIPES["openclip"], {"data": CONCEPTS}),
    _suspect("equal captions masked", "mask", RECIPES["openclip"], {"data": MASK}),
    _suspect("equal captions masked", "mask", RECIPES["rgcl_batch"], {"data": MASK}),
    # The weight of the batch estimate.
    _suspect("gamma 0.7", "gamma0.7", gamma=0.7),
    _suspect("gamma 0.2", "gamma0.2", gamma=0.2),
    _suspect("gamma falls over half of the run", "gamma-half", gamma_decay_epochs=_passes(0.5)),
    _suspect("gamma 0.4 once the pool is full", "gamma-constant", gamma_schedule="constant"),
    _suspect("gamma 0.4 from the first step", "gamma-final", gamma_schedule="final"),
    # The pool, and the part of it that carries the gradient.
    _suspect("pool of 32 batches", "pool32", pool_size=32 * BATCH),
    _suspect("pool of 64 batches", "pool64", pool_size=64 * BATCH),
    _suspect("gradient of 8 batches", "gradient8", gradient_size=8 * BATCH),
    _suspect("gradient of 128 batches", "gradient128", gradient_size=128 * BATCH),
    _suspect(
        "pool and gradient as shares of the data, as on glyphs", "glyph-shares",
        **{key: _of_data(share) for key, share in AS_ON_GLYPHS.items()},
    ),
    # Prototypes as further negatives.
    _suspect("union", "union", gradient="union"),
    _suspect(
        "union, rho 3.5, equal captions masked", "union-mask", _rho(3.5), {"data": MASK},
        gradient="union",
    ),
    _suspect(
        "union, temperature of 0.07 or more", "bound0.07-union", gradient="union",
        temperature_min=0.07,
    ),
    _union(4),
    _union(4, "positives constant in the queue's part", "balanced", name="pool_balanced"),
    _union(4, "the queue pushes the batch", "two-sided", name="pool_two_sided"),
    _union(4, ALONG, "aligned", name="pool_aligned"),
    _union(
        4, "the queue moves along and pushes the batch", "aligned-two-sided",
        name="pool_aligned_two_sided",
    ),
    _union(16, ALONG, "aligned", name="pool_aligned"),
    _union(16, ALONG, "aligned", 3.5, name="pool_aligned"),
    # Mixing by each anchor's variance; embeddings by momentum towers.
    _suspect("gamma by each anchor's variance", "variance-gamma", name="pool_variance_gamma"),
    _suspect("momentum towers fill the pool", "momentum0.995", name="pool_momentum"),
    # The words of the captions.
    _suspect("token weight 1", "tokens", sections={"supervision": TOKENS}),
    _suspect("token weight 1", "tokens", RECIPES["openclip"], {"supervision": TOKENS}),
    # The queue of InfoNCE, whose recipe collapses (added after its first run).
    _suspect("queue of 8 batches", "queue8", QUEUE, queue_size=8 * BATCH),
    _suspect("queue after half of the run", "queue-half", QUEUE, queue_warm_up=_steps(0.5)),
    _suspect(
        "the queue follows the batch, positives pull the anchor alone in its part", "aligned",
        QUEUE, **RIVAL,
    ),
    _suspect(
        "the same, queue of 4 batches", "queue4-aligned", QUEUE, queue_size=4 * BATCH, **RIVAL
    ),
    _suspect("rho 3.5", recipe=replace(FOLLOWING, value=3.5)),
    _suspect("deviations follow the batch, too", "moments", FOLLOWING, queue_alignment="moments"),
    _suspect("positives pull both embeddings", "pair", FOLLOWING, queue_positives="pair"),
    # The gradient through the pool.
    _suspect("positives constant in the pool's gradient", "balanced", name="pool_balanced"),
    _suspect("pool pushes the batch", "two-sided", name="pool_two_sided"),
    _suspect(
        "pool pushes the batch, batch in groups of 16, temperature of 0.07 or more",
        "bound0.07-two-sided-groups16", name="pool_two_sided_groups", temperature_min=0.07,
    ),
    # The number of negatives, at the same steps.
    _suspect("negatives in groups of 16", "groups16", RECIPES["rgcl_batch"], name="rgcl_groups"),
    _suspect("negatives in groups of 16, rho 1", "groups16", SOFTER_BATCH, name="rgcl_groups"),
    _suspect(
        "negatives in groups of 32", "groups32", RECIPES["rgcl_batch"], name="rgcl_groups",
        group_size=32,
    ),
    _suspect("batch in groups of 16", "groups16", name="pool_groups"),
    _suspect(
        "batch in groups of 16, temperature of 0.07 or more", "bound0.07-groups16",
        name="pool_groups", temperature_min=0.07,
    ),
    _suspect(
        "GloFND 1e-3, temperature of 0.07 or more", "bound0.07-glofnd0.001", glofnd_alpha=1e-3,
        temperature_min=0.07,
    ),
    # The data: what becomes of the lead where captions do not tell similar pictures apart.
    _suspect("captions name the concept alone", "names", sections=BARE_NAMES),
    _suspect("captions name the concept alone", "names", RECIPES["rgcl_batch"], BARE_NAMES),
    _suspect(
        "captions name the concept alone, equal captions masked", "names-mask",
        sections=MASKED_NAMES,
    ),
    _suspect(
        "temperature of 0.07 or more, equal concepts masked", "bound0.07-mask-concept",
        sections={"data": CONCEPTS}, temperature_min=0.07,
    ),
    _suspect(
        "temperature of 0.07 or more, captions name the concept alone, equal captions masked",
        "bound0.07-names-mask", sections=MASKED_NAMES, temperature_min=0.07,
    ),
    _suspect("captions name the concept alone, crops", "names-crops", sections=CROPPED),
    _suspect(
        "captions name the concept alone, crops", "names-crops", RECIPES["rgcl_batch"], CROPPED
    ),
    _suspect("captions name set and emoji", "set-names", sections=SET_NAMED),
    _suspect("captions name set and emoji", "set-names", RECIPES["rgcl_batch"], SET_NAMED),
    # What is expected to fail.
    _suspect(
        "constant temperature 0.07", "constant", _temperature(0.07),
        name="pool_constant_temperature",
    ),
    _suspect(
        "rho auto, measured in 50 steps", recipe=_rho("auto"),
        sections={"optim": {"warm_start_steps": 50}}, gamma_schedule="cosine",
    ),
)  # fmt: skip
"""In the order in which they run."""
