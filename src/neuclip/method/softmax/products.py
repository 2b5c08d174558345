"""Matrix products whose sums are float32 even where their factors are bfloat16."""

import torch
from torch import Tensor


def sum_type(factor: torch.dtype) -> torch.dtype:
    """The type of a product of such factors: their own, or float32 for narrower ones."""
    return torch.float32 if factor.itemsize < 4 else factor


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes the product of two matrices, of equal type, into one of `sum_type`.

    CUDA's tensor cores take bfloat16 factors and return their float32 sums. Other devices would
    round the sums, so they multiply the same factors in float32.
    """
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out.dtype, out=out)  # pyright: ignore[reportCallIssue]  out_dtype
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Adds the product of two matrices, of equal type, to one of `sum_type`."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
        return
    found = torch.empty_like(out)
    multiply(left, right, found)
    out += found
