"""Variants of `neuclip_pool` for the studies: methods of their own, outside the package."""

from collections.abc import Callable
from typing import Literal

from pydantic import create_model

from neuclip.catalogue.building import robust_objective, step_gamma
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.neuclip import NeuCLIPPoolSettings
from neuclip.catalogue.registry import method_info, register
from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss, Objective
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.method.normalizers.pool import PoolNormalizer, PoolSettings

MakeLoss = Callable[[int, PoolNormalizer, Objective], PairLoss]
"""Makes a loss of the width of the embeddings, the normalizer and the form of the objective."""


def register_pool_variant(
    name: str,
    normalizer: type[PoolNormalizer] = PoolNormalizer,
    loss: MakeLoss = GlobalContrastiveLoss,
) -> None:
    """Adds a variant to the catalogue: it has the settings and the defaults of `neuclip_pool`.

    Args:
        name: of the variant.
        normalizer: takes the place of the pool's.
        loss: takes the place of the pool's.
    """

    def build(settings: NeuCLIPPoolSettings, run: RunFacts) -> PairLoss:
        assert settings.pool_size is not None
        sizes = PoolSettings(settings.pool_size, settings.gradient, settings.gradient_size)
        gamma = step_gamma(settings, run)
        return loss(
            run.embed_dim,
            normalizer(run.embed_dim, sizes, gamma, settings.epsilon),
            robust_objective(settings),
        )

    pool = method_info("neuclip_pool")
    register(
        MethodInfo(
            settings=create_model(name, __base__=NeuCLIPPoolSettings, name=(Literal[name], name)),
            build=build,
            resolve=pool.resolve,
            summary=f"neuclip_pool with {normalizer.__name__} and {loss.__name__}",
            normalizer=pool.normalizer,
            state=pool.state,
            formula=pool.formula,
            paper=pool.paper,
        )
    )
