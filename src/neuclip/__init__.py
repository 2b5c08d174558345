"""neuclip: CLIP training with learned log-normalizers, for people with few GPUs.

`neuclip.load(run)` loads a trained model, to embed, classify and compare.
`neuclip.create_loss(name, embed_dim=...)` builds any method's loss for your own training loop;
`neuclip.register` adds a method of your own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuclip.catalogue.create import create_loss
    from neuclip.catalogue.registry import register
    from neuclip.embedding.trained_model import load

__all__ = ["__version__", "create_loss", "load", "register"]

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401  the type of the attribute asked for
    """Imports the public functions at first use, so that `import neuclip` costs nothing."""
    if name == "create_loss":
        from neuclip.catalogue.create import create_loss

        return create_loss
    if name == "register":
        from neuclip.catalogue.registry import register

        return register
    if name == "load":
        from neuclip.embedding.trained_model import load

        return load
    raise AttributeError(f"module 'neuclip' has no attribute {name!r}")
