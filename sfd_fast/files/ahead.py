"""Reading ahead: threads do the work of the next items while the current one is used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int, depth: int) -> Iterator[Result]:
    """work(item) of every item in their order, up to `depth` of them computed before they are asked for.

    An error of `work` is raised at its place. num_threads 0 works in the caller's thread; 1 works on the items one
    after the other. Closing the iterator waits for what runs and drops the rest.
    """
    if num_threads == 0:
        yield from map(work, items)
        return
    running: deque[Future] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="ahead") as pool:
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) > depth:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
