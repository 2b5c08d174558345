"""Settings that several methods share. Imports no torch."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import (
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from neuclip.catalogue.fields import Section, setting
from neuclip.errors import UserError
from neuclip.method.choices import GammaSchedule, ObjectiveScale, TemperatureGradient

RHO_TEXT = (
    "temperature regulariser: rho * tau is added to the loss; auto: the value that keeps the "
    "temperature of the starting weights, measured in the warm start"
)


class MethodSettings(Section):
    """Settings that every method has; a method's class adds `name: Literal[...]`."""

    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Earlier names of settings, with today's ("": the setting is gone); they are refused."""
    TEMPERATURE_BOUNDS: ClassVar[tuple[float, float]] = (0.01, 1.0)
    """Within which the trainer keeps the temperature, as open_clip does."""

    temperature: float = setting(0.07, "temperature at the start of training", gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _refuse_earlier_names(cls, values: Any) -> Any:
        old = [key for key in cls.RENAMED if isinstance(values, Mapping) and key in values]
        if not old:
            return values
        parts = [f"{key} is called {cls.RENAMED[key]} now" for key in old if cls.RENAMED[key]]
        dropped = [key for key in old if not cls.RENAMED[key]]
        parts += [f"leave out {', '.join(dropped)}"] if dropped else []
        raise PydanticCustomError("renamed_setting", "{parts}", {"parts": "; ".join(parts)})

    @property
    def needs_sample_ids(self) -> bool:
        """Whether these settings need sample ids, beside methods that always do."""
        return False

    @property
    def temperature_bounds(self) -> tuple[float, float]:
        """Within which the trainer keeps the one temperature that is learned."""
        return self.TEMPERATURE_BOUNDS

    def check_weights(self, temperature: float) -> None:
        """Refuses starting weights that the settings would throw away.

        Args:
            temperature: at which the run would start.

        Raises:
            UserError: the settings have a lower bound above it.
        """

    @property
    def method(self) -> str:
        """The name that selects the method."""
        return str(self.model_dump()["name"])

    def idle(self) -> dict[str, str]:
        """Settings that the others leave without effect, each with the reason and the remedy."""
        return {}

    def gamma_text(self, global_batch_size: int) -> str | None:
        """The schedule of gamma in words, with every default filled in; none: it has none.

        Args:
            global_batch_size: pairs in a training step, over all ranks.
        """
        return None

    def batch_only(self, epochs: float) -> str | None:
        """Why a run takes its log-normalizers from the batch alone, with what changes it.

        Args:
            epochs: length of the run; every other default is filled in.

        Returns:
            A sentence for the user; none: the method also uses what it remembers or predicts, or
            has nothing of that kind.
        """
        return None


class LearnedTemperatureSettings(MethodSettings):
    """One temperature for all pairs, which is learned."""

    temperature_min: float = setting(
        MethodSettings.TEMPERATURE_BOUNDS[0],
        "lower bound of the temperature; 0.01 is that of open_clip",
        gt=0,
        le=1,
    )

    @field_validator("temperature_min")
    @classmethod
    def _not_above_the_start(cls, value: float, info: ValidationInfo) -> float:
        start = info.data.get("temperature", value)  # missing: it is wrong itself
        if value > start:
            raise PydanticCustomError(
                "temperature_min",
                "must be at most the temperature at the start, {start}",
                {"start": f"{start:g}"},
            )
        return value

    @property
    def temperature_bounds(self) -> tuple[float, float]:
        """The lower bound is a setting."""
        return self.temperature_min, self.TEMPERATURE_BOUNDS[1]

    def check_weights(self, temperature: float) -> None:
        """A bound that nobody chose stays silent: open_clip clamps at the same value."""
        low = self.temperature_min
        if low > self.TEMPERATURE_BOUNDS[0] and temperature < low * (1 - 1e-3):
            raise UserError(
                f"--temperature-min {low:g}: the weights have the temperature {temperature:.4g}. "
                f"Leave the flag out, or start above it with --temperature {low:g}"
            )


class ThresholdSettings(MethodSettings):
    """False negatives found by a threshold per anchor (GloFND); see `neuclip.method.thresholds`."""

    START_SHARE: ClassVar[float] = 0.4
    """Of a run, before thresholds are used: about 15 of 37 epochs, as published."""
    START_EPOCHS: ClassVar[float] = 15.0
    """Epochs before thresholds are used where the length of the run is unknown."""

    glofnd_alpha: float = setting(
        0.0,
        "share of an anchor's negatives that are taken for false and left out, those above its "
        "own threshold of similarity (GloFND, arXiv 2502.20612); 0: none",
        ge=0,
        lt=1,
    )
    glofnd_start: float | None = setting(
        None,
        "epochs before the thresholds are learned and used; none: 0.4 of the run (15 of 37 epochs "
        "as published)",
        unit="epochs",
        flag="--glofnd-start-update",
        ge=0,
    )

    def idle(self) -> dict[str, str]:
        """Settings of thresholds where there are none."""
        if self.glofnd_alpha:
            return super().idle()
        given = {"glofnd_start", "glofnd_lr"} & type(self).model_fields.keys()
        reason = "--glofnd-alpha 0, which leaves out none: add --glofnd-alpha 1e-3"
        return {**super().idle(), **dict.fromkeys(sorted(given), reason)}

    def start_step(self, epochs: float | None, steps_per_epoch: int) -> int:
        """The first step with thresholds.

        Args:
            epochs: length of the run; none: unknown.
            steps_per_epoch: training steps in an epoch.
        """
        start = self.glofnd_start
        if start is None:
            start = self.START_EPOCHS if epochs is None else self.START_SHARE * epochs
        return round(start * steps_per_epoch)


class LearnedThresholdSettings(ThresholdSettings):
    """Thresholds in a table, learned from the batches."""

    glofnd_lr: float = setting(
        0.05, "learning rate of the thresholds", flag="--glofnd-lr-lda", gt=0
    )

    @property
    def needs_sample_ids(self) -> bool:
        """Learned thresholds are a state per sample."""
        return self.glofnd_alpha > 0


class StabilisedSettings(MethodSettings):
    """Settings of every method with log(epsilon + g)."""

    epsilon: float = setting(
        1e-14, "stabiliser inside log(epsilon + g)", flag="--fastclip-eps", ge=0, le=1
    )


def first_visits_only(method: str, epochs: float) -> str | None:
    """The `batch_only` of a moving average per sample, which needs a second visit."""
    if epochs > 1:
        return None
    return (
        f"each pair is seen once: {method} averages over visits, so it uses the batch's own "
        "normalizers throughout, as rgcl_batch does (--epochs 2 or more uses the averages; "
        "--method neuclip_pool has a memory within one epoch)"
    )


class GlobalTemperatureSettings(LearnedTemperatureSettings):
    """One learnable temperature for all pairs in the robust global contrastive objective."""

    temperature_gradient: TemperatureGradient = setting(
        "exact", "exact, or counting one term twice as the published FastCLIP code does"
    )


class GlobalContrastiveSettings(GlobalTemperatureSettings, StabilisedSettings):
    """The robust global contrastive objective with one learnable temperature (RGCL-g)."""

    rho: float | Literal["auto"] = setting(6.5, RHO_TEXT, ge=0)
    objective_scale: ObjectiveScale = setting(
        "fastclip",
        "fastclip: half the sum of the two sides, means over B - 1 negatives; drrho: as the code "
        "of DRRho-CLIP and SCENT, the sum of the two sides, and a normalizer that averages over B",
    )

    @field_validator("rho", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        if value == "auto":
            return value
        try:
            return check(value)
        except ValidationError as error:
            if any(each["type"].startswith("greater") for each in error.errors()):
                raise
            raise PydanticCustomError("rho", "must be a number or auto") from None


class MixingSettings(MethodSettings):
    """A remembered or predicted normalizer, mixed with the batch estimate by gamma.

    `neuclip.method.schedule` turns these settings into gamma per step.
    """

    EPOCHS_UNLESS_KNOWN: ClassVar[float] = 24.0
    """Length of the schedule where that of the run is unknown."""

    gamma: float | None = setting(
        None,
        "final weight of the batch estimate; none: min(1, 4.177 * epochs^-0.7265)",
        ge=0,
        le=1,
    )
    gamma_schedule: GammaSchedule = setting(
        "cosine",
        "how gamma goes from 1 in the first epoch to its final value: along half a cosine, or "
        "constant from then on; final: it has this value from the first step, the default "
        "after a warm start",
    )
    gamma_decay_epochs: float | None = setting(
        None, "epochs until gamma reaches its final value; none: the whole run", unit="epochs", gt=0
    )

    def for_length(self, epochs: float) -> "MixingSettings":
        """The settings with gamma and the length of its schedule filled in.

        Args:
            epochs: length of the run.
        """
        update = {
            "gamma": gamma_floor(epochs) if self.gamma is None else self.gamma,
            "gamma_decay_epochs": self.gamma_decay_epochs or epochs,
        }
        return self.model_copy(update=update)

    def after_warm_start(self) -> "MixingSettings":
        """The settings of a run with a warm start: gamma is final from the first step.

        Gamma is 1 at first because the memory is empty. After a warm start it is not, and a gamma
        of 1 would overwrite it. A schedule that was given stays.
        """
        if "gamma_schedule" in self.model_fields_set:
            return self
        return self.model_copy(update={"gamma_schedule": "final"})

    def gamma_text(self, global_batch_size: int) -> str | None:
        """The published schedule changes once per epoch."""
        if self.gamma == 1:
            return None
        way = f"{self.gamma:g}"
        if self.gamma_schedule == "final":
            return f"{way} from the first step"
        if self.gamma_schedule == "cosine":
            way = f"along half a cosine to {way} at the end of epoch {self.gamma_decay_epochs:g}"
        return f"1 in the first epoch, then {way}, changing once per epoch"

    def batch_only(self, epochs: float) -> str | None:
        """Gamma may be 1 by its rule, or because the run has only the first epoch."""
        if epochs <= 1 and self.gamma_schedule != "final":
            return (
                f"gamma stays 1: it is 1 in the first epoch, as published, so {self.method} uses "
                "the batch's own normalizers throughout, as rgcl_batch does (--epochs 2 --gamma "
                "0.4 mixes in the remembered ones; --method neuclip_pool does so in one epoch)"
            )
        if self.gamma == 1:
            return (
                f"gamma stays 1: {self.method} uses the batch's own normalizers, as rgcl_batch "
                "does (the published rule gives 1 below 8 epochs; --gamma 0.4 mixes in the "
                "remembered ones)"
            )
        return None


class IndividualTemperatureSettings(StabilisedSettings):
    """One learnable temperature for every image and every text, with an optimiser of its own."""

    rho: float = setting(7.0, "temperature regulariser of every pair", ge=0)
    temperature_lr: float = setting(0.0133, "learning rate of the individual temperatures", gt=0)
    temperature_min: float = setting(0.01, "lower bound of the individual temperatures", gt=0)
    temperature_max: float = setting(1.0, "upper bound of the individual temperatures", gt=0)


def gamma_floor(epochs: float) -> float:
    """The published rule for the final gamma: min(1, 4.177 * epochs^-0.7265) (24 epochs: 0.42)."""
    return min(1.0, round(4.177 * epochs**-0.7265, 4))
