"""Every optimiser of timm's factory: exact resume, skipped steps, and what each refuses."""

import copy
import io
import math

import pytest
import timm.optim
import timm.optim.kron
import torch
from torch import nn

from neuclip.config.optimizer_section import OptimConfig
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError
from neuclip.training.optim import Optimizer
from neuclip.training.optimizer_kind import OptimizerKind

pytestmark = pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
REFUSED = {"adahessian"}
"""Optimisers that cannot train here, with every package installed."""
FACTORY = timm.optim.list_optimizers()
OWN = [name for name in FACTORY if not name.startswith(("bnb", "fused")) and name not in REFUSED]
"""Those that need no further package."""


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch):
    """Kron compiles its formulas, which takes longer than this file."""
    monkeypatch.setattr(timm.optim.kron, "has_dynamo", False)


def settings(opt, **values):
    return resolve(RunConfig(optim=OptimConfig(opt=opt, warmup=0, lr=1e-3, **values)), 1).optim


class Towers(nn.Module):
    """Parameters of all the shapes that towers have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 4, 2)
        self.token_embedding = nn.Embedding(6, 4)
        self.positional_embedding = nn.Parameter(torch.randn(2, 4))
        self.ln_final = nn.LayerNorm(4)
        self.proj = nn.Linear(4, 6)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


class Run:
    """Towers and their optimiser."""

    def __init__(self, opt, **values):
        self.towers = Towers()
        self.optimizer = Optimizer(self.towers, settings(opt, **values), 20)

    def step(self, number, *, skip=False):
        generator = torch.Generator().manual_seed(number)
        for parameter in self.towers.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.full_like(gradient, math.nan) if skip else gradient
        self.optimizer.step(torch.tensor(float(skip)))

    def state(self):
        return {"towers": self.towers.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        self.towers.load_state_dict(state["towers"])
        self.optimizer.load_state_dict(state["optimizer"])


def leaves(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def assert_same(first, second):
    for one, other in zip(leaves(first), leaves(second), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


STEP_THRESHOLD = {"lr_tau": 1e-3, "lr_tau_scheduler": "step_thresh"}


@pytest.mark.parametrize("opt", [*OWN, "lookahead_adamw", "lookahead_sgd"])
def test_a_resume_is_exact_and_a_skipped_step_changes_nothing(opt):
    run = Run(opt, **STEP_THRESHOLD)
    run.step(1, skip=True)  # before there is any state
    if not opt.startswith("madgrad"):
        run.optimizer.hold()
        run.step(1)  # as in a warm start
    weights = copy.deepcopy(run.towers.state_dict())
    assert_same(weights, Towers().state_dict())
    for number in (2, 3):
        run.optimizer.set_rates(number)
        run.step(number)
    before = copy.deepcopy(run.state())
    assert not torch.equal(before["towers"]["proj.weight"], weights["proj.weight"])
    run.step(5, skip=True)
    assert_same(before, run.state())
    file = io.BytesIO()
    torch.save(run.state(), file)
    file.seek(0)
    resumed = Run(opt, **STEP_THRESHOLD)
    resumed.load(torch.load(file, weights_only=True))
    torch.manual_seed(1)  # no random number of torch's own generator may be drawn
    for each in (run, resumed):
        for number in range(6, 9):
            each.optimizer.set_rates(number)
            each.step(number)
    assert_same(run.state(), resumed.state())


@pytest.mark.parametrize("opt", ["adafactorbv", "kron", "adamw"])
def test_state_of_another_type_than_the_weights_keeps_it(opt):
    values = {"kron": {"mu_dtype": torch.bfloat16}, "adafactorbv": {}, "adamw": {}}[opt]
    run, resumed = Run(opt, opt_kwargs=values), Run(opt, opt_kwargs=values)
    run.step(1)
    resumed.load(copy.deepcopy(run.state()))
    assert_same(run.state(), resumed.state())


def halves(opt):
    """A matrix that is updated as a whole, and one that is updated as two halves of its rows.

    Gradients of the upper rows are orthogonal to them, which AdamP and SGDP look for.
    """
    kind = OptimizerKind.of(settings(opt))
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(64, 40, generator=generator))
    parts = [nn.Parameter(half.clone()) for half in whole.detach().split(32)]
    groups = [{"params": [whole], "weight_decay": 0.1}], [{"params": parts, "weight_decay": 0.1}]
    both = [kind.create(group, 1e-2, torch.device("cpu")) for group in groups]
    for _ in range(3):
        gradient = torch.randn(64, 40, generator=generator)
        upper = whole.detach()[:32]
        along = (gradient[:32] * upper).sum(1, True) / upper.square().sum(1, True)
        gradient[:32] -= along * upper
        whole.grad = gradient
        for part, half in zip(parts, gradient.split(32), strict=True):
            part.grad = half.clone()
        for optimizer in both:
            optimizer.step()
    return kind, whole.detach(), torch.cat([part.detach() for part in parts])


@pytest.mark.parametrize("opt", OWN)
def test_which_optimisers_may_update_shards(opt):
    kind, whole, parts = halves(opt)
    assert kind.elementwise == torch.equal(whole, parts)
    if not kind.elementwise:
        with pytest.raises(UserError, match="reads whole parameters"):
            kind.check_shards()


def test_muon_leaves_embeddings_and_vectors_to_adamw():
    run = Run("muon")
    run.step(1)
    by_name = {p: name for name, p in run.towers.named_parameters()}
    matrices = {by_name[p] for p, s in run.optimizer.inner.state.items() if s["use_muon"]}
    assert matrices == {"conv1.weight", "proj.weight"}


def test_adamw_is_torchs_own_with_fused_kernels():
    run = Run("timm/adamw")
    assert type(run.optimizer.inner) is torch.optim.AdamW
    assert all(group["fused"] for group in run.optimizer.inner.param_groups)
    assert run.optimizer.inner.defaults["betas"] == (0.9, 0.98)


def test_a_resumed_run_takes_the_weight_decay_of_its_settings():
    run, other = Run("adamw", wd=0.1), Run("adamw", wd=0.3)
    run.step(1)
    other.load(run.state())
    assert [g["weight_decay"] for g in other.optimizer.inner.param_groups] == [0, 0.3, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"opt": "adamwx"}, "--opt adamwx: no such optimiser; did you mean 'adamw'"),
        ({"opt": "adahessian"}, "needs second derivatives"),
        ({"opt": "madgrad", "warm_start_steps": 9}, "moves weights at a learning rate of 0"),
        ({"opt": "lbfgs"}, "evaluates the loss several times"),
        ({"opt": "fusedlamb"}, "of the package apex, which is not installed"),
        ({"opt": "bnbadamw8bit"}, "pip install bitsandbytes"),
        ({"opt": "sgd", "beta2": 0.9}, "--beta2 has no effect: --opt sgd has no such rate"),
        ({"opt": "adafactor", "beta2": 0.9}, "--beta2 has no effect: --opt adafactor"),
        ({"opt": "lion", "eps": 1e-8}, "--eps has no effect: --opt lion has no eps"),
        ({"opt": "adamw", "momentum": 0.9}, "--momentum has no effect: --opt adamw"),
        ({"opt": "sgd", "opt_kwargs": {"lr": 1}}, "--opt-kwargs lr: use --lr"),
        ({"opt": "sgd", "opt_kwargs": {"weight_decay": 1}}, "use --wd"),
        ({"opt": "sgd", "opt_kwargs": {"nestrov": 1}}, "nestrov: sgd has no such argument; it ha"),
        (
            {"opt": "sgd", "momentum": 0.5, "opt_kwargs": {"momentum": 0.6}},
            "--opt-kwargs momentum and --momentum set the same thing",
        ),
        ({"opt": "adamw", "opt_kwargs": {"betas": (0.9, 0.9)}}, "betas and --beta1 set the same"),
        ({"opt": "sgd", "opt_kwargs": {"dampening": 0.5}}, "--opt sgd: Nesterov momentum requires"),
        ({"opt": "lion", "beta1": 0.9, "opt_kwargs": {"betas": "a"}}, "leave one out"),
    ],
)
def test_what_an_optimiser_does_not_take_is_refused(values, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        Run(**values)
    assert message in str(refused.value)


def test_rates_that_are_not_given_are_the_optimisers_own():
    assert OptimizerKind.of(settings("lion", beta2=0.95)).arguments == {"betas": (0.9, 0.95)}
    assert OptimizerKind.of(settings("lion", beta1=0.0)).arguments == {"betas": (0.0, 0.99)}
    assert OptimizerKind.of(settings("adan", beta1=0.9)).arguments == {"betas": (0.9, 0.92, 0.99)}
    assert OptimizerKind.of(settings("adafactor", beta1=0.9)).arguments["betas"][0] == 0.9
    assert OptimizerKind.of(settings("lamb")).arguments == {}
    run = Run("muon", momentum=0.8, opt_kwargs={"ns_steps": 3, "nesterov": True})
    assert run.optimizer.inner.defaults["momentum"] == 0.8
    assert run.optimizer.inner.defaults["ns_steps"] == 3
