"""The section of a run's settings on LoRA and distillation. Imports no torch."""

from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from neuclip.catalogue.fields import Section
from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError

LORA_TARGETS = ("q", "k", "v", "out", "mlp")
"""Kinds of matrices: of attention, queries, keys, values and the output; and those of MLPs."""
DEFAULT_ALPHA = 32.0


class AdaptationConfig(Section):
    """Low-rank updates of given weights (LoRA), and distillation from them."""

    lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="train low-rank updates of this rank in place of the weights (LoRA); none: "
        "the weights",
    )
    lora_alpha: float = Field(
        default=DEFAULT_ALPHA, gt=0, description="the updates are scaled by alpha / rank"
    )
    lora_targets: str = Field(
        default=",".join(LORA_TARGETS),
        description="matrices with an update, joined by ',': q, k, v and out of attention, mlp",
    )
    lora_towers: Literal["both", "image", "text"] = Field(
        default="both", description="towers with updates; another tower is not trained"
    )
    lora_modules_to_save: str | None = Field(
        default=None,
        description="weights that are trained in full beside the updates and the temperature: "
        "parts of their names, joined by ',', as in ln_final,visual.proj; none: no more",
    )
    distill_start: float | None = Field(
        default=None,
        gt=0,
        description="weight of distillation from the starting weights; none: no distillation",
    )
    distill_model: str | None = Field(
        default=None, description="architecture of the weights of --distill-pretrained"
    )
    distill_pretrained: str | None = Field(
        default=None,
        description="distil from these weights instead, with weight 1 as in open_clip; as for "
        "--pretrained",
    )

    @field_validator("lora_targets")
    @classmethod
    def _known_targets(cls, value: str) -> str:
        names = value.split(",")
        if set(names) <= set(LORA_TARGETS) and len(set(names)) == len(names):
            return ",".join(name for name in LORA_TARGETS if name in names)
        raise PydanticCustomError(
            "lora_targets", "must be some of {known}, joined by ','", {"known": _joined()}
        )

    @property
    def distills(self) -> bool:
        """Whether a teacher is asked for."""
        return self.distill_start is not None or self.distill_pretrained is not None

    def check(self, model: ModelConfig, *, fsdp: bool) -> None:
        """Checks rules over several fields.

        Raises:
            UserError: settings contradict each other, or would have no effect.
        """
        self._check_distillation()
        if self.lora_rank is None:
            self._check_unused()
            return
        if fsdp:
            raise UserError(
                "--lora-rank with --fsdp: a low-rank update needs the whole matrix on each rank; "
                "leave out --fsdp (LoRA keeps no optimiser state for the matrices themselves)"
            )
        for tower, locked in (("image", model.lock_image), ("text", model.lock_text)):
            other = "text" if tower == "image" else "image"
            if locked:
                raise UserError(
                    f"--lora-rank with --lock-{tower}: LoRA trains no weights but its updates; "
                    f"leave out --lock-{tower}, and add --lora-towers {other} if the {tower} "
                    "tower shall have no updates"
                )
        for name in ("pretrained_image", "pretrained_image_path", "pretrained_text_path"):
            if getattr(model, name):
                raise UserError(
                    f"--lora-rank with --{name.replace('_', '-')}: checkpoints of LoRA hold the "
                    "updates alone and name one file of starting weights: give weights of both "
                    "towers with --pretrained"
                )

    def _check_unused(self) -> None:
        for name, field in type(self).model_fields.items():
            if name.startswith("lora_") and getattr(self, name) != field.default:
                raise UserError(f"--{name.replace('_', '-')} has no effect without --lora-rank")

    def _check_distillation(self) -> None:
        if (self.distill_model is None) != (self.distill_pretrained is None):
            raise UserError(
                "--distill-model and --distill-pretrained name a teacher together: give both (or "
                "--distill-start 1, for the starting weights)"
            )
        if self.distill_start is not None and self.distill_pretrained is not None:
            raise UserError(
                "--distill-start and --distill-pretrained both name a teacher: leave one out"
            )


def _joined() -> str:
    return ", ".join(LORA_TARGETS)
