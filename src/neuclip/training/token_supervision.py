"""Supervision by tokens in a run: the head, what it reads of the towers, and its gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from neuclip.config.run_config import RunConfig
from neuclip.data.batch import Batch
from neuclip.errors import UserError
from neuclip.method.losses.token_supervision import TokenHead
from neuclip.model.clip import Clip
from neuclip.model.patch_features import patch_width, vocabulary_size
from neuclip.parallel import collectives


@dataclass(frozen=True)
class TokenSupervision:
    """The supervision by tokens of a run.

    The head is outside of the towers: their embeddings, their average and what is exported are
    those of a model without it.

    Attributes:
        head: equal on all ranks.
        weight: of its loss.
    """

    head: TokenHead
    weight: float

    @classmethod
    def of(cls, config: RunConfig, clip: Clip, device: torch.device) -> "TokenSupervision | None":
        """The supervision that the settings ask for; none without.

        Args:
            config: the settings.
            clip: the model, locked as it will be.
            device: of the towers.

        Raises:
            UserError: nothing of the image tower is trained, or its kind is not known.
        """
        weight = config.supervision.token_weight
        if not weight:
            return None
        visual = cast(nn.Module, clip.towers.visual)
        if not any(parameter.requires_grad for parameter in visual.parameters()):
            raise UserError(
                f"--token-weight {weight:g} supervises the image tower, and nothing of it is "
                "trained: leave it out, or unlock the image tower"
            )
        width, vocabulary = patch_width(clip, device), vocabulary_size(clip.towers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            head = TokenHead(width, vocabulary)
        return cls(head.to(device), weight)

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the head predicts."""
        return len(self.head.frequencies)

    def loss(
        self, batches: Sequence[Batch], patches: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The loss of this rank times its weight, and alone.

        Args:
            batches: the micro-batches of this rank.
            patches: mean patch features of all their images.
            device: of the towers.
        """
        tokens = torch.cat([batch.inputs_to(device).tokens for batch in batches])
        given = [batch.pair_weights for batch in batches if batch.pair_weights is not None]
        loss = self.head.loss(patches, tokens, torch.cat(given) if given else None)
        return self.weight * loss, loss.detach()

    def average_gradients(self) -> None:
        """Averages the gradients of the head over ranks, as DDP does those of the towers."""
        for parameter in self.head.parameters():
            if parameter.grad is not None:
                collectives.mean_over_ranks(parameter.grad)
