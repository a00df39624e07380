"""A server of the smallest networks, and clients for it; as a program, the server.

  python tests/serving.py PORT FOLDER SAVE_EVERY
"""

import contextlib
import dataclasses
import hashlib
import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from random_weights import TINY_VAE, random_dit, random_vae
from websockets.sync.client import ClientConnection, connect

from launch import serve
from longlive_jax.generate.engine import Engine
from longlive_jax.generate.sampler import Sampling
from longlive_jax.generate.scheduler import Life
from longlive_jax.models import dit
from longlive_jax.serve import logs
from longlive_jax.serve.limits import Access, Limits
from longlive_jax.serve.shelf import Shelf
from longlive_jax.serve.studio import Studio

RED, BLUE, GREEN = "A red star.", "A blue star.", "A green star."
N = 2
FRAMES = N * TINY_VAE.temporal_factor


def embed(prompt: str) -> np.ndarray:
  seed = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
  shape = 5, dit.SIZES["test"].text_dim
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tiny_engine(fps: float = 24.0) -> Engine:
  sampling = Sampling(
    frames_per_chunk=N, window_frames=4 * N, sink_frames=N, steps=2, solver="euler",
    relative_rope=True,
  )  # fmt: skip
  networks = jax.device_put((random_dit(), random_vae()), jax.devices()[0])
  return Engine(
    *networks, sampling, embed, None, height=64, width=64, fps=fps, decode_frames=N,
    history_chunks=4,
  )  # fmt: skip


def make_studio(
  engine: Engine,
  folder: Path,
  limits: Limits | None = None,
  *,
  life: Life | None = None,
  **how: Any,
) -> Studio:
  limits = limits or Limits()
  scheduler = serve.make_scheduler(engine, ahead=2, device_gb=1, host_gb=1, life=life)
  return Studio(engine, scheduler, Shelf(folder, limits.disk_bytes), limits, **how)


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


@contextlib.contextmanager
def running(studio: Studio, access: Access | None = None) -> Iterator[str]:
  """Serves on a thread; gives 127.0.0.1:PORT when the studio is ready."""
  port = free_port()
  server = serve.make_server(studio, access or Access("127.0.0.1"), port)
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    until(lambda: studio.status == "ok" or not thread.is_alive(), 60)
    yield f"127.0.0.1:{port}"
  finally:
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def until(ready: Callable[[], Any], seconds: float = 20) -> Any:
  """Waits for something to be true; returns it."""
  end = time.monotonic() + seconds
  while not (found := ready()):
    assert time.monotonic() < end, "it never came"
    time.sleep(0.02)
  return found


def get(host: str, path: str, **headers: str) -> tuple[int, bytes]:
  request = urllib.request.Request(f"http://{host}{path}", headers=headers)
  try:
    with urllib.request.urlopen(request, timeout=30) as answer:
      return answer.status, answer.read()
  except urllib.error.HTTPError as error:
    return error.code, error.read()


@dataclasses.dataclass
class Client:
  """Says something and keeps all that it hears: events, and media by chunk."""

  socket: ClientConnection
  heard: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  media: list[tuple[int, bytes]] = dataclasses.field(default_factory=list)
  number: int = 0
  end: float = dataclasses.field(default_factory=lambda: time.monotonic() + 60)

  def hear(self, timeout: float = 20) -> dict[str, Any]:
    """The next event, with its media taken along."""
    assert time.monotonic() < self.end, "it never came"
    event = json.loads(self.socket.recv(timeout=timeout))
    self.heard.append(event)
    if event.get("media"):
      self.media.append((event["chunk"]["index"], self.socket.recv(timeout=timeout)))
    return event

  def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
    """Sends a message and waits for its answer."""
    self.number += 1
    message = {"kind": kind, "request": self.number, **fields}
    self.socket.send(json.dumps(message))
    while (event := self.hear()).get("request") != self.number:
      pass
    return event

  def wait(self, kind: str) -> dict[str, Any]:
    """The first event of a kind, heard before or not."""
    while True:
      for event in self.heard:
        if event["event"] == kind:
          return event
      self.hear()

  def told(self, kind: str) -> int:
    """How many chunks there were when a command was followed."""
    while True:
      for event in self.heard:
        if event["event"] == "told" and event["kind"] == kind:
          return event["chunk"]
      self.hear()

  def chunks(self, count: int) -> None:
    """Waits until the session has so many chunks."""
    while self.length() < count:
      self.hear()

  def length(self) -> int:
    length = 0
    for event in self.heard:
      if event["event"] == "state":
        length = len(event["chunks"])
      elif event["event"] == "chunk":
        length = event["chunk"]["index"] + 1
      elif event["event"] == "rewound":
        length = event["chunk"]
    return length


@contextlib.contextmanager
def client(host: str, **how: Any) -> Iterator[Client]:
  where = f"ws://{host}/socket"
  with connect(where, max_size=None, close_timeout=1, **how) as websocket:
    yield Client(websocket)


if __name__ == "__main__":
  port, folder, save_every = sys.argv[1:]
  jax.config.update("jax_disable_most_optimizations", True)
  logs.to_stderr()
  studio = make_studio(tiny_engine(), Path(folder), save_every=int(save_every))
  serve.make_server(studio, Access("127.0.0.1"), int(port)).run()
