"""Shares work over ranks, so that all ranks get all results, or all the same error."""

from collections.abc import Callable
from typing import TypeVar

from neuclip.errors import UserError
from neuclip.parallel import collectives
from neuclip.parallel.launch import launch_environment

T = TypeVar("T")


def share_out(count: int, work: Callable[[range], list[T]]) -> list[T]:
    """Does `count` pieces of work, a contiguous share on every rank.

    Args:
        count: number of pieces.
        work: does a range of pieces; returns any number of results that can be pickled (tensors on
            the CPU).

    Returns:
        The results of all ranks, in order.

    Raises:
        UserError: on all ranks, the error of the lowest rank that failed.
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
    """Does work on the main process and returns its result on all ranks, without a time limit.

    Raises:
        UserError: on all ranks, the error of the main process.
    """
    made: list[T] = []
    problem: UserError | None = None
    if collectives.is_main():
        try:
            made = [work()]
        except UserError as error:
            problem = error
    collectives.barrier()  # unlike a collective, it waits without a time limit
    made, problem = collectives.broadcast_object((made, problem))
    if problem is not None:
        raise problem
    return made[0]


def once_per_machine(work: Callable[[], None]) -> None:
    """Does work on one process of every machine; the others wait for it, without a time limit.

    Raises:
        UserError: on all ranks, the error of the lowest rank that failed.
    """
    problem: UserError | None = None
    if launch_environment().local_rank == 0:
        try:
            work()
        except UserError as error:
            problem = error
    collectives.barrier()
    for each in collectives.gather_objects(problem):
        if each is not None:
            raise each


def in_turn(work: Callable[[], T]) -> T:
    """Does the same work on every rank, in an order that lets ranks reuse each other's files.

    The main process works first, then the first process of every other machine, then the rest.
    """
    turn = 0 if collectives.is_main() else 1 if launch_environment().local_rank == 0 else 2
    made: list[T] = []
    for now in range(3):
        if now == turn:
            made = [work()]
        collectives.barrier()
    return made[0]
