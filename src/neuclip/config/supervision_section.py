"""The section of a run's settings on supervision beside the method's loss. Imports no torch."""

from pydantic import Field

from neuclip.catalogue.fields import Section
from neuclip.errors import UserError


class SupervisionConfig(Section):
    """Supervision by the words of the captions, beside the loss of any method."""

    token_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of a loss by which the image tower predicts the tokens of its caption "
        "through a linear head (SuperCLIP, arXiv 2512.14480; 1 as published); 0: no head",
    )

    def check(self, *, fsdp: bool, only_evaluates: bool) -> None:
        """Checks rules over several fields.

        Raises:
            UserError: the head cannot be trained, or nothing is.
        """
        if not self.token_weight:
            return
        if fsdp:
            raise UserError(
                f"--token-weight {self.token_weight:g} with --fsdp: the head reads the image tower "
                "between its sharded parts, which is not built; leave one of them out"
            )
        if only_evaluates:
            raise UserError(
                f"--token-weight {self.token_weight:g} is for training, and this line only "
                "evaluates"
            )
