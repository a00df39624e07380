"""Ending a long run in good order: the first Ctrl-C asks, the second one insists."""

import contextlib
import signal
import sys
from collections.abc import Iterator


class StopRequest:
  """Whether, and why, a loop should end after the round under way.

  True as soon as there is a `reason`: the name of a signal, or what the loop itself
  found.
  """

  def __init__(self):
    self.reason = ""
    self._signalled = False

  def __bool__(self) -> bool:
    return bool(self.reason)

  @contextlib.contextmanager
  def on_signals(self, unit: str) -> Iterator[None]:
    """Inside the block Ctrl-C and SIGTERM set the reason; another Ctrl-C interrupts.

    Args:
      unit: what will be finished first, for the message: 'chunk', 'step'.
    """

    def handle(number, frame):
      # Only Ctrl-C insists: a supervisor may send SIGTERM twice while a state is saved.
      if self._signalled and number == signal.SIGINT:
        raise KeyboardInterrupt
      self._signalled = True
      self.reason = self.reason or signal.Signals(number).name
      print(f"\nstopping after this {unit}; once more stops at once", file=sys.stderr)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
      yield
    finally:
      for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
