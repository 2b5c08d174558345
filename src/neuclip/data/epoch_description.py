"""What an epoch visits, in words for the log."""

from neuclip.data.distinct import Distinct
from neuclip.data.order import Layout, Order, SourceSpan
from neuclip.errors import quantity


def describe_epoch(layout: Layout, length: int, global_batch: int) -> str:
    """How often an epoch visits the samples, in one sentence for the log."""
    steps, rest = divmod(length, global_batch)
    used, visits = length - rest, layout.visits
    text = f"an epoch is {quantity(used, 'sample')}: {quantity(steps, 'step')} of {global_batch:,}"
    if any(span.factor != 1 for span in layout.spans):
        return f"{text}; {_describe_round(layout, used)}"
    if used > visits:
        often, more = divmod(used, visits)
        text += (
            f"; each of the {quantity(visits, 'sample')} is visited {quantity(often, 'time')}, "
            f"{more:,} once more"
        )
    elif used < visits:
        text += (
            f"; each epoch drops a different {visits - used:,} of the {quantity(visits, 'sample')}"
        )
    return text


def _describe_round(layout: Layout, used: int) -> str:
    """How often a mixture visits the samples of each source."""
    rounds, rest = divmod(used, layout.visits)
    part = quantity(rounds, "round") + (
        f" and {quantity(rest, 'visit')} of the next" if rest else ""
    )
    if not rounds:
        part = f"{quantity(used, 'visit')} of a round"
    sources = ", ".join(_describe_span(span) for span in layout.spans)
    return f"that is {part}; a round is {quantity(layout.visits, 'visit')}: {sources}"


def _describe_span(span: SourceSpan) -> str:
    """The visits of a source in a round."""
    samples, full, extra = quantity(span.samples, "sample"), span.full_visits, span.extra_visits
    if not extra:
        return f"{span.name}: each of {samples} {quantity(full, 'time')}"
    if not full:
        return f"{span.name}: a different {extra:,} of {samples} each round"
    return f"{span.name}: each of {samples} {quantity(full, 'time')}, {extra:,} once more"


def describe_distinct(order: Order, distinct: Distinct) -> str:
    """What `--no-duplicates` does to the epochs, in words for the log."""
    visits = order.layout.visits
    if order.window:
        repeats = distinct.repeats(order.positions(0, 0, order.length))
        return (
            f"no duplicates within a window of {quantity(order.window, 'block')} where they fit: "
            f"{quantity(repeats, 'sample')} of the first epoch share a batch with a duplicate"
        )
    text = "no batch holds two samples of a group of equal captions, images or labels"
    steps, possible = order.round_length // distinct.batch, visits // distinct.batch
    if steps < possible:
        text += (
            f"; groups are so large (up to {distinct.largest:,} samples) that a round has "
            f"{steps:,} instead of {possible:,} steps and leaves {visits - order.round_length:,} "
            "samples out, different ones each epoch"
        )
    return text
