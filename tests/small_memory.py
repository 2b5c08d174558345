"""Settings that make the memory of a method small enough to turn over within a test."""

from neuclip.catalogue.registry import METHODS


def small_memory(name: str, size: int) -> dict[str, int]:
    """Those of the method's settings that bound its pool or queue, of `size` embeddings a side."""
    wanted = {"pool_size": size, "queue_size": size, "queue_warm_up": 1}
    return {k: v for k, v in wanted.items() if k in METHODS[name].settings.model_fields}
