"""neuclip: CLIP training with learned log-normalizers, for people with few GPUs.

`neuclip.create_loss(name, embed_dim=...)` builds any method's loss for your own training loop.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuclip.catalogue.create import create_loss

__all__ = ["__version__", "create_loss"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401  the type of the attribute asked for
    """Imports `create_loss` at first use: the command line must answer without loading torch."""
    if name == "create_loss":
        from neuclip.catalogue.create import create_loss

        return create_loss
    raise AttributeError(f"module 'neuclip' has no attribute {name!r}")
