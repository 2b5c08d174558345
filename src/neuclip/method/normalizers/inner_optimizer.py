"""The optimisers of prototypes and networks, for gradients that are not in autograd.

State tensors carry the same leading `side` axis as the prototypes. Rows may be sharded over ranks;
only the step of `adagrad_norm` communicates, because its sum of squares is over all rows.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuclip.method.choices import PrototypeOptimizer
from neuclip.method.normalizers.sharded_rows import RowShard, keep_full_in_state

_TINY = 1e-10
_ADAM_BETA1, _ADAM_BETA2, _ADAM_EPS = 0.9, 0.999, 1e-8


class InnerOptimizer(nn.Module):
    """Steps one tensor of shape [2, rows, ...] by a given gradient.

    Attributes:
        kind: `adagrad_norm` (one scalar accumulator per side: AdaGrad-norm), `adagrad` (one per
            coordinate), `adam`, or `sgd`.
        lr: learning rate; for `adagrad_norm` the length of the first step.

    Args:
        kind: see above.
        lr: see above.
        parameter: the tensor, for shapes and type.
        shard: which of its rows are this rank's; none: it is not sharded.
    """

    accumulator: Tensor
    momentum: Tensor
    count: Tensor

    def __init__(
        self,
        kind: PrototypeOptimizer,
        lr: float,
        parameter: Tensor,
        shard: RowShard | None = None,
    ) -> None:
        super().__init__()
        self.kind: PrototypeOptimizer = kind
        self.lr = lr
        per_side = parameter.new_zeros(parameter.shape[0], *(1,) * (parameter.ndim - 1))
        self.register_buffer(
            "accumulator", torch.zeros_like(parameter) if kind in {"adagrad", "adam"} else per_side
        )
        self.register_buffer(
            "momentum", torch.zeros_like(parameter) if kind == "adam" else per_side.clone()
        )
        per_row = parameter.new_zeros(*parameter.shape[:2], *(1,) * (parameter.ndim - 2))
        self.register_buffer("count", per_row if kind == "adam" else per_side.clone())
        self.shard = shard
        if shard is not None:
            keep_full_in_state(self, self.row_tensors)

    @property
    def row_tensors(self) -> tuple[str, ...]:
        """State tensors with one entry per row, sharded as the rows are."""
        per_kind = {"adagrad": ("accumulator",), "adam": ("accumulator", "momentum", "count")}
        return per_kind.get(self.kind, ())

    @torch.no_grad()
    def forget(self, pieces: list[slice], share: float) -> None:
        """Forgets the state of rows that were replaced.

        Args:
            pieces: these rows of this rank.
            share: their share of all rows. A scalar accumulator loses this share of its sum, since
                otherwise its steps would only shrink.
        """
        for rows in pieces:
            for name in self.row_tensors:
                getattr(self, name)[:, rows] = 0
        if self.kind == "adagrad_norm":
            self.accumulator *= 1 - share

    @torch.no_grad()
    def reset(self) -> None:
        """Forgets all state, after a restart."""
        self.accumulator.zero_()
        self.momentum.zero_()
        self.count.zero_()

    @torch.no_grad()
    def step(self, parameter: Float[Tensor, "2 ..."], grad: Float[Tensor, "2 ..."]) -> None:
        """Moves the parameter against the gradient, in place."""
        if self.kind == "adagrad_norm":
            norm = torch.linalg.vector_norm(grad.flatten(1), dim=1).view_as(self.accumulator)
            if self.shard is None or self.shard.is_full:
                self.accumulator.addcmul_(norm, norm)
            else:
                self.accumulator += self.shard.sum(norm.square_())
            parameter.addcdiv_(grad, self.accumulator.sqrt().add_(_TINY), value=-self.lr)
        elif self.kind == "adagrad":
            self.accumulator.addcmul_(grad, grad)
            parameter.addcdiv_(grad, self.accumulator.sqrt().add_(_TINY), value=-self.lr)
        elif self.kind == "adam":
            self._adam(parameter, grad)
        else:
            parameter.sub_(grad, alpha=self.lr)

    def _adam(self, parameter: Tensor, grad: Tensor) -> None:
        self.count += 1
        self.momentum.lerp_(grad, 1 - _ADAM_BETA1)
        self.accumulator.mul_(_ADAM_BETA2).addcmul_(grad, grad, value=1 - _ADAM_BETA2)
        # Bias corrections stay tensors: reading the count would wait for the device.
        correction1 = 1 - _ADAM_BETA1**self.count
        correction2 = 1 - _ADAM_BETA2**self.count
        denominator = (self.accumulator / correction2).sqrt_().add_(_ADAM_EPS)
        parameter.sub_(self.lr * self.momentum / correction1 / denominator)
