"""`amorlip`: small networks that predict the partition functions."""

from typing import TYPE_CHECKING, Literal

from neuclip.catalogue.cost import networks, softmax_loss
from neuclip.catalogue.fields import setting
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import MethodSettings
from neuclip.catalogue.published_trainers import AMORLIP
from neuclip.method.choices import BATCH_OPTIONS, Amortization

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss


class AmorLIPSettings(MethodSettings):
    """Amortised networks that predict the partition functions."""

    name: Literal["amorlip"] = "amorlip"
    rho: float = setting(8.5, "temperature regulariser: rho * tau is added to the loss")
    late_rho: float = setting(-8.5, "rho from late_rho_epoch on")
    late_rho_epoch: int = setting(11, "first epoch with late_rho", unit="epochs", ge=0)
    positive_weight: float = setting(
        1e-3, "weight of the pair itself in the normalizer", flag="--pos-coef", gt=0, le=1
    )
    amortization: Amortization = setting(
        "log_l2", "what the networks minimise", flag="--lambda-loss-type"
    )
    divergence_weight: float = setting(
        0.1, "weight of log_l2 beside a divergence", flag="--div-reg-coef", ge=0
    )
    hidden_factor: float = setting(
        1.0, "hidden width over the embedding's", flag="--h-dim-factor", gt=0
    )
    inner_steps: int = setting(
        3,
        "Adam steps of the networks per training step",
        unit="steps",
        flag="--lambda-update-frequency",
        ge=0,
    )
    lambda_lr: float = setting(1e-3, "learning rate of the networks", gt=0)
    lambda_clip_norm: float = setting(1.0, "largest norm of the networks' gradient", gt=0)
    fit_previous: bool = setting(
        True,
        "fit to, and train with, the batch's normalizer mixed with the networks of the epoch "
        "before; off: train with the EMA networks",
        flag="--fit-w-prev",
    )
    previous_weight: float = setting(
        0.8,
        "final share of the networks of the epoch before (off: final EMA rate)",
        flag="--z-beta-max",
        ge=0,
        le=1,
    )
    previous_epochs: float = setting(
        16.0,
        "epochs until the share is reached, along half a cosine",
        unit="epochs",
        flag="--beta-decay-epochs",
        gt=0,
    )
    ema_rate: float = setting(
        0.92, "share that the EMA networks keep, with fit_previous", flag="--model-ema-beta", ge=0
    )
    ema_steps: int = setting(
        2,
        "training steps between EMA updates",
        unit="steps",
        flag="--update-ema-mlps-every-n-steps",
        ge=1,
    )
    restart_epochs: int = setting(
        1,
        "epochs between fresh networks; 0: never",
        unit="epochs",
        flag="--reinit-lambda-every-n-epochs",
        ge=0,
    )

    def batch_only(self, epochs: float) -> str | None:
        """The share of the networks is 0 in the first epoch."""
        if epochs > 1 or not self.fit_previous:
            return None
        return (
            "the share of the networks of the epoch before is 0 in the first epoch, as published: "
            "amorlip uses the batch's own normalizers throughout (--epochs 2 or more uses the "
            "networks; --no-fit-previous uses them within one epoch)"
        )


def _build(settings: AmorLIPSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.amorlip import AmorLIPLoss
    from neuclip.method.normalizers.amortized import AmortizedNormalizer, AmortizedSettings

    networks = AmortizedSettings(
        **settings.model_dump(include=set(AmortizedSettings.__dataclass_fields__))
    )
    normalizer = AmortizedNormalizer(run.embed_dim, networks, run.epoch_length)
    return AmorLIPLoss(
        run.embed_dim,
        normalizer,
        rho=(settings.rho, settings.late_rho),
        late_from=settings.late_rho_epoch,
    )


METHODS = (
    MethodInfo(
        settings=AmorLIPSettings,
        build=_build,
        takes=BATCH_OPTIONS,
        summary="partition functions amortised by small networks",
        normalizer="an MLP per side with an EMA copy, mixed with the batch",
        state="10 * (2 d^2 + ...) numbers: networks, their Adam state and two copies, two sides",
        formula="""\
  Z_i      = c exp(s_ii / tau) + sum over j != i of exp(s_ij / tau)        over the batch
  fit      : log lambda(e_i) to log z_i = log( beta lambda_before(e_i) + (1 - beta) Z_i )
  loss     = tau~ * mean_i [ -2 s_ii/tau + Z1_i / z1_i + Z2_i / z2_i ] + rho tau
             tau~, z held constant; without fit_previous z is the EMA network's lambda""",
        paper="AmorLIP: Efficient Language-Image Pretraining via Amortization (arXiv 2505.18983)",
        spelling={"scale_loss": True, "calculate_full": True, "learn_logit_scale": True},
        trainer=AMORLIP,
        cost=lambda setup: softmax_loss(setup) + networks(setup),
    ),
)
