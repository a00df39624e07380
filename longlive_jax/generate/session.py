"""A running video that is told what to do between chunks.

  session = start(engine, "A red star bounces up and down.", seed=0)
  session, chunk = advance(engine, session)       # does not wait for it
  show(chunk.frames)                              # waits for its frames
  session = apply(engine, session, Prompt("A red star circles around."))
  session = apply(engine, session, Rewind(1))
  other = branch(engine, session)                 # same past, its own future
  saved_sessions.save(engine, session, "folder")
  session = saved_sessions.load(engine, "folder")

A session is a frozen value, and what is given one returns another. `advance` and a
rewind reuse the memory of the session that they are given: keep only what they return.
`branch` copies first, and leaves its parent alone.

Commands but Rewind cost nothing: they are written into the `Script` that the next chunk
is made by, and the last one counts. A session that is rewound to chunk k, or saved
there and loaded, goes on with the same bytes under the same commands; without changes
of prompt inside a shot they are those of `stream` for the same storyboard.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.generate import commands, decoding, history, rewriting, storyboard
from longlive_jax.generate import script as scripts
from longlive_jax.generate import stream as streaming
from longlive_jax.generate.commands import Command
from longlive_jax.generate.engine import Engine
from longlive_jax.generate.history import History
from longlive_jax.generate.recache import Recache
from longlive_jax.generate.script import Made, Script
from longlive_jax.generate.storyboard import Storyboard
from longlive_jax.generate.stream import StreamState
from longlive_jax.models import vae

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
  """One video, so far.

  Attributes:
    state: of the stream: arrays on the device, or numpy on the host (`to_host`).
    script: for the next chunk. settled: as it was right after the last one.
    made: one entry a chunk.
    past: what rewinding needs.
    seed: of the noise.
    paused: `advance` refuses.
  """

  state: StreamState
  script: Script
  settled: Script
  made: tuple[Made, ...]
  past: History
  seed: int
  paused: bool = False

  @property
  def chunk(self) -> int:
    """Chunks done."""
    return len(self.made)

  @property
  def oldest(self) -> int:
    """The earliest chunk that it can be rewound to."""
    return self.past.steps[0].chunk if self.past.steps else self.chunk

  @property
  def on_host(self) -> bool:
    return isinstance(self.state.key, np.ndarray)


@dataclasses.dataclass(frozen=True)
class SessionChunk:
  """One chunk, which may still be in the making.

  Attributes:
    index: its number, from 0.
    made: how.
    latents: (1, f, y, x, c) on the device.
    finite: bool (), whether they are.
    decoded: its frames.
  """

  index: int
  made: Made
  latents: Array
  finite: Array
  decoded: decoding.Frames

  @property
  def frames(self) -> np.ndarray:
    """uint8 (t, h, w, 3) on the host, waited for.

    Raises:
      FloatingPointError: a latent is not finite. Rewind to `index`, or give it up.
    """
    if not bool(self.finite):
      raise FloatingPointError(
        f"chunk={self.index} has latents that are not finite; the weights or the "
        "guidance scale are likely at fault"
      )
    return self.decoded.fetch()[0]


# ------------------------------------------------------------------ a session's life
def start(engine: Engine, prompt: str, seed: int = 0) -> Session:
  """A session before its first chunk.

  Raises:
    ValueError: a prompt that cannot be (`commands.check_prompt`), or a seed.
  """
  if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed!r} must be a whole number from 0 to {2**32 - 1}")
  script = Script(scripts.plain(prompt))
  state = empty_state(engine, seed)
  return Session(state, script, script, made=(), past=History(), seed=seed)


def apply(engine: Engine, session: Session, command: Command) -> Session:
  """What a command makes of a session. Only a Rewind touches the device.

  Raises:
    ValueError: a Rewind too far or ahead; a prompt that cannot be; Branch and Save,
      which make something else (`branch`, `saved_sessions.save`).
  """
  match command:
    case commands.Prompt() | commands.Cut() | commands.Image():
      script = scripts.tell(session.script, command, session.chunk)
      return dataclasses.replace(session, script=script)
    case commands.Pause():
      return dataclasses.replace(session, paused=True)
    case commands.Resume():
      return dataclasses.replace(session, paused=False)
    case commands.Rewind(chunk):
      return _rewind(engine, session, chunk)
  raise ValueError(f"{type(command).__name__} is not applied to a session")


def advance(engine: Engine, session: Session) -> tuple[Session, SessionChunk]:
  """Makes the next chunk, in the memory of `session`.

  Does not wait for it, and only a recache waits for the chunk before: the device goes
  from one to the next.

  Raises:
    ValueError: the session is paused.
  """
  if session.paused:
    raise ValueError(f"the session is paused at chunk {session.chunk}; resume it first")
  session, sampling = to_device(session), engine.sampling
  state, index = session.state, session.chunk
  script, rule = scripts.for_chunk(session.script, index)
  # What can fail comes before the memory of the session is touched.
  known = None
  if script.picture is not None:
    known = engine.picture_latents(script.picture, first=index == 0)
  frame = index * sampling.frames_per_chunk
  noise = streaming.chunk_noise(state, frame, sampling.frames_per_chunk)
  moment = scripts.moment(engine, script, script.mix, cut=script.cut)
  chunk = streaming.chunk_inputs(
    engine.model.config, sampling, moment, frame, noise, known
  )
  # The last chunk may still be in the making: what it overwrote is fetched next time.
  past = session.past.on_host(but=1)
  cache, lost = state.cache, ()
  if rule is not None:
    cache, lost = rewriting.follow(rule, engine, cache, script, past)
    state = dataclasses.replace(state, cache=cache)
  lost = (*lost, history.look(cache, chunk.frames, chunk.cut, sampling))
  step = history.Step(index, session.settled, lost, state.finite)
  latents, finite, decoded, state = streaming.step(
    engine.model,
    engine.video_vae,
    state,
    chunk,
    sampling,
    decode_frames=engine.decode_frames,
    decode_tiles=engine.decode_tiles,
  )
  made = Made(
    script.prompt,
    script.shot,
    script.cut,
    "" if rule is None else str(rule),
    script.picture is not None,
  )
  settled = dataclasses.replace(script, cut=False, switch=None, picture=None)
  past = History(
    (*past.steps, step), (*past.latents, history.Latents(index, latents))
  )
  session = dataclasses.replace(
    session,
    state=state,
    script=settled,
    settled=settled,
    made=(*session.made, made),
    past=_bounded(engine, past, settled),
  )
  return session, SessionChunk(index, made, latents, finite, decoded)


def branch(engine: Engine, session: Session, chunk: int | None = None) -> Session:
  """Another session with the same past, up to `chunk` chunks or all of it.

  Without `chunk` it has been told what the parent has been told, too.

  Raises:
    ValueError: as a Rewind to `chunk`.
  """
  if chunk is not None:
    _check_reachable(engine, session, chunk)
  if not session.on_host:
    session = dataclasses.replace(session, state=_copy(session.state))
  return session if chunk is None else _rewind(engine, session, chunk)


def to_host(session: Session) -> Session:
  """The session without memory on the device; waits for what is under way."""
  if session.on_host:
    return session
  state = jax.device_get(session.state)
  return dataclasses.replace(session, state=state, past=session.past.on_host())


def to_device(session: Session) -> Session:
  """The session ready to go on; `advance` does this by itself."""
  if not session.on_host:
    return session
  state = jax.device_put(session.state, jax.local_devices()[0])
  return dataclasses.replace(session, state=state)


def warm_up(engine: Engine) -> None:
  """Compiles all that sessions run: after it, whatever they are told, nothing more."""
  session, chunk = advance(engine, start(engine, "Warm up."))
  told = commands.Prompt("Warm up again.", Recache("window+sinks"))
  session, chunk = advance(engine, apply(engine, session, told))
  session = to_host(branch(engine, session, max(1, session.oldest)))
  picture = np.zeros((engine.height, engine.width, 3), np.uint8)
  session = apply(engine, session, commands.Image(picture, "A picture."))
  session, chunk = advance(engine, session)
  chunk.frames.sum()


def storyboard_of(session: Session) -> Storyboard:
  """What was made, one prompt a chunk, as `stream` would be told.

  Raises:
    ValueError: nothing was made.
  """
  prompts = tuple(storyboard.SCENE_CUT_PREFIX * m.cut + m.prompt for m in session.made)
  return Storyboard((storyboard.Sample(prompts, tuple(m.cut for m in session.made)),))


def bytes_of(engine: Engine) -> dict[str, int]:
  """Memory that a session takes.

  Returns:
    device: cache, decoder, and what was overwritten and waits to go to the host.
    host: cache and decoder, while it waits there itself.
    history: on the host always: what history_chunks chunks overwrote, and latents.
      Each chunk that a recache wrote again adds as much as one of these.
  """
  state = jax.eval_shape(lambda: empty_state(engine, 0))
  n, window = engine.sampling.frames_per_chunk, engine.sampling.window_frames
  chunk = _bytes((state.cache.k, state.cache.v)) * n // window
  latents = 4 * n * math.prod(engine.latent_shape) * _latents_kept(engine)
  return {
    "device": _bytes(state) + 2 * chunk,
    "host": _bytes(state),
    "history": engine.history_chunks * chunk + latents,
  }


# ------------------------------------------------------------------ details
def empty_state(engine: Engine, seed: int) -> StreamState:
  """The state before the first chunk."""
  y, x, _ = engine.latent_shape
  return streaming.init_state(
    engine.model,
    engine.video_vae,
    engine.sampling,
    key=jax.random.key(seed),
    samples=np.zeros(1, np.int32),
    y=y,
    x=x,
  )


def _latents_kept(engine: Engine) -> int:
  """Of how many chunks: what rebuilds the decoder, and what a recache may write again,
  after a rewind, too."""
  window = engine.sampling.window_frames // engine.sampling.frames_per_chunk
  return engine.history_chunks + max(window, engine.decoder_chunks)


def _bounded(engine: Engine, past: History, script: Script) -> History:
  """The past that is kept: with the starts of its shots, which may be sinks."""
  sinks = max(1, engine.sink_chunks)
  told = [script, *(step.script for step in past.steps)]
  starts = {each.shot_start + i for each in told for i in range(sinks)}
  return past.bounded(engine.history_chunks, _latents_kept(engine), starts)


def _check_reachable(engine: Engine, session: Session, chunk: int) -> None:
  if chunk > session.chunk:
    raise ValueError(f"chunk={chunk} is not made yet; {session.chunk} chunks are")
  if chunk < session.oldest:
    raise ValueError(
      f"chunk={chunk} is too far back: the oldest that history_chunks="
      f"{engine.history_chunks} keeps is {session.oldest}"
    )


def _rewind(engine: Engine, session: Session, chunk: int) -> Session:
  _check_reachable(engine, session, chunk)
  if chunk == session.chunk:
    return dataclasses.replace(session, script=session.settled)
  session, past = to_device(session), session.past.on_host()
  undone = [step for step in past.steps if step.chunk >= chunk]
  latents = tuple(each for each in past.latents if each.chunk < chunk)
  state, cache = session.state, session.state.cache
  for step in reversed(undone):
    for old in reversed(step.overwritten):
      cache = history.put_back(cache, old)
  decoder = _cleared(state.decoder)
  for each in latents[-engine.decoder_chunks :]:
    _, decoder = decoding.decode(
      engine.video_vae,
      decoder,
      each.latents,
      engine.decode_frames,
      engine.decode_tiles,
    )
  numbers = chunk, chunk * engine.sampling.frames_per_chunk, undone[0].finite
  done, frame, finite = jax.device_put(
    [np.asarray(number) for number in numbers], jax.local_devices()[0]
  )
  script = undone[0].script
  return dataclasses.replace(
    session,
    state=dataclasses.replace(
      state, cache=cache, decoder=decoder, chunk=done, frame=frame, finite=finite
    ),
    script=script,
    settled=script,
    made=session.made[:chunk],
    past=History(past.steps[: len(past.steps) - len(undone)], latents),
  )


@jax.jit
def _copy(state: StreamState) -> StreamState:
  return jax.tree.map(jnp.copy, state)


# keep_unused: what is not read is else left out, and its memory not taken over.
@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _cleared(decoder: vae.DecoderState) -> vae.DecoderState:
  """The state before a clip, in the memory of another."""
  return jax.tree.map(jnp.zeros_like, decoder)


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled_programs() -> dict[str, int]:
  """How many programs sessions have compiled so far, by step."""
  steps = {
    "look": history.look,
    "put_back": history.put_back,
    "write_again": rewriting.write_again,
    "copy": _copy,
    "clear": _cleared,
  }
  return streaming.compiled_programs() | {
    name: step._cache_size() for name, step in steps.items()
  }
