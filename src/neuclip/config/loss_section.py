"""The section of a run's settings on how the loss is computed. Imports no torch."""

from pydantic import Field

from neuclip.catalogue.fields import Section
from neuclip.method.choices import CompiledLoss, FusedLoss


class ComputeConfig(Section):
    """How the loss is computed; its value is the same in every form, to rounding."""

    fused_loss: FusedLoss = Field(
        default="auto",
        description="on: softmaxes over the batch in fused Triton kernels (CUDA, compute "
        "capability 8.0 or newer); off: in row blocks; auto: in row blocks, as the kernels are not "
        "yet measured on a GPU",
    )
    compile_loss: CompiledLoss = Field(
        default="off",
        description="compile: torch.compile for the row blocks and the inner steps of neuclip; "
        "graphs: these steps also as a CUDA graph; both need a run of one process",
    )
