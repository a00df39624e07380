"""Who looks at a session: queues that are bounded, between its thread and theirs."""

import asyncio
import collections
import threading
from typing import NamedTuple


class Item(NamedTuple):
  """An event as JSON, and media that belongs to it, or b''."""

  text: str
  media: bytes = b""


class Watcher:
  """The queue of one connection. `put` and `restart` are for any thread.

  Whoever reads slowly loses what is old, and nobody waits for it: a full queue takes
  nothing more until `restart`, which leaves it what it needs to go on from now.

  Args:
    loop: on which `get` is awaited.
    most: items that wait.
  """

  def __init__(self, loop: asyncio.AbstractEventLoop, most: int):
    self._loop, self._most = loop, most
    self._items: collections.deque[Item] = collections.deque()
    self._lock, self._some = threading.Lock(), asyncio.Event()

  def put(self, item: Item) -> bool:
    """Whether there was room."""
    with self._lock:
      if len(self._items) >= self._most:
        return False
      self._items.append(item)
    self._wake()
    return True

  def restart(self, *items: Item) -> int:
    """Puts items in the place of all that waits; how many those were."""
    with self._lock:
      lost = len(self._items)
      self._items = collections.deque(items)
    self._wake()
    return lost

  async def get(self) -> Item:
    """Waits for the next item."""
    while True:
      with self._lock:
        if self._items:
          return self._items.popleft()
        self._some.clear()
      await self._some.wait()

  def _wake(self) -> None:
    try:
      self._loop.call_soon_threadsafe(self._some.set)
    except RuntimeError:  # the loop has ended, and with it the connection
      pass
