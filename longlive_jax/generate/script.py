"""What a session is being told: plain values, which commands change for nothing.

  script = tell(script, Prompt("A blue star."), chunk)     # as often as wanted
  script, rule = for_chunk(script, chunk)                  # when the chunk is made

The text of a chunk is a mix of prompts, by weight: one prompt, or two and more while a
change of prompt is blended over several chunks.
"""

import dataclasses

import numpy as np

from longlive_jax.generate import commands
from longlive_jax.generate.engine import Engine
from longlive_jax.generate.recache import Recache
from longlive_jax.generate.storyboard import SCENE_CUT_PREFIX
from longlive_jax.generate.stream import Moment

Mix = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Blend:
  """The text goes over from `source` in `chunks` parts, `done` of which are made."""

  source: Mix
  done: int
  chunks: int


@dataclasses.dataclass(frozen=True)
class Script:
  """What the next chunk is made by.

  Attributes:
    prompt: of the shot.
    shot, shot_start: its number, and its first chunk.
    cut: the next chunk starts a new shot.
    switch: rule for the memory, if the prompt changed since the last chunk.
    picture: uint8 (h, w, 3) that the next chunk starts from, or None.
    mix: text of the last chunk.
    blend: a change of prompt that is under way, or None.
  """

  prompt: str
  shot: int = 0
  shot_start: int = 0
  cut: bool = False
  switch: Recache | None = None
  picture: np.ndarray | None = dataclasses.field(default=None, compare=False)
  mix: Mix = ()
  blend: Blend | None = None


@dataclasses.dataclass(frozen=True)
class Made:
  """How a chunk came about: for a timeline and a storyboard.

  Attributes:
    prompt: as it was typed; shot: its number; cut: the chunk started it.
    recache: rule of a change of prompt right before the chunk, or ''.
    pictured: the chunk started from a picture.
  """

  prompt: str
  shot: int
  cut: bool = False
  recache: str = ""
  pictured: bool = False


def plain(text: str) -> str:
  """A prompt that can be, without the prefix that only a cut puts in front of it."""
  text = commands.check_prompt(text)
  return commands.check_prompt(text.removeprefix(SCENE_CUT_PREFIX))


def tell(
  script: Script, command: commands.Prompt | commands.Cut | commands.Image, chunk: int
) -> Script:
  """The script after a command, with `chunk` chunks done.

  Raises:
    ValueError: a prompt or a picture that cannot be.
  """
  prompt = plain(command.text)
  if isinstance(command, commands.Prompt):
    # In a shot without a chunk there is nothing to recache.
    inside = chunk > script.shot_start and not script.cut
    rule = command.recache if inside else None
    return dataclasses.replace(script, prompt=prompt, switch=rule)
  picture = command.frame if isinstance(command, commands.Image) else None
  if picture is not None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
      raise ValueError(
        f"image is {picture.dtype} {picture.shape}; must be uint8 (h, w, 3)"
      )
  return dataclasses.replace(
    script, prompt=prompt, cut=chunk > 0, switch=None, picture=picture
  )


def for_chunk(script: Script, index: int) -> tuple[Script, Recache | None]:
  """The script with shot and text of chunk `index`, and the rule that is followed."""
  target, blend, rule = ((script.prompt, 1.0),), script.blend, script.switch
  if script.cut:
    script = dataclasses.replace(script, shot=script.shot + 1, shot_start=index)
    rule = blend = None
  elif rule is not None:
    if blend is None and script.mix == target:
      rule = None  # changed, and changed back
    blend = None
    if rule is not None and rule.kind == "blend":
      blend = Blend(script.mix, 0, rule.chunks)
  mix = target
  if blend is not None:
    blend = dataclasses.replace(blend, done=blend.done + 1)
    weight = blend.done / blend.chunks
    if weight == 1:
      blend = None
    else:
      old = ((text, part * (1 - weight)) for text, part in blend.source)
      # What hardly counts goes: changing all the time would make the list grow.
      mix = (*(each for each in old if each[1] > 0.01), (script.prompt, weight))
  return dataclasses.replace(script, mix=mix, blend=blend), rule


def moment(engine: Engine, script: Script, mix: Mix, *, cut: bool) -> Moment:
  """What a chunk of the shot shows; the first of a later one is told of the cut."""
  prefix = SCENE_CUT_PREFIX * cut
  (first, weight), *others = mix
  text = engine.embed(prefix + first)
  if others:
    text = sum((part * engine.embed(each) for each, part in others), weight * text)
  return Moment(
    text=np.asarray(text, np.float32)[None],
    negative=engine.negative,
    cut=np.array([cut]),
    shot=np.array([script.shot], np.int32),
  )
