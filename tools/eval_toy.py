"""Measures the toy model with the toy world's detectors; the quality table.

Three tests on prompts that training never saw (longlive_jax/data/toy_world.py):

  single   one shot of a held-out combination: are shape, colour, background and
           motion those of the caption?
  shots    four shots: does the subject stay the same?
  minute   the last shot of a 60-second video of many shots

Later shots are captioned by back references that name neither shape nor colour
("the same subject ..."), so that only memory can tell; with --captions=full they
describe the subject again, as a storyboard of a user would.

Only shots that a score looks at are decoded; where earlier ones are left out, decoding
starts one chunk before the shot, so that its frames have a past. `shots` and `minute`
run once more without sinks, to show what they do.

  python tools/eval_toy.py
  python tools/eval_toy.py --config.weights=outputs/train_toy/model \
      --config.vae_weights=outputs/toy_vae --config.steps=8 --config.guidance=3
  python tools/eval_toy.py --config.loras=outputs/distill_toy_4/model/lora \
      --config.steps=4 --config.guidance=1

Networks and sampling are those of launch/generate.py: configs/generate.py:toy, with
overrides as --config.NAME=VALUE; by default the networks that ship with the package.
The table is printed, and written with all settings to --out.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from variants import detecting_pool

from longlive_jax.data import detectors, scores, toy_world
from longlive_jax.data.detectors import Detection
from longlive_jax.data.toy_world import Scene
from longlive_jax.generate import networks, report, storyboard
from longlive_jax.generate.sampler import Sampling
from longlive_jax.generate.stream import Story, StreamState, init_state, stream
from longlive_jax.models import dit, pixels, umt5, vae
from longlive_jax.models.text import Tokenizer

FOUR_SHOTS = (2, 2, 2, 2)  # chunks
MINUTE = (4,) * 11 + (2,)  # 46 chunks: 1469 frames, 61 seconds
TESTS = ("single", "shots", "minute")

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  str(Path(__file__).parents[1] / "configs" / "generate.py") + ":toy",
  "Networks and sampling; override with --config.NAME=VALUE.",
  flag_values=_FLAGS,
)
_TESTS = flags.DEFINE_multi_enum(
  "test", list(TESTS), list(TESTS), "Which tests to run.", flag_values=_FLAGS
)
_VIDEOS = flags.DEFINE_integer(
  "videos", 200, "Videos of single and shots.", 1, flag_values=_FLAGS
)
_MINUTES = flags.DEFINE_integer(
  "minutes", 100, "Videos of minute.", 1, flag_values=_FLAGS
)
_CHUNKS = flags.DEFINE_integer(
  "chunks", 2, "Chunks of a video of single.", 1, flag_values=_FLAGS
)
_BATCH = flags.DEFINE_integer(
  "batch", 50, "Videos generated together.", 1, flag_values=_FLAGS
)
_CAPTIONS = flags.DEFINE_enum(
  "captions", "reference", ["reference", "full"], "Captions of later shots.",
  flag_values=_FLAGS,
)
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts and noise.", flag_values=_FLAGS)
_SINKS = flags.DEFINE_enum(
  "sinks", "both", ["both", "on", "off"], "With, without.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string(
  "out", "tools/results/eval_toy.json", "Report.", flag_values=_FLAGS
)

# One batch of scenes, the number of its first one, and the numbers of the chunks that
# are looked at -> for each chunk in turn its frames, uint8 (b, t, h, w, 3), or None.
Generate = Callable[[Sequence[Scene], int, set[int]], Iterable[np.ndarray | None]]
Pool = concurrent.futures.Executor


@dataclasses.dataclass(frozen=True)
class Networks:
  """The three networks and the tokenizer of the text encoder."""

  model: dit.CausalDiT
  vae: vae.VideoVAE
  text: umt5.UMT5Encoder
  tokenizer: Tokenizer


# ---------------------------------------------------------------- scenes to frames


def load_networks(config: ml_collections.ConfigDict) -> Networks:
  """Reads the checkpoints that a generate config names.

  Raises:
    ValueError: one is missing, or they do not fit each other.
  """
  choice = networks.Choice(**networks.pick(networks.Choice, config))
  if choice.weights == "random":
    raise ValueError("weights='random' cannot be evaluated; give a folder")
  sources = networks.find_all(choice)
  return Networks(
    model=networks.load(sources.dit, config.dtype),
    vae=networks.load(sources.vae, config.dtype),
    text=networks.load(sources.text, config.dtype),
    tokenizer=sources.tokenizer,
  )


def sampling_of(config: ml_collections.ConfigDict, *, sinks: bool) -> Sampling:
  """Sampling settings of a generate config, as they are or with sinks off."""
  settings = networks.pick(Sampling, config)
  if not sinks:
    settings |= {"sink_frames": 0, "multi_shot_sink": False, "clean_recache": False}
  return Sampling(**settings)


@jax.jit
def _embed(encoder: umt5.UMT5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
  return encoder(ids, mask).astype(jnp.float32)


@jax.jit
def _decode(
  network: vae.VideoVAE, state: vae.DecoderState, latents: jax.Array
) -> tuple[jax.Array, jax.Array, vae.DecoderState]:
  frames, dropped, state = vae.decode_chunk(network, state, latents)
  return pixels.to_uint8(frames), dropped, state


def story_of(
  nets: Networks,
  sampling: Sampling,
  scenes: Sequence[Scene],
  negative_prompt: str = "",
) -> Story:
  """The scenes (all with the same number of chunks) as one batch's story."""
  prompts = [scores.scene_prompts(scene) for scene in scenes]
  board = storyboard.from_prompt_lists(prompts)
  arrays = board.arrays()
  texts = [*arrays.prompts, negative_prompt]
  # Always the same number of rows: every batch has other prompts, one program does.
  rows = len(scenes) * len(scenes[0].shots) * 2 + 1
  texts += [""] * (rows - len(texts))
  embedded = np.asarray(_embed(nets.text, *nets.tokenizer(texts)))
  return Story(
    embeddings=embedded[: len(arrays.prompts)],
    negative=embedded[len(arrays.prompts)] if sampling.branches == 2 else None,
    prompt_index=arrays.prompt_index,
    cut=arrays.cut,
    shot=arrays.shot,
  )


def start_of(
  nets: Networks, sampling: Sampling, first: int, videos: int, *, seed: int, size: int
) -> StreamState:
  """The state before the first chunk; video i is sample `first + i`.

  So a video's noise does not depend on how videos are batched.
  """
  return init_state(
    nets.model,
    None,
    sampling,
    key=jax.random.key(seed),
    samples=first + np.arange(videos),
    y=size // 16,
    x=size // 16,
  )


def decode(
  video_vae: vae.VideoVAE, chunks: Iterable[jax.Array], wanted: set[int]
) -> Iterator[np.ndarray | None]:
  """Latents (b, f, y, x, c) of chunk 0, 1 ... to frames of the wanted ones.

  Yields:
    For each chunk its frames, uint8 (b, t, h, w, 3), or None if it is not wanted.
  """
  decoder = None
  for index, latents in enumerate(chunks):
    if not wanted & {index, index + 1}:
      decoder = None
      yield None
      continue
    if decoder is None:
      b, _, y, x, _ = latents.shape
      decoder = vae.init_decoder_state(video_vae, b, y, x)
    frames, dropped, decoder = _decode(video_vae, decoder, latents)
    frames = np.asarray(frames)[:, int(dropped[0]) :]
    yield frames if index in wanted else None


def generate(
  nets: Networks,
  sampling: Sampling,
  scenes: Sequence[Scene],
  first: int,
  wanted: set[int],
  *,
  seed: int,
  size: int,
  negative_prompt: str = "",
) -> Iterator[np.ndarray | None]:
  """Generates the scenes as one batch: `story_of`, `start_of`, `stream`, `decode`."""
  story = story_of(nets, sampling, scenes, negative_prompt)
  state = start_of(nets, sampling, first, len(scenes), seed=seed, size=size)
  chunks = stream(nets.model, None, state, story, sampling)
  yield from decode(nets.vae, (chunk.latents for chunk in chunks), wanted)


# ---------------------------------------------------------------- frames to numbers


def detect_shots(
  generate_batch: Generate,
  scenes: Sequence[Scene],
  batch: int,
  pool: Pool,
  shots: Sequence[int] | None = None,
) -> list[list[Detection]]:
  """Generates all scenes and detects the given shots (default all): a list a scene.

  The scenes must have the same shots in length, so that a whole batch finishes a shot
  at once and its frames can be dropped.
  """
  lengths = [shot.chunks for shot in scenes[0].shots]
  if any([shot.chunks for shot in scene.shots] != lengths for scene in scenes):
    raise ValueError("all scenes must have shots of the same lengths")
  ends = np.cumsum(lengths).tolist()
  shots = range(len(lengths)) if shots is None else shots
  wanted = {c for s in shots for c in range(ends[s] - lengths[s], ends[s])}
  futures: list[list[concurrent.futures.Future]] = [[] for _ in scenes]
  for start in range(0, len(scenes), batch):
    part = list(scenes[start : start + batch])
    # The last batch is filled up, so that it needs no program of its own.
    filled = part + part[:1] * (batch - len(part))
    chunks: list[np.ndarray] = []
    for number, frames in enumerate(generate_batch(filled, start, wanted), 1):
      if frames is None:
        continue
      chunks.append(frames)
      if number in ends:
        shot = np.concatenate(chunks, axis=1)
        chunks = []
        for i in range(len(part)):
          futures[start + i].append(pool.submit(detectors.detect, shot[i]))
    logging.info("generated %d of %d videos", start + len(part), len(scenes))
  return [[future.result() for future in row] for row in futures]


def evaluate(
  test: str,
  generate_batch: Generate,
  pool: Pool,
  *,
  videos: int,
  batch: int,
  chunks: int,
  seed: int,
  back_references: bool = True,
) -> dict[str, float]:
  """Runs one of TESTS; its scores by name."""
  batch = min(batch, videos)
  if test == "single":
    scenes = [
      dataclasses.replace(
        scene, shots=(dataclasses.replace(scene.shots[0], chunks=chunks),)
      )
      for scene in toy_world.heldout_prompts(videos, seed)
    ]
    found = detect_shots(generate_batch, scenes, batch, pool)
    return scores.score_last_shot(scenes, found) | scores.motion_of(found)
  lengths = FOUR_SHOTS if test == "shots" else MINUTE
  first = seed * 1_000_000
  scenes = [
    toy_world.heldout_scene(first + i, lengths, back_references=back_references)
    for i in range(videos)
  ]
  ends = (0, len(lengths) - 1) if test == "minute" else None
  found = detect_shots(generate_batch, scenes, batch, pool, ends)
  if test == "shots":
    measured = scores.score_identity(found) | scores.score_later_shots(scenes, found)
  else:
    measured = scores.score_last_shot(scenes, found) | scores.score_subject(found)
  return measured | scores.motion_of(found)


# ---------------------------------------------------------------- the table


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
  """Markdown of results[test][sinks 'on' or 'off'][score]."""
  lines = ["| test | score | with sinks | without |", "|---|---|---|---|"]
  for test, columns in results.items():
    for name in next(iter(columns.values())):
      cells = [
        _cell(name, columns[sinks][name]) if sinks in columns else ""
        for sinks in ("on", "off")
      ]
      lines.append(f"| {test} | {name} | {cells[0]} | {cells[1]} |")
  return "\n".join(lines)


def _cell(name: str, value: float) -> str:
  return f"{value:.3f}" if name in ("drift", scores.PIXELS) else f"{100 * value:.1f}%"


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  config, began = _CONFIG.value, time.perf_counter()
  out = Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  nets = load_networks(config)
  results: dict[str, dict[str, dict[str, float]]] = {}
  with detecting_pool() as pool:
    for test in _TESTS.value:
      results[test] = {}
      for sinks in ("on", "off"):
        # Without a cut and within the window there is nothing for a sink to keep.
        if _SINKS.value not in ("both", sinks) or (test, sinks) == ("single", "off"):
          continue
        run = functools.partial(
          generate,
          nets,
          sampling_of(config, sinks=sinks == "on"),
          seed=_SEED.value,
          size=config.height,
          negative_prompt=config.negative_prompt,
        )
        results[test][sinks] = evaluate(
          test,
          run,
          pool,
          videos=_MINUTES.value if test == "minute" else _VIDEOS.value,
          batch=_BATCH.value,
          chunks=_CHUNKS.value,
          seed=_SEED.value,
          back_references=_CAPTIONS.value == "reference",
        )
        logging.info("%s, sinks %s: %s", test, sinks, results[test][sinks])
  results = {test: columns for test, columns in results.items() if columns}
  chosen = (_VIDEOS, _MINUTES, _CHUNKS, _BATCH, _CAPTIONS, _SEED)
  flag_values = {flag.name: flag.value for flag in chosen}
  content = {
    "results": results,
    "flags": flag_values,
    "config": config.to_dict(),
    "seconds": time.perf_counter() - began,
    **report.environment(),
  }
  report.write_json(out, content)
  print(table(results))


if __name__ == "__main__":
  app.run(main)
