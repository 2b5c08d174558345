"""Linear probe: multinomial logistic regression on features, as in CLIP (arXiv 2103.00020, A.3).

Weights W [classes, dim] and biases b minimise, over all training samples (x, y),

    sum of cross_entropy(W x + b, y) + strength / 2 * |W|^2

by L-BFGS over the full batch, with at most 1,000 iterations. `strength` is 1 / C of scikit-learn's
`LogisticRegression`; biases are not penalised. The strength is the one with the best accuracy on
samples that are held out, among 97 values from 1e-6 to 1e6, eight a decade. As in the paper, a
search visits few of them: 1e-6, 1e-4, ..., 1e6, and then both sides of the best one, at half the
distance each time. The classifier is then fitted to all samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neuclip.errors import UserError
from neuclip.evaluation.class_draws import Halves

MAX_ITERATIONS = 1000
STEPS_PER_DECADE = 8
LAST_STEP = 12 * STEPS_PER_DECADE
"""Step 0 is the strength 1e-6, the last one is 1e6."""
DEFAULT_STRENGTH = 0.1
"""Where nothing can be held out, as with one sample per class."""
_FIRST_STRIDE = 2 * STEPS_PER_DECADE
_TOLERANCE = 1e-4
"""Largest component of the gradient at the end, as a share of the one at W = 0 and b = 0."""
_SMALLEST_CHANGE = 1e-9  # of the mean loss per iteration
_HISTORY = 10
_NUMBERS_AT_ONCE = 2**22

FitProgress = Callable[[int, int], None]
"""Called with the fits done and the most that there may be."""


@dataclass(frozen=True)
class LinearClassifier:
    """A fitted classifier; calling it gives scores.

    Attributes:
        weights: of each class that has a training sample.
        bias: of each of these classes.
        present: these classes, ascending.
        num_classes: number of classes, those without a training sample included.
        strength: of the penalty.
        iterations: of L-BFGS.
        converged: whether L-BFGS ended before its last iteration.
    """

    weights: Float[Tensor, "present dim"]
    bias: Float[Tensor, " present"]
    present: Int64[Tensor, " present"]
    num_classes: int
    strength: float
    iterations: int
    converged: bool

    def __call__(self, features: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows classes"]:
        """Logits; -inf for a class without a training sample."""
        features = features.to(self.weights.device)
        scores = features.new_full((len(features), self.num_classes), -torch.inf)
        scores[:, self.present] = torch.addmm(self.bias, features, self.weights.T)
        return scores


@dataclass(frozen=True)
class Sweep:
    """The search for the strength.

    Attributes:
        tried: accuracy on the held-out samples by step.
        best: the classifier with the best accuracy; of equal ones, that with the lowest
            cross-entropy.
    """

    tried: dict[int, float]
    best: LinearClassifier

    @property
    def accuracy(self) -> float:
        """The best accuracy."""
        return max(self.tried.values())

    @property
    def at_an_end(self) -> bool:
        """Whether the best strength is the weakest or the strongest of the range."""
        return self.best.strength in {strength_at(0), strength_at(LAST_STEP)}


def strength_at(step: int) -> float:
    """The strength of a step of the grid, 0 to `LAST_STEP`."""
    return 10.0 ** (step / STEPS_PER_DECADE - 6)


def fit(
    features: Float[Tensor, "samples dim"],
    classes: Int64[Tensor, " samples"],
    num_classes: int,
    strength: float,
    start: LinearClassifier | None = None,
) -> LinearClassifier:
    """Fits a classifier with a given strength.

    Args:
        features: of the training samples.
        classes: class of each sample.
        num_classes: number of classes, those without a sample included.
        strength: of the penalty, above 0.
        start: classifier to start from, of the same classes; none: zeros.

    Raises:
        UserError: all samples are of one class, or a feature is not finite.
    """
    return _Problem(features, classes, num_classes).solve(strength, start)


def sweep(
    features: Float[Tensor, "samples dim"],
    classes: Int64[Tensor, " samples"],
    num_classes: int,
    halves: Halves,
    progress: FitProgress | None = None,
) -> Sweep:
    """Searches for the strength with the best accuracy on held-out samples.

    Args:
        features: of the training samples.
        classes: class of each sample.
        num_classes: number of classes, those without a sample included.
        halves: rows to fit to, which have every class of the others, and rows that are held out.
        progress: called after each fit.

    Raises:
        UserError: all samples are of one class, or a feature is not finite.
    """
    problem = _Problem(features[halves.fitted], classes[halves.fitted], num_classes)
    held = features[halves.held_out], classes[halves.held_out]
    fitted: dict[int, LinearClassifier] = {}
    quality: dict[int, tuple[float, float]] = {}

    def visit(step: int) -> None:
        if step in fitted or not 0 <= step <= LAST_STEP:
            return
        nearest = min(fitted, key=lambda other: abs(other - step), default=None)
        start = None if nearest is None else fitted[nearest]
        fitted[step] = problem.solve(strength_at(step), start)
        accuracy, loss = _accuracy_and_loss(fitted[step], *held)
        quality[step] = accuracy, -loss
        if progress is not None:
            progress(len(fitted), MOST_FITS)

    for step in reversed(range(0, LAST_STEP + 1, _FIRST_STRIDE)):  # from small weights to large
        visit(step)
    stride = _FIRST_STRIDE // 2
    while stride:
        best = max(quality, key=lambda step: quality[step])
        visit(best - stride)
        visit(best + stride)
        stride //= 2
    best = max(quality, key=lambda step: quality[step])
    return Sweep({step: quality[step][0] for step in sorted(quality)}, fitted[best])


MOST_FITS = LAST_STEP // _FIRST_STRIDE + 1 + 2 * (_FIRST_STRIDE.bit_length() - 1)
"""The most fits of a sweep."""


def _accuracy_and_loss(
    classifier: LinearClassifier,
    features: Float[Tensor, "held dim"],
    classes: Int64[Tensor, " held"],
) -> tuple[float, float]:
    rows = max(1, _NUMBERS_AT_ONCE // classifier.num_classes)
    right, loss = 0, 0.0
    for start in range(0, len(features), rows):
        scores = classifier(features[start : start + rows])
        wanted = classes[start : start + rows].to(scores.device)
        right += int((scores.argmax(dim=1) == wanted).sum())
        loss += float(torch.nn.functional.cross_entropy(scores, wanted, reduction="sum"))
    return right / len(features), loss / len(features)


class _Problem:
    """Logistic regression on given samples, for any strength.

    L-BFGS works on other parameters, with which it needs fewer iterations: on weights of features
    that are centred and rotated to their principal axes, each divided by about the root of the
    curvature at W = 0 along its axis. The minimum stays the same: biases are not penalised, and the
    penalty is that of the weights themselves.

    Raises:
        UserError: all samples are of one class, or a feature is not finite.
    """

    def __init__(
        self,
        features: Float[Tensor, "samples dim"],
        classes: Int64[Tensor, " samples"],
        num_classes: int,
    ) -> None:
        if not bool(features.isfinite().all()):
            raise UserError("a linear probe needs finite features")
        device = features.device if features.device.type == "cuda" else torch.device("cpu")
        present, numbers = classes.to(device).unique(return_inverse=True)
        if len(present) < 2:
            raise UserError("a linear probe needs training samples of at least two classes")
        features = features.to(device, torch.float32)
        self._present, self._classes, self._num_classes = present, numbers, num_classes
        self._mean = features.double().mean(dim=0).float()
        centred = features - self._mean
        covariance = centred.T @ centred / len(centred)
        self._variance, self._axes = torch.linalg.eigh(covariance.double())
        self._variance = self._variance.clamp_min(0).float()
        self._axes = self._axes.float()
        self._inputs = centred @ self._axes

    def solve(self, strength: float, start: LinearClassifier | None = None) -> LinearClassifier:
        """The classifier for a strength.

        Args:
            strength: of the penalty.
            start: classifier to start from; none: zeros.
        """
        penalty = strength / len(self._inputs)
        curvature = self._variance + penalty * len(self._present)
        scale = torch.cat([curvature.rsqrt(), curvature.new_ones(1)])
        parameters = torch.zeros(len(self._present), len(scale), device=self._inputs.device)
        steepest = self._loss_and_gradient(parameters, penalty)[1] * scale
        if start is not None:
            parameters = self._own(start) / scale
        parameters.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=MAX_ITERATIONS,
            max_eval=2 * MAX_ITERATIONS,
            tolerance_grad=_TOLERANCE * float(steepest.abs().max()),
            tolerance_change=_SMALLEST_CHANGE,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            loss, gradient = self._loss_and_gradient(parameters.detach() * scale, penalty)
            parameters.grad = gradient * scale
            return loss

        optimizer.step(closure)
        iterations = int(optimizer.state[parameters].get("n_iter", 0))
        evaluations = int(optimizer.state[parameters].get("func_evals", 0))
        found = parameters.detach() * scale
        weights = found[:, :-1] @ self._axes.T
        return LinearClassifier(
            weights,
            found[:, -1] - weights @ self._mean,
            self._present,
            self._num_classes,
            strength,
            iterations,
            converged=iterations < MAX_ITERATIONS and evaluations < 2 * MAX_ITERATIONS,
        )

    def _own(self, classifier: LinearClassifier) -> Float[Tensor, "present parameters"]:
        """The weights and biases of a classifier for the centred and rotated features."""
        bias = classifier.bias + classifier.weights @ self._mean
        return torch.cat([classifier.weights @ self._axes, bias[:, None]], dim=1)

    def _loss_and_gradient(
        self, parameters: Float[Tensor, "present parameters"], penalty: float
    ) -> tuple[float, Float[Tensor, "present parameters"]]:
        """The mean loss with its penalty, and the gradient, in blocks of samples."""
        weights, bias = parameters[:, :-1], parameters[:, -1]
        gradient = torch.zeros_like(parameters)
        rows = max(1, _NUMBERS_AT_ONCE // len(weights))
        total = 0.0
        for start in range(0, len(self._inputs), rows):
            inputs, wanted = self._inputs[start : start + rows], self._classes[start : start + rows]
            log_probabilities = torch.addmm(bias, inputs, weights.T).log_softmax(dim=1)
            losses = torch.nn.functional.nll_loss(log_probabilities, wanted, reduction="none")
            total += float(losses.sum(dtype=torch.double))
            errors = log_probabilities.exp_()
            errors[torch.arange(len(inputs), device=inputs.device), wanted] -= 1
            gradient[:, :-1].addmm_(errors.T, inputs)
            gradient[:, -1] += errors.sum(dim=0)
        gradient /= len(self._inputs)
        gradient[:, :-1].add_(weights, alpha=penalty)
        square = float(weights.square().sum(dtype=torch.double))
        return total / len(self._inputs) + penalty / 2 * square, gradient
