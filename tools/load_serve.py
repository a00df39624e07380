"""Loads a server on this machine, and says whether it held.

  python tools/load_serve.py --minutes=10 --out=FILE

Starts launch/serve.py in a process of its own, then 8 sessions with 4 watchers each,
one of which tells its session something every few seconds. The report has errors,
events out of order, the server's memory over time and its own numbers. Exit code 1: an
error, an order that was not kept, or memory that grew by more than 5% over the second
half (in the first, programs and buffers come).
"""

import asyncio
import dataclasses
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from absl import app, flags
from websockets.asyncio.client import connect

ROOT = Path(__file__).parents[1]
GROWTH = 0.05
PROMPTS = [
  f"A {colour} {shape} {motion} on the {place}."
  for colour in ("red", "blue", "green")
  for shape in ("star", "circle", "ring")
  for motion in ("bounces up and down", "circles around")
  for place in ("sand", "grass", "water")
]


@dataclasses.dataclass
class Seen:
  """What one watcher saw."""

  chunks: int = 0
  restarts: int = 0
  out_of_order: int = 0
  errors: list[str] = dataclasses.field(default_factory=list)
  next: int = 0

  def hear(self, event: dict[str, Any]) -> None:
    """Checks that chunks come one after the other, from where the state says."""
    match event["event"]:
      case "state":
        self.restarts += 1
        self.next = len(event["chunks"])
      case "rewound":
        self.next = event["chunk"]
      case "chunk":
        index = event["chunk"]["index"]
        # Right after the state, the newest chunk comes once more.
        self.out_of_order += index not in (self.next, self.next - 1)
        self.next = index + 1
        self.chunks += 1
      case "error" | "problem":
        self.errors.append(event["message"])
      case "status" if event["error"]:
        self.errors.append(event["error"])


async def follow(socket, seen: Seen) -> None:
  async for message in socket:
    if isinstance(message, str):
      seen.hear(json.loads(message))


async def watch(where: str, hello: dict[str, Any], seen: Seen, end: float) -> None:
  async with connect(where, max_size=None) as socket:
    await socket.send(json.dumps(hello))
    try:
      await asyncio.wait_for(follow(socket, seen), end - time.monotonic())
    except TimeoutError:
      pass


async def lead(where: str, seed: int, found: asyncio.Future, seen: Seen, end: float):
  """Makes a session, watches it and steers it."""
  luck = random.Random(seed)
  async with connect(where, max_size=None) as socket:
    create = {"kind": "create", "text": luck.choice(PROMPTS), "seed": seed}
    await socket.send(json.dumps(create))
    state = json.loads(await socket.recv())
    seen.hear(state)
    found.set_result(state["session"])
    following = asyncio.create_task(follow(socket, seen))
    while (left := end - time.monotonic()) > 0:
      await asyncio.sleep(min(left, luck.uniform(5, 20)))
      text = luck.choice(PROMPTS)
      told = luck.choice([
        [{"kind": "prompt", "text": text}],
        [{"kind": "cut", "text": text}],
        [{"kind": "pause"}, {"kind": "resume"}],
        [{"kind": "save"}],
        [{"kind": "rewind", "chunk": max(0, seen.next - 2)}],
      ])  # fmt: skip
      for message in told:
        await socket.send(json.dumps(message))
    following.cancel()


async def load(host: str, sessions: int, watchers: int, end: float) -> list[Seen]:
  where, seen, tasks = f"ws://{host}/socket", [], []
  for number in range(sessions):
    found = asyncio.get_running_loop().create_future()
    seen.append(Seen())
    tasks.append(asyncio.create_task(lead(where, number, found, seen[-1], end)))
    hello = {"kind": "watch", "session": await found}
    for _ in range(watchers // sessions - 1):
      seen.append(Seen())
      tasks.append(asyncio.create_task(watch(where, hello, seen[-1], end)))
  await asyncio.gather(*tasks)
  return seen


def numbers(host: str) -> dict[str, float]:
  """The server's metrics."""
  with urllib.request.urlopen(f"http://{host}/metrics", timeout=60) as answer:
    lines = answer.read().decode().splitlines()
  pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
  return {name.removeprefix("longlive_"): float(value) for name, value in pairs}


async def measure(host: str, every: float, end: float) -> list[dict[str, float]]:
  found = []
  while time.monotonic() < end:
    found.append(await asyncio.to_thread(numbers, host))
    await asyncio.sleep(every)
  return found


async def run(host: str, given: flags.FlagValues) -> dict[str, Any]:
  end = time.monotonic() + 60 * given.minutes
  every = 60 * given.minutes / 40
  seen, samples = await asyncio.gather(
    load(host, given.sessions, given.watchers, end), measure(host, every, end)
  )
  memory = [sample['memory_bytes{of="process"}'] for sample in samples]
  half, quarter = len(memory) // 2, max(1, len(memory) // 4)
  before, after = max(memory[half : half + quarter]), max(memory[-quarter:])
  last = samples[-1]
  return {
    "minutes": given.minutes,
    "sessions": given.sessions,
    "watchers": len(seen),
    "chunks_seen": sum(each.chunks for each in seen),
    "least_chunks_of_a_watcher": min(each.chunks for each in seen),
    "restarts_of_slow_watchers": sum(each.restarts - 1 for each in seen),
    "out_of_order": sum(each.out_of_order for each in seen),
    "errors": sorted({error for each in seen for error in each.errors}),
    "server": {name: value for name, value in last.items() if value == value},
    "memory_bytes": memory,
    "memory_growth_second_half": after / before - 1,
  }


def main(argv: list[str]) -> None:
  given = flags.FLAGS
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
  host = f"127.0.0.1:{port}"
  with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
    server = subprocess.Popen(
      [sys.executable, str(ROOT / "launch" / "serve.py"), f"--port={port}",
       f"--folder={folder}", f"--sessions={given.sessions}"],
      stderr=log,
    )  # fmt: skip
    try:
      wait_for(host, server)
      report = asyncio.run(run(host, given))
    finally:
      server.terminate()
      server.wait()
    log.seek(0)
    events = [json.loads(line) for line in log if line.startswith("{")]
  failed = [event for event in events if event["level"] == "error"]
  report["log_errors"] = failed
  print(json.dumps(report, indent=2))
  if given.out:
    Path(given.out).write_text(json.dumps(report, indent=2) + "\n")
  grew = report["memory_growth_second_half"] > GROWTH
  if grew or failed or report["errors"] or report["out_of_order"]:
    sys.exit(1)


def wait_for(host: str, server: subprocess.Popen) -> None:
  while server.poll() is None:
    try:
      urllib.request.urlopen(f"http://{host}/health", timeout=10).close()
      return
    except OSError:  # not there yet, or 503 while it compiles
      time.sleep(0.5)
  raise RuntimeError("the server did not start")


if __name__ == "__main__":
  flags.DEFINE_float("minutes", 10, "How long.")
  flags.DEFINE_integer("sessions", 8, "Sessions.")
  flags.DEFINE_integer("watchers", 32, "Connections, over all sessions.")
  flags.DEFINE_string("out", None, "Where to write the report, too.")
  app.run(main)
