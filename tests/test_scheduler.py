"""Turns of sessions that are only counted: fairness, room, failures, order."""

import dataclasses
import threading
from concurrent.futures import wait

import numpy as np
import pytest

from longlive_jax.generate import scheduler as scheduling
from longlive_jax.generate.commands import Cut, Pause, Resume, Rewind
from longlive_jax.generate.scheduler import Life, Produced, Scheduler

BYTES = {"device": 10, "host": 10, "history": 10}


@dataclasses.dataclass(frozen=True)
class Fake:
  """What the scheduler asks of a session; `fails` at a chunk, in one of two ways."""

  name: str
  chunk: int = 0
  oldest: int = 0
  paused: bool = False
  on_host: bool = False
  fails_at: int = -1
  poisoned_at: int = -1


@dataclasses.dataclass(frozen=True)
class FakeChunk:
  index: int
  poisoned: bool

  @property
  def frames(self):
    if self.poisoned:
      raise FloatingPointError(f"chunk={self.index} is not finite")
    return np.full((1, 2, 2, 3), self.index, np.uint8)


def advance(engine, session):
  engine.append((session.name, session.chunk))
  if session.chunk == session.fails_at:
    raise RuntimeError("decoder is broken")
  chunk = FakeChunk(session.chunk, session.chunk == session.poisoned_at)
  return dataclasses.replace(session, chunk=session.chunk + 1, on_host=False), chunk


def apply(engine, session, command):
  match command:
    case Pause():
      return dataclasses.replace(session, paused=True)
    case Resume():
      return dataclasses.replace(session, paused=False)
    case Rewind(chunk):
      if chunk > session.chunk:
        raise ValueError(f"chunk={chunk} is not made yet")
      return dataclasses.replace(session, chunk=chunk, poisoned_at=-1)
    case Cut():
      raise RuntimeError("out of memory")


def branch(engine, session, chunk):
  return dataclasses.replace(session, chunk=session.chunk if chunk is None else chunk)


def to_host(session):
  return dataclasses.replace(session, on_host=True)


LIFE = Life(advance, apply, branch, to_host, bytes_of=lambda engine: BYTES)


@pytest.fixture
def turns():
  """Stands for the engine: whose chunk was made, in order."""
  return []


@pytest.fixture
def scheduler(turns):
  return scheduler_of(turns)


def scheduler_of(turns, sessions=8, on_device=8, ahead=2):
  room = {"device_bytes": 10 * on_device, "host_bytes": 20 * sessions}
  return Scheduler(turns, **room, ahead=ahead, life=LIFE)


def add(scheduler, name, **fields):
  future = scheduler.add(name, lambda: Fake(name, **fields))
  scheduler.drain()
  return future


def run(scheduler, steps=100, watch=()):
  """Steps while there is work; `watch` has seen everything at once."""
  out = []
  for _ in range(steps):
    if not scheduler.wait(0):
      break
    for each in scheduler.step():
      out.append((each.name, each.chunk.index if each.chunk else each.error))
      if each.name in watch and each.chunk:
        scheduler.shown(each.name, each.chunk.index + 1)
  return out


# ------------------------------------------------------------------ whose turn
def test_sessions_take_turns_and_nobody_runs_ahead_of_its_watcher(scheduler, turns):
  for name in "abc":
    add(scheduler, name)
  found = run(scheduler)
  assert found == [(name, chunk) for chunk in (0, 1) for name in "abc"]
  assert not scheduler.wait(0)
  scheduler.shown("b", 1)
  assert scheduler.wait(0) and run(scheduler) == [("b", 2)]


def test_turns_are_even_whoever_joins_sleeps_and_leaves(scheduler, turns):
  add(scheduler, "a")
  add(scheduler, "sleeper")
  scheduler.command("sleeper", Pause())
  run(scheduler, 20, watch="a")
  assert {name for name, _ in turns} == {"a"}
  # Neither who slept nor who is new makes up for the past.
  scheduler.command("sleeper", Resume())
  add(scheduler, "new")
  scheduler.drain()
  del turns[:]
  run(scheduler, 31, watch=("a", "sleeper", "new"))
  counts = [sum(n == name for n, _ in turns) for name in ("a", "sleeper", "new")]
  assert max(counts) - min(counts) <= 1 and sum(counts) >= 30
  gone = scheduler.remove("a")
  scheduler.drain()
  assert gone.result().chunk > 10
  del turns[:]
  run(scheduler, 10, watch=("sleeper", "new"))
  assert {name for name, _ in turns} == {"sleeper", "new"}


def test_a_chunk_comes_out_when_the_next_is_under_way(scheduler, turns):
  add(scheduler, "a")
  assert scheduler.step() == [] and turns == [("a", 0)]
  (made,) = scheduler.step()
  assert made.chunk.index == 0 and turns == [("a", 0), ("a", 1)]
  assert made.frames.shape == (1, 2, 2, 3)
  (made,) = scheduler.step()
  assert made.chunk.index == 1 and len(turns) == 2


# ------------------------------------------------------------------ commands
def test_what_was_made_comes_out_before_a_rewind(scheduler):
  add(scheduler, "a")
  scheduler.step()
  done = scheduler.command("a", Rewind(0))
  made = scheduler.step()
  assert [each.chunk.index for each in made] == [0] and done.result() is None
  assert run(scheduler) == [("a", 0), ("a", 1)]


def test_commands_that_cannot_be_change_nothing(scheduler):
  add(scheduler, "a")
  before = scheduler.status()["a"]
  done = scheduler.command("a", Rewind(7))
  scheduler.drain()
  with pytest.raises(ValueError, match="chunk=7 is not made yet"):
    done.result()
  assert scheduler.status()["a"] == before
  with pytest.raises(ValueError, match="there is no session 'x'"):
    scheduler.command("x", Pause())
  for _ in range(scheduling.MOST_WAITING):
    scheduler.command("a", Pause())
  with pytest.raises(ValueError, match="64 commands wait already"):
    scheduler.command("a", Pause())


def test_commands_come_from_many_threads(scheduler):
  for name in "abcd":
    add(scheduler, name)
  futures = []

  def tell(name):
    futures.extend(scheduler.command(name, c()) for c in (Pause, Resume) * 30)

  threads = [threading.Thread(target=tell, args=name) for name in "abcd"]
  for thread in threads:
    thread.start()
  found = run(scheduler, 30, watch="abcd")
  for thread in threads:
    thread.join()
  scheduler.drain()
  assert not wait(futures, 1).not_done and len(futures) == 240
  for name in "abcd":  # each in its order
    chunks = [chunk for n, chunk in found if n == name]
    assert chunks == list(range(len(chunks)))


def test_a_branch_is_a_session_of_its_own(scheduler):
  add(scheduler, "a")
  run(scheduler)
  scheduler.branch("a", "b", 1)
  scheduler.drain()
  assert scheduler.status()["a"].chunk == 2 and scheduler.status()["b"].chunk == 1
  with pytest.raises(ValueError, match="there is a session 'b' already"):
    scheduler.branch("a", "b")


# ------------------------------------------------------------------ room
def test_sessions_that_do_not_fit_are_refused(turns):
  scheduler = scheduler_of(turns, sessions=2)
  assert scheduler.capacity.on_device == 8 and scheduler.capacity.in_all == 2
  for name in "ab":
    add(scheduler, name)
  with pytest.raises(ValueError, match="2 sessions are all that fit, each with 0"):
    add(scheduler, "c")
  scheduler.remove("a")
  scheduler.drain()
  add(scheduler, "c")
  with pytest.raises(ValueError, match="device_bytes=9 has no room"):
    Scheduler(turns, device_bytes=9, host_bytes=99, life=LIFE)
  with pytest.raises(ValueError, match="ahead=0"):
    scheduler_of(turns, ahead=0)


def test_who_went_least_lately_waits_on_the_host(turns):
  scheduler = scheduler_of(turns, on_device=2)
  for name in "abc":
    add(scheduler, name)

  def on_host():
    return {name for name, status in scheduler.status().items() if status.on_host}

  assert len(on_host()) == 1
  scheduler.command("a", Pause())
  found = run(scheduler, 30, watch=("b", "c"))
  assert on_host() == {"a"} and {name for name, _ in found} == {"b", "c"}
  scheduler.command("a", Resume())
  run(scheduler, 1)
  assert "a" not in on_host() and len(on_host()) == 1


# ------------------------------------------------------------------ failures
def test_one_that_breaks_leaves_the_others_alone(scheduler):
  add(scheduler, "a")
  add(scheduler, "bad", fails_at=1)
  found = run(scheduler, 12, watch=("a", "bad"))
  assert ("bad", "RuntimeError: decoder is broken") in found
  assert [c for n, c in found if n == "a"] == list(range(9))
  assert scheduler.status()["bad"].error == "RuntimeError: decoder is broken"
  done = scheduler.command("bad", Resume())
  scheduler.drain()
  with pytest.raises(ValueError, match="the session is gone: RuntimeError: decoder"):
    done.result()
  gone = scheduler.remove("bad")
  scheduler.drain()
  assert gone.result() is None and list(scheduler.status()) == ["a"]


def test_a_session_that_is_not_finite_can_be_rewound(scheduler):
  add(scheduler, "a", poisoned_at=1)
  found = run(scheduler, watch="a")
  # What was made from the poisoned chunk does not come out.
  assert found == [("a", 0), ("a", "chunk=1 is not finite")]
  scheduler.command("a", Rewind(1))
  assert run(scheduler, 3, watch="a") == [("a", 1), ("a", 2)]


def test_a_command_that_breaks_ends_its_session(scheduler):
  add(scheduler, "a")
  done = scheduler.command("a", Cut("x"))
  scheduler.drain()
  with pytest.raises(RuntimeError, match="out of memory"):
    done.result()
  assert scheduler.status()["a"].error == "RuntimeError: out of memory"


def test_a_session_that_cannot_be_made_is_not_there(scheduler):
  def make():
    raise ValueError("no such file")

  future = scheduler.add("a", make)
  assert scheduler.drain() == []
  with pytest.raises(ValueError, match="no such file"):
    future.result()
  assert scheduler.status() == {}
  add(scheduler, "a")
  assert isinstance((scheduler.step() or scheduler.step())[0], Produced)


def test_who_has_ended_answers_nobody(scheduler):
  add(scheduler, "a")
  first, gone = scheduler.command("a", Pause()), scheduler.remove("a")
  late, given_up = scheduler.snapshot("a"), scheduler.snapshot("a")
  assert given_up.cancel()
  scheduler.drain()
  assert first.result() is None and gone.result().paused
  with pytest.raises(ValueError, match="session 'a' has ended"):
    late.result(0)
  with pytest.raises(ValueError, match="there is no session 'a'"):
    scheduler.snapshot("a")


def test_a_snapshot_is_on_the_host_and_the_session_goes_on(scheduler):
  add(scheduler, "a")
  run(scheduler)
  snapshot = scheduler.snapshot("a")
  scheduler.drain()
  assert snapshot.result().on_host and snapshot.result().chunk == 2
  assert not scheduler.status()["a"].on_host
