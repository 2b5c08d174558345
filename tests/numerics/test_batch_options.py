"""Groups, pair weights and hard negatives: every method against double loops, in float64."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from naive_options import (
    Memory,
    QueueForm,
    Step,
    Values,
    averages,
    constant,
    expand,
    fastclip_rate,
    learned_bounds,
    log_partitions,
    log_plus,
    mean_over_both,
    moco_method,
    openclip,
    over_batch,
    pool_method,
    predicted,
    queue_bounds,
    queue_method,
    remember,
    scent_rate,
    siglip,
    table_method,
)
from naive_reference import pairs
from torch import Tensor

from momentum_keys import keys_for
from neuclip.catalogue.registry import METHODS
from neuclip.errors import UserError
from neuclip.method.choices import BATCH_OPTIONS
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.method.softmax import blocks, exclusion
from small_memory import small_memory

EPSILON, RHO, POOL = 1e-3, 3.0, 7
COUNT = 6
STAR = [[5, 9], [5, 0], [5, 0], [0, 9], [0, 9], [0, 9]]
"""The first pair shares a group with every other: it has no negative."""
GROUPS = [STAR, [[1, 1]] * COUNT, [[1, 2], [1, 1], [0, 0], [0, 0], [3, 2], [0, 4]]]
GROUPS += [[[2, 1], [2, 4], [5, 5], [0, 1], [0, 0], [3, 0]]]
WEIGHTS = [0.0, 1.0, 2.5, 0.3, 1.0, 4.0]

OPTIONS = {
    "groups": frozenset({"groups"}),
    "all": frozenset({"groups", "weights", "hard"}),
    "no groups": frozenset({"weights", "hard"}),
}
GLOFND = {"glofnd_alpha": 0.3, "glofnd_start": 0.5, "glofnd_lr": 0.6}
"""From the second step on; at this rate thresholds fall among the similarities at once."""
VARIANTS = {name: (name, {}) for name in METHODS} | {
    "scent_drrho": ("scent", {"objective_scale": "drrho"}),
    "pool_newest": ("neuclip_pool", {"gradient_size": 3}),
    "openclip_glofnd": ("openclip", GLOFND),
    "fastclip_v3_glofnd": ("fastclip_v3", GLOFND),
    "isogclr_glofnd": ("isogclr", GLOFND),
    "scent_drrho_glofnd": ("scent", {"objective_scale": "drrho", **GLOFND}),
    "queue_glofnd": ("infonce_queue", {"queue_size": 30, **GLOFND}),
    "pool_newest_glofnd": ("neuclip_pool", {"gradient_size": 3, **GLOFND}),
    "queue_at_once": ("infonce_queue", {"queue_warm_up": 0, "queue_size": 30}),
    "queue_aligned": (
        "infonce_queue",
        {"queue_size": 30, "queue_alignment": "moments", "queue_positives": "anchor"},
    ),
    "rgcl_queue_none": ("rgcl_queue", {"queue_alignment": "none", "queue_positives": "pair"}),
    "rgcl_queue_moments": ("rgcl_queue", {"queue_size": 30, "queue_alignment": "moments"}),
    "rgcl_queue_drrho": ("rgcl_queue", {"objective_scale": "drrho"}),
    "rgcl_queue_glofnd": ("rgcl_queue", {"queue_size": 30, **GLOFND}),
    "moco_partly_filled": ("moco", {"queue_size": 30}),
}


def batch(number: int, options: frozenset[str]) -> Step:
    """The batch of a step; ids come again from step to step."""
    features = pairs(COUNT, seed=number, noise=0.7).requires_grad_()
    hard = None
    if "hard" in options:
        hard = pairs(COUNT, seed=100 + number)[1]
        hard[[1, 4]] = 0
        hard.requires_grad_()
    return Step(
        features,
        torch.tensor(9.0, dtype=torch.float64, requires_grad=True),
        torch.tensor(-4.0, dtype=torch.float64, requires_grad=True),
        [(number * 2 + i) % 9 for i in range(COUNT)],
        GROUPS[number] if "groups" in options else None,
        WEIGHTS if "weights" in options else None,
        hard,
    )


def call(loss: PairLoss, step: Step) -> Tensor:
    given = {
        "groups": None if step.groups is None else torch.tensor(step.groups),
        "pair_weights": None
        if step.weights is None
        else torch.tensor(step.weights, dtype=torch.float64),
        "negative_features": step.hard,
    }
    given = {name: value for name, value in given.items() if value is not None}
    given |= keys_for(loss, step.features)
    ids = torch.tensor(step.ids)
    image, text = step.features
    return loss(image, text, step.scale, step.bias, sample_ids=ids, **given)


def grads(value: Tensor, step: Step) -> list[Tensor]:
    leaves = [step.features, step.scale, step.bias]
    leaves += [] if step.hard is None else [step.hard]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, found, strict=True)
    ]


class Reference:
    """The naive method; reads trained state (prototypes, networks, temperatures) off the loss."""

    def __init__(self, name: str, loss: PairLoss, settings: dict) -> None:
        self.name, self.loss, self.settings = name, loss, settings
        self.memory = Memory()
        self.number = 0
        self.temperature: Tensor | None = None
        self.target: Tensor | None = None

    def before(self, step: Step) -> None:
        """Reads what the loss of the batch is computed with, before it changes."""
        if hasattr(self.loss, "temperature"):
            self.temperature = self.loss.temperature.read(torch.tensor(step.ids)).double()

    def bounded(self, step: Step) -> Step:
        """The step with its anchors' thresholds, if the method has any yet."""
        alpha, number = self.settings.get("glofnd_alpha"), self.number
        self.number += 1
        if alpha is None or number < 1:
            return step
        if "glofnd_lr" in self.settings:
            bounds = learned_bounds(step, self.memory, number, alpha, self.settings["glofnd_lr"])
        else:
            alignment = self.settings.get("queue_alignment", "none")
            bounds = queue_bounds(step, self.memory, alpha, alignment)
        return dataclasses.replace(step, bounds=bounds)

    def __call__(self, step: Step) -> Tensor:
        step = self.bounded(step)
        if self.name in {"openclip", "siglip"}:
            return {"openclip": openclip, "siglip": siglip}[self.name](step)
        if self.name == "infonce_queue":
            return queue_method(step, self.memory, self.queue, self.settings["queue_warm_up"])
        if self.name == "moco":
            keys = keys_for(self.loss, step.features)["key_features"]
            return moco_method(step, keys, self.memory, self.settings["queue_size"])
        if self.name == "amorlip":
            return self.amorlip(step)
        if self.temperature is not None:
            return self.individual(step)
        tau = 1 / step.scale
        if self.name == "neuclip":
            return tau * self.neuclip(step) + RHO * tau
        if self.name == "rgcl_queue":
            return self.rgcl_queue(step)
        if self.name == "neuclip_pool":
            gamma = self.loss.normalizer.gamma.at(self.memory.step, -(-POOL // COUNT))
            newest = self.settings["gradient_size"] or POOL
            return tau * pool_method(step, self.memory, gamma, POOL, newest, EPSILON) + RHO * tau
        return self.table(step)

    @property
    def queue(self) -> QueueForm:
        settings = self.settings
        return QueueForm(
            settings["queue_size"], settings["queue_alignment"], settings["queue_positives"]
        )

    def rgcl_queue(self, step: Step) -> Tensor:
        drrho = self.settings.get("objective_scale") == "drrho"

        def value(step: Step) -> Tensor:
            return mean_over_both(step, self.memory, self.queue, EPSILON, over_batch=drrho)

        mean = both_sides(value, step) if drrho else value(step)
        remember(step, self.memory, self.queue.size)
        return mean / step.scale + RHO / step.scale

    def rate(self):
        if self.name == "scent":
            return scent_rate(1.5, EPSILON)
        if self.name in {"sogclr", "isogclr"}:
            return lambda _: 0.4
        gamma = 1.0 if self.name == "rgcl_batch" else fastclip_rate(self.memory.step)
        return lambda _: gamma

    def table(self, step: Step) -> Tensor:
        if self.settings.get("objective_scale") == "drrho":
            return self.drrho(step)
        constant_temperature = self.name in {"sogclr", "fastclip_v1"}
        if constant_temperature:
            step = dataclasses.replace(step, scale=step.scale.detach())
        if self.name == "rgcl_batch":
            self.memory.table.clear()
        value = table_method(step, self.memory, self.rate(), EPSILON)
        if self.name in {"fastclip_v0", "fastclip_v1"}:
            return value
        rho = 0 if self.name == "sogclr" else RHO
        return value / step.scale + rho / step.scale

    def drrho(self, step: Step) -> Tensor:
        """Embeddings get the gradient of both sides; the temperature half of that through g."""

        def value(step: Step, memory: Memory) -> Tensor:
            inners = step.inners(expand(step.scale, step))
            fresh = over_batch(step, inners)
            alpha = log_plus(averages(step, fresh, memory, self.rate()), EPSILON)
            return step.mean(step.surrogate(inners, alpha, EPSILON))

        twins = iter([Memory(dict(self.memory.table), step=self.memory.step), self.memory])
        return both_sides(lambda step: value(step, next(twins)), step) / step.scale + (
            RHO / step.scale
        )

    def individual(self, step: Step) -> Tensor:
        assert self.temperature is not None
        inners = step.inners(1 / self.temperature)
        alpha = log_plus(averages(step, inners, self.memory, self.rate()), EPSILON)
        terms = step.surrogate(inners, alpha, EPSILON)
        if self.name == "isogclr":
            tau = self.temperature
            terms = [
                [None if t is None else t * tau[s, i] for i, t in enumerate(side)]
                for s, side in enumerate(terms)
            ]
        return step.mean(terms)

    def neuclip(self, step: Step) -> Tensor:
        prototypes = list(self.loss.normalizer.prototypes.detach().unbind(1))
        gamma = fastclip_rate(self.memory.step)
        self.memory.step += 1
        inners = step.inners(expand(step.scale, step))
        found = predicted(step, prototypes, lambda i, k: True, None)
        mixed: Values = [
            [
                None if g is None else ((1 - gamma) * found[s][i] + gamma * g).detach()
                for i, g in enumerate(side)
            ]
            for s, side in enumerate(inners)
        ]
        return step.mean(step.surrogate(inners, log_plus(mixed, EPSILON), EPSILON))

    def amorlip(self, step: Step) -> Tensor:
        partitions = log_partitions(step, 0.05)
        assert self.target is not None
        terms = [
            [
                None
                if z is None
                else torch.exp(z - self.target[s, i]) - step.positive(i) * step.scale
                for i, z in enumerate(side)
            ]
            for s, side in enumerate(partitions)
        ]
        return 2 * step.mean(terms) / step.scale.detach() + 0.5 / step.scale


def both_sides(value: Callable[[Step], Tensor], step: Step) -> Tensor:
    """The value with twice its gradient by the embeddings, and once that by the scale."""
    by_features = value(dataclasses.replace(step, scale=step.scale.detach()))
    hard = None if step.hard is None else step.hard.detach()
    by_scale = value(dataclasses.replace(step, features=step.features.detach(), hard=hard))
    return 2 * by_features - by_features.detach() + by_scale - by_scale.detach()


def settings_of(name: str, more: dict) -> dict:
    fields = METHODS[name].settings.model_fields
    wanted = {
        "epsilon": EPSILON,
        "rho": RHO,
        "temperature_gradient": "exact",
        "rate_offset": 1.5,
        **small_memory(name, POOL),
    }
    if name in {"infonce_queue", "rgcl_queue"}:
        defaults = METHODS[name].settings.model_fields
        keys = ("queue_alignment", "queue_positives")
        wanted |= {key: defaults[key].default for key in keys}
    if name in {"sogclr", "isogclr"}:
        wanted["gamma"] = 0.4
    if name == "neuclip_pool":
        wanted |= {"gamma_schedule": "constant", "gradient_size": None}
    if name == "amorlip":
        wanted = {"rho": 0.5, "positive_weight": 0.05, "late_rho": 0.5, "inner_steps": 1}
    return {key: value for key, value in (wanted | more).items() if key in fields}


def watch_target(loss: PairLoss, reference: Reference) -> None:
    """Remembers the log-targets that AmorLIP's networks return to the loss."""
    estimate = loss.normalizer.estimate

    def watched(anchors, log_partition):
        reference.target = estimate(anchors, log_partition)
        return reference.target

    loss.normalizer.estimate = watched


WITHOUT_GROUPS = ("openclip", "siglip", "isogclr", "fastclip_v3", "neuclip_pool", "infonce_queue")
WITHOUT_GROUPS += ("rgcl_queue", "rgcl_queue_none", "rgcl_queue_moments", "queue_aligned")
WITHOUT_GROUPS += ("moco", "moco_partly_filled")
CASES = [
    (v, o)
    for v in VARIANTS
    for o in OPTIONS
    if o != "no groups" or v in WITHOUT_GROUPS or v.endswith("glofnd")
]


@pytest.mark.parametrize(("variant", "options"), CASES)
def test_losses_and_gradients_equal_the_double_loop(build, variant, options, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", 2 * COUNT)
    monkeypatch.setattr(exclusion, "AT_ONCE", 2 * COUNT)
    name, more = VARIANTS[variant]
    settings = settings_of(name, more)
    loss = build(name, **settings)
    reference = Reference(name, loss, settings)
    if name == "amorlip":
        watch_target(loss, reference)
    for number in range(len(GROUPS)):
        step = batch(number, OPTIONS[options])
        reference.before(step)
        value = call(loss, step)
        expected = reference(step)
        torch.testing.assert_close(value.detach(), expected.detach())
        for found, wanted in zip(grads(value, step), grads(expected, step), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-7)
        assert all(torch.isfinite(torch.tensor(v)) for v in loss.metrics().values())


@pytest.mark.parametrize("name", METHODS)
def test_groups_of_zeros_and_equal_weights_change_nothing(build, name):
    """Only a pool that leaves out an anchor's own pair divides by another number then."""
    one, other = build(name), build(name)
    for number in range(2):
        step = batch(number, frozenset())
        step = dataclasses.replace(step, ids=list(range(number * COUNT, (number + 1) * COUNT)))
        given = dataclasses.replace(step, groups=[[0, 0, 0]] * COUNT, weights=[0.7] * COUNT)
        torch.testing.assert_close(call(one, step), call(other, given))


@pytest.mark.parametrize("name", ["isogclr", "fastclip_v2"])
def test_an_anchor_without_a_negative_keeps_its_temperature(build, name):
    loss = build(name, temperature=0.03)
    step = dataclasses.replace(batch(0, OPTIONS["groups"]), ids=list(range(COUNT)))
    call(loss, step)
    table = loss.temperature.table.values
    untouched = build(name, temperature=0.03).temperature.table.values
    assert torch.equal(table[:, 0], untouched[:, 0])
    assert (table[:2, 1:COUNT] != untouched[:2, 1:COUNT]).all()


def test_amorlip_fits_its_networks_to_anchors_with_a_negative(build):
    """Other partition functions of an anchor without one leave the networks as they are."""
    states = []
    for shift in (0.0, 5.0):
        loss = build("amorlip", fit_previous=False)
        estimate = loss.normalizer.estimate

        def shifted(anchors, log_partition, estimate=estimate, shift=shift):
            moved = log_partition.clone()
            moved[:, 0] += shift
            return estimate(anchors, moved)

        loss.normalizer.estimate = shifted
        call(loss, batch(0, OPTIONS["groups"]))
        states.append(loss.normalizer.network.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


def test_prototypes_are_trained_on_anchors_with_a_negative(build):
    """One step by plain gradient descent, against autograd through the double loop."""
    settings = {"prototype_optimizer": "sgd", "prototype_lr": 0.5, "epsilon": EPSILON}
    start = build("neuclip", **settings, inner_steps=0)
    step = batch(0, OPTIONS["groups"])
    call(start, step)
    prototypes = start.normalizer.prototypes.clone().requires_grad_()
    inners = constant(step.inners(expand(step.scale, step)))
    alpha = log_plus(predicted(step, list(prototypes.unbind(1)), lambda i, k: True, None), EPSILON)
    terms = step.surrogate(inners, alpha, EPSILON)
    objective = 2 * step.mean(terms) / step.scale.detach()
    (grad,) = torch.autograd.grad(objective, prototypes)
    trained = build("neuclip", **settings, inner_steps=1)
    call(trained, step)
    torch.testing.assert_close(trained.normalizer.prototypes, prototypes.detach() - 0.5 * grad)


def test_a_pair_of_weight_zero_stays_a_negative(build):
    step = dataclasses.replace(batch(2, frozenset()), weights=[0.0, 1, 1, 1, 1, 1])
    (grad, *_) = grads(call(build("openclip"), step), step)
    assert (grad[:, 0] != 0).any()


def test_hard_negatives_give_the_cross_entropy_of_negclip(build):
    """B more columns for the images alone, where every pair has a hard negative."""
    features, hard = pairs(COUNT), pairs(COUNT, seed=3)[1]
    scale = torch.tensor(20.0, dtype=torch.float64)
    labels = torch.arange(COUNT)
    image, text = features
    wide = scale * image @ torch.cat([text, hard]).T
    expected = (
        torch.nn.functional.cross_entropy(wide, labels)
        + torch.nn.functional.cross_entropy(scale * text @ image.T, labels)
    ) / 2
    loss = build("openclip")
    torch.testing.assert_close(loss(image, text, scale, negative_features=hard), expected)


@pytest.mark.parametrize("groups", [None, STAR])
def test_no_batch_needs_a_hard_negative(build, groups):
    step = dataclasses.replace(batch(0, frozenset()), groups=groups)
    expected = call(build("rgcl_batch"), step)
    given = dataclasses.replace(step, hard=torch.zeros(COUNT, 8, dtype=torch.float64))
    torch.testing.assert_close(call(build("rgcl_batch"), given), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"groups": torch.zeros(5, dtype=torch.int64)}, r"groups \[5\] of torch.int64: expected"),
        ({"groups": torch.zeros(6)}, r"groups \[6\] of torch.float32: expected \[6\]"),
        ({"pair_weights": torch.ones(6, dtype=torch.int64)}, r"of torch.int64: expected \[6\]"),
        ({"pair_weights": torch.tensor([1, 1, -2.0, 1, 1, 1])}, "row 2 has -2; weights must be 0"),
        ({"pair_weights": torch.full((6,), torch.nan)}, "row 0 has nan"),
        (
            {"negative_features": torch.zeros(5, 8)},
            r"negative_features \[5, 8\]: expected \[6",
        ),
        ({"negative_features": torch.ones(6, 8)}, "negative_features: row 0 has norm 2.828"),
    ],
)
def test_bad_input(build, given, message):
    step = batch(0, frozenset())
    with pytest.raises(UserError, match=message):
        build("openclip")(*step.features, step.scale, **given)


def test_a_loss_refuses_what_its_method_does_not_take(build):
    loss = build("openclip")
    assert loss.takes == BATCH_OPTIONS
    loss.takes = frozenset()
    with pytest.raises(UserError, match="does not take groups"):
        loss(*pairs(4), 9.0, groups=torch.zeros(4, dtype=torch.int64))


def test_a_pool_with_groups_resumes_bit_for_bit_and_takes_states_without(build):
    def steps(loss, numbers):
        return [call(loss, batch(number, OPTIONS["all"])).detach() for number in numbers]

    whole = build("neuclip_pool")
    steps(whole, (2, 3))
    resumed = build("neuclip_pool")
    resumed.load_state_dict(whole.state_dict())
    older = {k: v for k, v in whole.state_dict().items() if k != "normalizer.ring.groups"}
    assert torch.equal(torch.stack(steps(resumed, (1, 2))), torch.stack(steps(whole, (1, 2))))
    resumed.load_state_dict(older)
    assert resumed.normalizer.ring.groups is None
    steps(resumed, (2,))
    assert resumed.normalizer.ring.groups.tolist()[0].count(0) >= 1


def test_a_pool_refuses_another_number_of_columns(build):
    loss = build("neuclip_pool")
    call(loss, batch(0, OPTIONS["groups"]))
    call(loss, batch(1, OPTIONS["groups"]))
    with pytest.raises(UserError, match="groups have 1 columns; the pool has 2"):
        call(loss, dataclasses.replace(batch(2, frozenset()), groups=[[1]] * COUNT))
