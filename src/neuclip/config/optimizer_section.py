"""The section of a run's settings on optimiser and schedule. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from neuclip.catalogue.fields import Section, setting
from neuclip.errors import UserError, quantity
from neuclip.method.choices import AdamRates

LayerDecay = Annotated[float, Field(gt=0, le=1)]


class OptimConfig(Section):
    """The optimiser and its schedules."""

    epochs: int = Field(default=32, ge=0, description="length of the schedule")
    stop_epochs: int | None = Field(
        default=None,
        ge=1,
        description="stop after this many epochs, on the schedule of all of them",
    )
    opt: str = setting(
        "adamw",
        "optimiser, one of timm's factory by name, such as sgd, lion, lamb, muon, adafactor",
        flag="--optimizer",
    )
    opt_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="further arguments of the optimiser, as in nesterov=True ns_steps=6; none: its "
        "own defaults",
    )
    lr: float = Field(default=5e-4, gt=0, description="peak learning rate")
    lr_min: float = Field(
        default=0.0, ge=0, description="learning rate at the end of the cosine schedule"
    )
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = Field(
        default="cosine", description="schedule after warm-up"
    )
    epochs_cooldown: int | None = Field(
        default=None,
        ge=1,
        description="length of the cooldown of const-cooldown: the last epochs of the schedule",
    )
    lr_cooldown_end: float = Field(
        default=0.0, ge=0, description="learning rate at the end of the cooldown"
    )
    lr_cooldown_power: float = Field(
        default=1.0, gt=0, description="power of the cooldown's decay; 1: linear"
    )
    warmup: int = Field(default=10000, ge=0, description="steps of linear warm-up")
    warm_start_steps: int = Field(
        default=0,
        ge=0,
        description="batches before the first step in which the towers stay as they are, while the "
        "optimiser's moments and the state of the method settle on them",
    )
    wd: float = Field(
        default=0.2, ge=0, description="weight decay (not on gains, biases and logit_scale)"
    )
    beta1: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="first decay rate; none: 0.9 of AdamW, the default of another optimiser",
    )
    beta2: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="second decay rate; none: of AdamW 0.98 for ViT and 0.999 otherwise, the "
        "default of another optimiser",
    )
    eps: float | None = Field(
        default=None,
        gt=0,
        description="the optimiser's epsilon; none: of AdamW 1e-6 for ViT and 1e-8 otherwise, the "
        "default of another optimiser",
    )
    momentum: float | None = Field(
        default=None, ge=0, lt=1, description="momentum of SGD, Muon and others; none: 0.9"
    )
    image_layer_decay: LayerDecay | None = setting(
        None,
        "factor on the learning rate of the image tower for each layer below its projection; "
        "none: 1",
        flag="--visual-layer-decay",
    )
    text_layer_decay: LayerDecay | None = Field(
        default=None, description="the same factor for the text tower; none: 1"
    )
    grad_clip_norm: float | None = Field(
        default=None, gt=0, description="largest norm of the gradient"
    )
    lr_tau: float | None = Field(
        default=None, gt=0, description="learning rate of the temperature; none: the towers'"
    )
    max_nonfinite_steps: int = Field(
        default=0,
        ge=0,
        description="number of steps with a non-finite loss or gradient to skip before stopping",
    )
    lr_tau_scheduler: Literal["const", "step_thresh", "same", "cosine"] = Field(
        default="same",
        description="schedule of lr_tau: const, step_thresh (a third of lr_tau while the "
        "temperature is at most 0.03), same (the towers' schedule, scaled), or cosine (warm-up, "
        "then a cosine from lr_tau to lr_min, whatever lr_scheduler is)",
    )

    @field_validator("opt")
    @classmethod
    def _without_prefix(cls, value: str) -> str:
        """The name in timm's factory; open_clip puts `timm/` before it."""
        return value.lower().removeprefix("timm/")

    @property
    def adam(self) -> AdamRates:
        """Adam's rates for a loss that steps temperatures of its own: AdamW's, else torch's."""
        if self.opt != "adamw" or self.beta1 is None or self.beta2 is None or self.eps is None:
            return AdamRates()
        return AdamRates(self.beta1, self.beta2, self.eps)

    def check(self) -> None:
        """Checks rules over several fields.

        Raises:
            UserError: names the settings that contradict each other, or would have no effect.
        """
        if self.lr_min > self.lr:
            raise UserError(
                f"lr_min {self.lr_min:g} is above lr {self.lr:g}; it must be at most lr"
            )
        if self.lr_tau is None and self.lr_tau_scheduler in {"step_thresh", "cosine"}:
            raise UserError(
                f"lr_tau_scheduler {self.lr_tau_scheduler} needs lr_tau (for example --lr_tau 1e-4)"
            )
        if self.stop_epochs is not None and self.stop_epochs > self.epochs:
            raise UserError(
                f"stop_epochs {self.stop_epochs} is beyond the schedule of "
                f"{quantity(self.epochs, 'epoch')}; it must be at most epochs"
            )
        self._check_cooldown()

    def _check_cooldown(self) -> None:
        """Checks the settings of `const-cooldown`, the only schedule that reads them."""
        length = self.epochs_cooldown
        if self.lr_scheduler != "const-cooldown":
            for name, given in (
                ("epochs_cooldown", length is not None),
                ("lr_cooldown_end", self.lr_cooldown_end > 0),
                ("lr_cooldown_power", self.lr_cooldown_power != 1),
            ):
                if given:
                    raise UserError(f"{name} has no effect without lr_scheduler const-cooldown")
            return
        if length is None:
            raise UserError(
                "lr_scheduler const-cooldown needs epochs_cooldown, the length of the cooldown "
                "(for example --epochs-cooldown 2)"
            )
        if length > max(self.epochs, 1):
            raise UserError(
                f"epochs_cooldown {length} is longer than the schedule of "
                f"{quantity(self.epochs, 'epoch')}; it must be at most epochs"
            )
        if self.lr_cooldown_end > self.lr:
            raise UserError(
                f"lr_cooldown_end {self.lr_cooldown_end:g} is above lr {self.lr:g}; it must be at "
                "most lr"
            )
