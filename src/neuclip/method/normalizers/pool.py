"""The pool of the newest embeddings as prototypes, none of them trained."""

from dataclasses import dataclass

from neuclip.method.choices import PredictionGradient
from neuclip.method.normalizers.prototypes import NetworkSettings, PrototypeNormalizer
from neuclip.method.schedule import Gamma
from neuclip.parallel.collectives import Slice


@dataclass(frozen=True)
class PoolSettings:
    """Sizes of the pool, and how its prediction carries the gradient."""

    size: int
    gradient: PredictionGradient
    gradient_size: int | None


class PoolNormalizer(PrototypeNormalizer):
    """The newest embeddings as prototypes."""

    def __init__(
        self,
        embed_dim: int,
        settings: PoolSettings,
        gamma: Gamma,
        epsilon: float,
        *,
        shard: Slice | None = None,
    ) -> None:
        network = NetworkSettings(
            num_prototypes=settings.size,
            inner_steps=0,
            restart_steps=500,
            prototype_lr=1.0,
            prototype_optimizer="adagrad_norm",
            refresh="fifo",
            gradient=settings.gradient,
            log_weights=False,
            gradient_prototypes=settings.gradient_size,
        )
        super().__init__(embed_dim, network, gamma, epsilon, shard=shard)
