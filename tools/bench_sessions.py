"""Measures sessions that share a device, with random weights: speed, switches, memory.

  python tools/bench_sessions.py --size=ti2v-5b --vae=wan2.2 --height=704 --width=1280 \
    --kv_format=nvfp4 --out=sessions.json

  turns       frames a second of 1, 2 and 4 sessions together, one chunk after another
              by generate/scheduler.py, every chunk fetched to the host; and how long a
              session waits from one of its chunks to the next
  batched     the same number of videos as one batch of `stream` (--batched)
  switches    for each recache rule: chunks that still come out under the old prompt
              after it was changed, and seconds until the first frames under the new
              one are on the host; `again_s` is what the rule adds to a chunk
  moves       seconds to rewind by one and by all chunks of the history, to branch, to
              go to host memory and to come back
  bytes       of a session: on the device, on the host, of its history

Chunks count from where the window is full. Compiling is not timed, but counted:
`compilations` after the warm-up must be 0.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bench_memory
import bench_networks
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from longlive_jax.generate import networks, recache, report
from longlive_jax.generate import session as sessions
from longlive_jax.generate import stream as streaming
from longlive_jax.generate.commands import Prompt, Rewind
from longlive_jax.generate.engine import Engine
from longlive_jax.generate.sampler import Sampling
from longlive_jax.generate.scheduler import Produced, Scheduler
from longlive_jax.layers import kv_slots
from longlive_jax.quant import weights

RULES = ("none", "last:1", "window", "window+sinks", "blend:2")

# Flags belong to the process only when this file is the program: tests import it.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_SIZE = flags.DEFINE_string("size", "test", "Transformer size.", flag_values=_FLAGS)
_VAE = flags.DEFINE_string("vae", "test", "VAE size.", flag_values=_FLAGS)
_HEIGHT = flags.DEFINE_integer("height", 64, "Pixels.", flag_values=_FLAGS)
_WIDTH = flags.DEFINE_integer("width", 64, "Pixels.", flag_values=_FLAGS)
_STEPS = flags.DEFINE_integer("steps", 4, "Solver steps.", flag_values=_FLAGS)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Precision.", flag_values=_FLAGS
)
_PRECISION = flags.DEFINE_enum(
  "precision", "", ["", *weights.MODES], "Of the weights.", flag_values=_FLAGS
)
_KV_FORMAT = flags.DEFINE_enum(
  "kv_format", "", list(kv_slots.NAMES), "Of the cache.", flag_values=_FLAGS
)
_DECODE_FRAMES = flags.DEFINE_integer(
  "decode_frames", 1, "Latent frames a decode.", flag_values=_FLAGS
)
_HISTORY = flags.DEFINE_integer(
  "history_chunks", 4, "Chunks to rewind.", 1, flag_values=_FLAGS
)
_SESSIONS = flags.DEFINE_multi_integer(
  "sessions", [1, 2, 4], "How many at a time.", flag_values=_FLAGS
)
_CHUNKS = flags.DEFINE_integer("chunks", 4, "Timed, a session.", 2, flag_values=_FLAGS)
_BATCHED = flags.DEFINE_bool("batched", False, "Batches, too.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", "", "JSON file.", flag_values=_FLAGS)


def random_engine(
  size: str, vae_size: str, dtype: Any, precision: str, **settings: Any
) -> Engine:
  """An Engine with random weights, committed to the first device."""
  model, _ = bench_networks.random_networks(size, vae_size, dtype, precision)
  model = jax.device_put(model, jax.local_devices()[0])
  # That one's VAE has no encoder, for which generation has no use; pictures have.
  video_vae = networks.load(networks.find("vae", vae_size, "random"), dtype)
  config = model.config

  @functools.cache
  def embed(prompt: str) -> np.ndarray:
    rng = np.random.default_rng(list(prompt.encode()))
    return rng.standard_normal((config.text_len, config.text_dim), np.float32)

  return Engine(model, video_vae, embed=embed, negative=None, **settings)


def produced(scheduler: Scheduler) -> Iterator[Produced]:
  """Steps for ever; every chunk is shown at once."""
  while True:
    for made in scheduler.step():
      if made.error:
        raise RuntimeError(f"{made.name}: {made.error}")
      scheduler.shown(made.name, made.chunk.index + 1)
      yield made


def scheduler_of(engine: Engine, count: int) -> Scheduler:
  """With `count` sessions whose window is full."""
  scheduler = Scheduler(engine, device_bytes=1e15, host_bytes=1e15)
  for i in range(count):
    scheduler.add(str(i), functools.partial(sessions.start, engine, "A prompt.", i))
  full = engine.sampling.window_frames // engine.sampling.frames_per_chunk
  for made in produced(scheduler):
    if made.name == str(count - 1) and made.chunk.index >= full:
      return scheduler
  raise AssertionError


def turns(engine: Engine, count: int, chunks: int) -> dict[str, float]:
  """Speed of `count` sessions, each of which makes `chunks` chunks."""
  scheduler = scheduler_of(engine, count)
  stamps: dict[str, list[float]] = {str(i): [] for i in range(count)}
  frames, began = 0, time.perf_counter()
  for made in produced(scheduler):
    stamps[made.name].append(time.perf_counter())
    frames += len(made.frames)
    if all(len(each) >= chunks for each in stamps.values()):
      break
  seconds = time.perf_counter() - began
  gaps = np.concatenate([np.diff(each) for each in stamps.values()])
  return {
    "fps": frames / seconds,
    "fps_each": frames / seconds / count,
    "chunk_gap_s_median": float(np.median(gaps)),
    "chunk_gap_s_largest": float(np.max(gaps)),
  }


def batched(engine: Engine, count: int, chunks: int) -> dict[str, float]:
  """Speed of one stream of `count` videos."""
  sampling = engine.sampling
  full = sampling.window_frames // sampling.frames_per_chunk
  y, x, _ = engine.latent_shape
  index = np.zeros((full + chunks + 1, count), np.int32)
  story = streaming.Story(
    engine.embed("A prompt.")[None], None, index, index > 0, index
  )
  state = streaming.init_state(
    engine.model, engine.video_vae, sampling,
    key=jax.random.key(0), samples=np.arange(count), y=y, x=x,
  )  # fmt: skip
  frames = 0
  for chunk in streaming.stream(
    engine.model,
    engine.video_vae,
    state,
    story,
    sampling,
    decode_frames=engine.decode_frames,
  ):
    ready = chunk.frames
    if chunk.index == full:
      began = time.perf_counter()
    if chunk.index > full:
      frames += ready.shape[0] * ready.shape[1]
  fps = frames / (time.perf_counter() - began)
  return {"fps": fps, "fps_each": fps / count}


def switches(engine: Engine, rules: Sequence[str]) -> dict[str, dict[str, float]]:
  """Latency of a change of prompt, by rule, of a session alone on the device."""
  found = {}
  scheduler = scheduler_of(engine, 1)
  made = produced(scheduler)
  session, plain = chunk_seconds(engine, full_session(engine), "")
  for number, rule in enumerate(rules):
    next(made)
    told, late = time.perf_counter(), 0
    scheduler.command("0", Prompt(f"Prompt {number}.", recache.parse(rule)))
    while next(made).chunk.made.recache != rule:
      late += 1
    seconds = time.perf_counter() - told
    session, again = chunk_seconds(engine, session, rule)
    found[rule] = {
      "chunks_under_the_old": late,
      "seconds": seconds,
      "again_s": again - plain,
    }
  return found


def chunk_seconds(
  engine: Engine, session: sessions.Session, rule: str
) -> tuple[sessions.Session, float]:
  """Median of three chunks, each right after a change of prompt if there is a rule."""
  seconds = []
  for number in range(3):
    if rule:
      told = Prompt(f"{rule}, {number}.", recache.parse(rule))
      session = sessions.apply(engine, session, told)
    began = time.perf_counter()
    session, chunk = sessions.advance(engine, session)
    chunk.frames.sum()
    seconds.append(time.perf_counter() - began)
  return session, float(np.median(seconds))


def full_session(engine: Engine) -> sessions.Session:
  """A session whose window is full and whose history is."""
  session = sessions.start(engine, "A prompt.", 0)
  window = engine.sampling.window_frames // engine.sampling.frames_per_chunk
  for _ in range(max(window, engine.history_chunks) + 1):
    session, chunk = sessions.advance(engine, session)
  chunk.frames.sum()
  return session


def moves(engine: Engine) -> dict[str, float]:
  """Seconds to go back, to branch, and to and from the host."""
  session = full_session(engine)
  seconds = {}

  def timed(name: str, move: Callable[[], sessions.Session]) -> sessions.Session:
    began = time.perf_counter()
    moved = move()
    jax.block_until_ready(moved.state)
    seconds[name] = time.perf_counter() - began
    return moved

  last, first = Rewind(session.chunk - 1), Rewind(session.oldest)
  other = timed("branch_s", lambda: sessions.branch(engine, session))
  timed("rewind_by_one_s", lambda: sessions.apply(engine, other, last))
  host = timed("to_host_s", lambda: sessions.to_host(session))
  back = timed("to_device_s", lambda: sessions.to_device(host))
  timed("rewind_by_all_s", lambda: sessions.apply(engine, back, first))
  return seconds


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  sampling = Sampling(steps=_STEPS.value, kv_format=_KV_FORMAT.value)
  engine = random_engine(
    _SIZE.value,
    _VAE.value,
    jnp.dtype(_DTYPE.value),
    _PRECISION.value,
    sampling=sampling,
    height=_HEIGHT.value,
    width=_WIDTH.value,
    decode_frames=_DECODE_FRAMES.value,
    history_chunks=_HISTORY.value,
  )
  began = time.perf_counter()
  sessions.warm_up(engine)
  figures: dict[str, Any] = {
    **report.environment(),
    "flags": {flag.name: flag.value for flag in (
      _SIZE, _VAE, _HEIGHT, _WIDTH, _DTYPE, _PRECISION, _DECODE_FRAMES, _HISTORY,
      _CHUNKS,
    )},
    "sampling": dataclasses.asdict(sampling),
    "warm_up_s": time.perf_counter() - began,
    "bytes": sessions.bytes_of(engine),
  }  # fmt: skip
  with bench_memory.compilations() as compiled:
    figures["turns"] = {
      count: turns(engine, count, _CHUNKS.value) for count in _SESSIONS.value
    }
    figures["switches"] = switches(engine, RULES)
    figures["moves"] = moves(engine)
  figures["compilations"] = len(compiled)
  figures["peak_bytes"] = report.peak_bytes()
  if _BATCHED.value:
    figures["batched"] = {
      count: batched(engine, count, _CHUNKS.value) for count in _SESSIONS.value
    }
  for name in ("bytes", "turns", "batched", "switches", "moves", "compilations"):
    print(f"{name:14} {figures.get(name)}")
  if _OUT.value:
    report.write_json(_OUT.value, figures)


if __name__ == "__main__":
  app.run(main)
