"""Work that happens beside the caller: a thread with a bounded queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Worker:
  """Does `work(item)` for one item after the other, on a thread of its own.

    with Worker(write) as writer:
      for chunk in chunks:
        writer.put(chunk)

  An error ends the work: later items are not touched, and the next `put`, or the end of
  the block, raises it with its traceback. The end of the block waits for what is under
  way; only Ctrl-C does not.

  Args:
    work: what to do with an item.
    queue: how many items may be under way, the one worked on included. `put` waits
      until there are fewer: items hold memory.
  """

  def __init__(self, work: Callable[[Any], None], queue: int = 2):
    self._work, self._queue = work, queue
    self._thread = ThreadPoolExecutor(max_workers=1)
    self._under_way: deque[Future] = deque()
    self._failed = False

  def put(self, item: Any) -> None:
    """Hands over the next item."""
    while len(self._under_way) >= self._queue:
      self._under_way.popleft().result()
    self._under_way.append(self._thread.submit(self._do, item))

  def _do(self, item: Any) -> None:
    if self._failed:
      return
    try:
      self._work(item)
    except BaseException:
      self._failed = True
      raise

  def __enter__(self) -> Worker:
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if kind is not None and not issubclass(kind, Exception):
      self._thread.shutdown(wait=False, cancel_futures=True)
      return
    self._thread.shutdown()
    for item in self._under_way:
      item.result()
