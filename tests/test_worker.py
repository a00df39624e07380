"""A thread beside the caller: order, a bounded queue, errors with their own message."""

import threading
import traceback

import pytest

from longlive_jax.generate.worker import Worker


def test_everything_is_done_in_order_on_another_thread():
  done, threads = [], set()

  def work(item):
    done.append(item)
    threads.add(threading.current_thread())

  with Worker(work) as worker:
    for item in range(20):
      worker.put(item)
  assert done == list(range(20))
  assert len(threads) == 1 and threading.current_thread() not in threads


@pytest.mark.parametrize("queue", [1, 2, 3])
def test_the_caller_waits_while_the_queue_is_full(queue):
  handed_over, seen = [], []
  slow, go_on = threading.Event(), threading.Event()

  def work(item):
    if item == 0:
      slow.set()
      assert go_on.wait(10)
    seen.append((item, len(handed_over)))

  def caller():
    with Worker(work, queue) as worker:
      for item in range(8):
        worker.put(item)
        handed_over.append(item)

  thread = threading.Thread(target=caller)
  thread.start()
  assert slow.wait(10)
  thread.join(0.2)  # as far as it gets
  assert thread.is_alive() and handed_over == list(range(queue))
  go_on.set()
  thread.join(10)
  assert not thread.is_alive() and handed_over == list(range(8))
  # An item is handed over when all but queue - 1 of those before it are done.
  assert all(handed <= item + queue for item, handed in seen)


@pytest.mark.parametrize("last", [3, 20])
def test_an_error_ends_the_work_and_is_raised_where_it_is_noticed(last):
  done = []

  def encode(item):
    if item == 2:
      raise RuntimeError("encoder broke")
    done.append(item)

  with pytest.raises(RuntimeError, match="encoder broke") as caught:
    with Worker(encode) as worker:
      for item in range(last):
        worker.put(item)
  assert done == [0, 1]  # nothing after the hole
  names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
  assert names[-1] == "encode"


def test_an_error_of_the_caller_leaves_nothing_undone():
  done = []
  with pytest.raises(FloatingPointError):
    with Worker(done.append) as worker:
      worker.put(0)
      worker.put(1)
      raise FloatingPointError
  assert done == [0, 1]


def test_ctrl_c_does_not_wait():
  go_on, done = threading.Event(), []

  def work(item):
    go_on.wait(10)
    done.append(item)

  with pytest.raises(KeyboardInterrupt):
    with Worker(work) as worker:
      worker.put(0)
      worker.put(1)
      raise KeyboardInterrupt
  assert done == []
  go_on.set()
