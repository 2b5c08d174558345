"""Work shared out over processes, so that all of them get all results, or all the same error."""

from collections.abc import Callable
from typing import TypeVar

from neuclip.errors import UserError
from neuclip.parallel import collectives

T = TypeVar("T")


def share_out(count: int, work: Callable[[range], list[T]]) -> list[T]:
    """Does `count` pieces of work, every rank its contiguous share; all get all results, in order.

    Args:
        count: how many pieces.
        work: does some of them; gives any number of results that can be pickled (tensors on the
            CPU).

    Raises:
        UserError: that of the first rank that met one, on all ranks, so that none waits for it.
    """
    share = collectives.owned_slice(count)
    outcome: list[T] | UserError
    try:
        outcome = work(range(share.start, share.stop))
    except UserError as error:
        outcome = error
    results: list[T] = []
    for each in collectives.gather_objects(outcome):
        if isinstance(each, UserError):
            raise each
        results += each
    return results


def from_main(work: Callable[[], T]) -> T:
    """What the main process makes, on all ranks, however long it takes.

    Raises:
        UserError: that of the main process, on all ranks.
    """
    made: list[T] = []
    problem: UserError | None = None
    if collectives.is_main():
        try:
            made = [work()]
        except UserError as error:
            problem = error
    collectives.barrier()  # its wait has no limit, as that of a collective has
    made, problem = collectives.broadcast_object((made, problem))
    if problem is not None:
        raise problem
    return made[0]
