"""The base of all sections of the settings, and the sections on the towers. Imports no torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from neuclip.errors import UserError

Precision = Literal["auto", "fp32", "amp_bf16", "bf16"]


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """The towers."""

    name: str = Field(
        default="ViT-B-32", description="an open_clip model, or glyph-tiny for the embedded data"
    )
    precision: Precision = Field(
        default="auto", description="auto: amp_bf16 on a GPU that has bfloat16, fp32 elsewhere"
    )
    pretrained: str | None = Field(
        default=None,
        description="begin with the weights of this checkpoint, run folder or .safetensors file; "
        "nothing is downloaded",
    )
    pretrained_image_path: str | None = Field(
        default=None,
        description="begin with the image tower of this checkpoint, of CLIP or of the tower alone",
    )
    pretrained_text_path: str | None = Field(
        default=None,
        description="begin with the text tower of this checkpoint, of CLIP or of the tower alone",
    )
    lock_image: bool = Field(default=False, description="do not train the image tower")
    lock_image_unlocked_groups: int = Field(
        default=0, ge=0, description="train the last so many groups of a locked image tower"
    )
    lock_image_freeze_bn_stats: bool = Field(
        default=False, description="freeze the BatchNorm statistics of locked layers too"
    )
    lock_text: bool = Field(default=False, description="do not train the text tower")
    lock_text_unlocked_layers: int = Field(
        default=0, ge=0, description="train the last so many groups of a locked text tower"
    )
    lock_text_freeze_layer_norm: bool = Field(
        default=False, description="do not train the LayerNorms of locked layers either"
    )
    force_patch_dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share of an image's patches left out in training; none: the model's own",
    )
    grad_checkpointing: bool = Field(
        default=False,
        description="compute activations again in the backward pass instead of keeping them",
    )
    torchcompile: bool = Field(default=False, description="compile the towers' blocks")
    torchcompile_backend: Literal["inductor", "aot_eager", "eager"] = Field(
        default="inductor", description="what --torchcompile compiles with"
    )
    model_ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="also keep a moving average of the weights, with this decay, and judge it; "
        "none: no average",
    )

    @property
    def begins_trained(self) -> tuple[bool, bool]:
        """Whether the image and the text tower begin with weights from a file."""
        whole = self.pretrained is not None
        return (
            whole or self.pretrained_image_path is not None,
            whole or self.pretrained_text_path is not None,
        )

    def check(self) -> None:
        """Rules over several fields.

        Raises:
            UserError: a setting that would have no effect.
        """
        for owner, given in (
            ("lock_image", self.lock_image_unlocked_groups > 0),
            ("lock_image", self.lock_image_freeze_bn_stats),
            ("lock_text", self.lock_text_unlocked_layers > 0),
            ("lock_text", self.lock_text_freeze_layer_norm),
        ):
            if given and not getattr(self, owner):
                tower = owner.replace("_", "-")
                raise UserError(
                    f"unlocking or freezing parts of a tower needs the lock: add --{tower}, or "
                    f"leave the --{tower}-... flags out"
                )

    def tiny(self) -> "ModelConfig":
        """The same settings for a tiny model, without what is only for the model named before."""
        update: dict[str, Any] = {
            "name": "glyph-tiny",
            "pretrained": None,
            "pretrained_image_path": None,
            "pretrained_text_path": None,
            "lock_image_unlocked_groups": 0,
            "force_patch_dropout": None,
        }
        return self.model_copy(update=update)


class ParallelConfig(Section):
    """How several processes share the towers, and how long they wait for each other."""

    fsdp: bool = Field(
        default=False,
        description="share out parameters, gradients and optimiser over the processes (FSDP2), and "
        "write sharded checkpoints; otherwise every process holds all (DDP)",
    )
    dist_timeout: float = Field(
        default=600.0,
        gt=0,
        description="seconds that processes wait for one that lives but does not come: when a run "
        "starts, and inside a step",
    )
    dist_silence: float = Field(
        default=30.0,
        ge=5,
        description="seconds without a sign of life after which a process counts as dead and the "
        "others stop",
    )

    def check(self, precision: Precision) -> None:
        """Rules that concern the arithmetic.

        Raises:
            UserError: parameters of several types, which cannot be shared out together.
        """
        if self.fsdp and precision == "bf16":
            raise UserError(
                "--fsdp with --precision bf16: its parameters are of two types and cannot be shared"
                " out together; --precision amp_bf16 computes with bfloat16 parameters and keeps "
                "float32 ones"
            )
