"""Distils the causal DiT into a generator of few steps, as adapters or whole.

Distribution matching on the generator's own rollouts; only prompts are needed, and
images for image-to-video. The commands are in configs/distill.py. A run that is started
again with the same workdir goes on where its last checkpoint was, to the same losses
bit for bit; on another number of devices, to the same losses but for rounding. Ctrl-C
or SIGTERM saves first. At the end (and only then) `workdir/model` holds the averaged
generator: `lora` for --config.loras of launch/generate.py and `peft` for PEFT, or `dit`
if it was trained whole.
"""

import dataclasses
import functools
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from longlive_jax.checkpoint import lora, store
from longlive_jax.generate import adapters, networks, request
from longlive_jax.generate.precision import Precision
from longlive_jax.generate.sampler import Sampling
from longlive_jax.generate.storyboard import Storyboard
from longlive_jax.layers import remat
from longlive_jax.models import dit, text
from longlive_jax.parallel import mesh as meshes
from longlive_jax.programs import keep_programs
from longlive_jax.train import distill, dmd, loop, ode, self_forcing, stories
from longlive_jax.train import lora as train_lora
from longlive_jax.train import state as train_state

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  "config", str(Path(__file__).parents[1] / "configs" / "distill.py") + ":toy",
  "Settings; override with --config.NAME=VALUE.",
  flag_values=_FLAGS,
)
_DISTRIBUTED = flags.DEFINE_string(
  "distributed", "", "'auto' or HOST:PORT,PROCESS,PROCESSES, on several hosts.",
  flag_values=_FLAGS,
)  # fmt: skip
log = logging.getLogger("distill")
DTYPES = ("bfloat16", "float32")


def train(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Runs a distillation from start or checkpoint to its end; the last metrics."""
  # ------------------------------------------------------------------ settings
  sources, settings = check(config)
  board = find_stories(config)
  mesh = meshes.training_mesh(config.devices)
  workdir = Path(config.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")

  # ------------------------------------------------------------------ data
  arrays = board.arrays()
  # The encoder is read, run and gone before the other networks come.
  embeddings = text.embed_prompts(
    [*arrays.prompts, config.scores.negative_prompt],
    sources.tokenizer,
    lambda: networks.load(sources.text, config.dtype),
    encoder_id=text.fingerprint(sources.text.path, sources.tokenizer.path)
    + config.dtype,
    cache_dir=Path(config.cache_dir).expanduser() if config.cache_dir else None,
  )
  log.info("%d stories of %d prompts", board.batch, len(arrays.prompts))
  video_vae = None
  if settings.scores.conditioning_frames or cuts_off(config):
    video_vae = networks.load(sources.vae, config.dtype)
  y, x = config.height // request.SPATIAL, config.width // request.SPATIAL
  given = np.zeros((board.batch, 0, y, x, sources.dit.config.in_channels), np.float32)
  if settings.scores.conditioning_frames:
    images = request.first_frames(board, config.height, config.width)
    given = stories.encode_images(video_vae, images)
  batches = stories.StoryBatches(
    arrays,
    embeddings[:-1],
    given,
    config.batch_size,
    (config.rollout.min_chunks, config.rollout.max_chunks),
    config.seed,
  )

  # ------------------------------------------------------------------ networks
  fixed = distill.Fixed(
    base=networks.load(sources.dit, config.dtype),
    negative=jnp.asarray(embeddings[-1]),
    video_vae=video_vae if cuts_off(config) else None,
  )
  fixed = meshes.replicate(fixed, mesh)
  generator_optimizer, critic_optimizer = make_optimizers(config)
  # Nothing holds the parameters but the state: it is split over the devices.
  state = train_state.init_state_on(
    mesh, init_generator(config, sources, fixed.base), generator_optimizer
  )
  count = sum(a.size for a in jax.tree.leaves(state.params))
  log.info("generator: %.2f million parameters", count / 1e6)
  if config.mode == "dmd":
    critic = train_state.init_state_on(
      mesh, init_critic(config, sources, fixed.base), critic_optimizer, average=False
    )
    state = distill.DistillState(state, critic)

  # ------------------------------------------------------------------ the steps
  # One program each: the state, a batch and what is fixed -> the state and metrics.
  average = {"ema_decay": config.ema_decay, "ema_start": config.ema_start}
  if config.mode == "ode":
    kinds = [
      functools.partial(
        ode.ode_step, optimizer=generator_optimizer, steps=config.teacher_steps,
        **average,
      )
    ]  # fmt: skip
  else:
    kinds = [
      functools.partial(distill.critic_step, optimizer=critic_optimizer),
      functools.partial(
        distill.generator_step, optimizer=generator_optimizer, **average
      ),
    ]
  specs = meshes.last_axis_specs(state, mesh)
  key = jax.random.key(config.seed)
  first_step, *later_steps = (
    distill.program(step, number, settings, key, specs, mesh)
    for number, step in enumerate(kinds)
  )

  # ------------------------------------------------------------------ resume
  base = str(sources.dit.path)
  checkpoints = loop.Checkpoints(
    workdir / "checkpoints", config.keep_checkpoints, base
  )
  if checkpoints.steps():
    state, iterator_state = checkpoints.restore(state)
    batches.set_state(iterator_state)
    log.info("resumed at step %d", state.step)
  first = int(state.step)

  # ------------------------------------------------------------------ the loop
  def advance(state, step):
    # Every process has the same whole batch, so its order is always the same.
    batch = meshes.shard_batch(next(batches), mesh)
    state, metrics = first_step(state, batch, fixed)
    if step % config.generator_every == 0:
      for later_step in later_steps:
        state, more = later_step(state, batch, fixed)
        metrics |= more
    return state, metrics

  state, line = loop.run(
    advance,
    state,
    loop.MetricsLog(workdir / "metrics.jsonl", first),
    checkpoints,
    batches.get_state,
    first=first,
    steps=config.steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    shown=("loss", "generator_loss", "matching_gradient"),
  )

  # ------------------------------------------------------------------ result
  if int(state.step) == config.steps:
    trained = state if config.mode == "ode" else state.generator
    made = train_state.cast(trained.ema, config.export_dtype)
    folder, source = workdir / "model", "launch/distill.py"
    if config.lora.rank:
      train_lora.export({"lora": made}, folder, source, base)
    else:
      store.save_network(folder / "dit", made, source=source, overwrite=True)
    log.info("wrote %s", folder)
  return line


# -------------------------------------------------------------------------- parts


def check(
  config: ml_collections.ConfigDict,
) -> tuple[networks.Sources, distill.DistillSettings]:
  """Refuses settings that cannot work, before anything is built.

  Raises:
    ValueError: names the field, its value and what to use instead.
  """
  for name in ("dtype", "export_dtype"):
    if config[name] not in DTYPES:
      raise ValueError(f"{name}={config[name]!r}; use {' or '.join(DTYPES)}")
  for name in (
    "steps", "generator_every", "teacher_steps", "batch_size", "log_every",
    "checkpoint_every",
  ):  # fmt: skip
    if config[name] < 1:
      raise ValueError(f"{name}={config[name]} must be at least 1")
  if config.mode not in ("dmd", "ode"):
    raise ValueError(f"mode={config.mode!r} is unknown; use 'dmd' or 'ode'")
  if config.mode == "ode" and cuts_off(config):
    raise ValueError(
      f"rollout.max_chunks={config.rollout.max_chunks} must be at most scores.chunks="
      f"{config.scores.chunks} with mode='ode', which looks at whole rollouts"
    )
  if config.steps < config.generator_every:
    raise ValueError(
      f"generator_every={config.generator_every} must be at most steps={config.steps}: "
      "the generator would have no update"
    )
  if config.devices < 1 or config.batch_size % config.devices:
    raise ValueError(
      f"batch_size={config.batch_size} must be a multiple of devices={config.devices}"
    )
  if bool(config.data.prompts) == bool(config.data.images):
    raise ValueError(
      f"data.prompts={config.data.prompts!r} and data.images={config.data.images!r}: "
      "give one of them, the other one empty"
    )
  request.check_picture(config.height, config.width, fps=24)
  remat.check(config.remat)
  settings = make_settings(config)
  make_optimizers(config)
  choice = networks.pick(networks.Choice, config) | {"steps": config.sampling.steps}
  sources = networks.find_all(networks.Choice(**choice))
  for name in ("dit", "vae", "text"):
    if getattr(sources, name).path is None:
      raise ValueError(f"{name} has random weights, which cannot be used; set weights")
  check_adapter(config, sources)
  return sources, settings


def make_settings(config: ml_collections.ConfigDict) -> distill.DistillSettings:
  """How videos are made and scored; raises ValueError for what cannot work."""
  rollout, scores = config.rollout, config.scores
  if not 1 <= rollout.min_chunks <= rollout.max_chunks:
    raise ValueError(
      f"rollout.min_chunks={rollout.min_chunks} must be at least 1 and at most "
      f"rollout.max_chunks={rollout.max_chunks}"
    )
  if cuts_off(config) and scores.chunks < 2:
    raise ValueError(
      f"scores.chunks={scores.chunks} must be at least 2 for rollouts of up to "
      f"{rollout.max_chunks} chunks: the first one of a part does not count"
    )
  return distill.DistillSettings(
    rollout=self_forcing.RolloutSettings(
      Sampling(**config.sampling),
      context_noise=rollout.context_noise,
      through_cache=rollout.through_cache,
      remat=config.remat,
    ),
    scores=dmd.DMDSettings(
      frames_per_chunk=config.sampling.frames_per_chunk,
      conditioning_frames=1 if config.data.images else 0,
      **networks.pick(dmd.DMDSettings, scores),
    ),
    exit_step=rollout.exit_step,
    timesteps=scores.timesteps,
    teacher_forcing=scores.teacher_forcing,
    score_chunks=scores.chunks,
  )


def cuts_off(config: ml_collections.ConfigDict) -> bool:
  """Whether rollouts may be longer than what is scored of them."""
  return config.rollout.max_chunks > config.scores.chunks


def make_optimizers(
  config: ml_collections.ConfigDict,
) -> tuple[optax.GradientTransformation, ...]:
  """The optimisers of generator and critic, each with a schedule of its own length."""
  every = 1 if config.mode == "ode" else config.generator_every
  updates = config.steps // every
  return tuple(
    train_state.make_optimizer(train_state.OptimizerSettings(steps=count, **settings))
    for count, settings in ((updates, config.generator), (config.steps, config.critic))
  )


def lora_settings(config: ml_collections.ConfigDict) -> train_lora.LoraSettings:
  return train_lora.LoraSettings(**config.lora)


def check_adapter(config: ml_collections.ConfigDict, sources: networks.Sources) -> None:
  """Raises ValueError for adapters that do not fit the base or the settings."""
  settings = lora_settings(config)
  if not settings.rank:
    if config.init_lora:
      raise ValueError(
        f"init_lora={config.init_lora!r} needs lora.rank above 0: merge it first, with "
        "tools/merge_lora.py"
      )
    find_start(config)
    return
  if config.init_dit:
    raise ValueError(
      f"init_dit={config.init_dit!r} needs lora.rank=0; for adapters set init_lora"
    )
  train_lora.check_layers(networks.abstract(sources.dit, config.dtype), settings)
  if config.init_lora:
    found = adapters.find(config.init_lora, sources.dit.config)
    if found.weight != 1:
      raise ValueError(f"init_lora={config.init_lora!r} must be a path, with no weight")
    if found.rank != settings.rank:
      raise ValueError(
        f"init_lora={config.init_lora!r} has rank {found.rank}, "
        f"lora.rank={settings.rank}; set lora.rank={found.rank}"
      )


def find_start(config: ml_collections.ConfigDict) -> networks.Source | None:
  """What a generator begins as that is trained whole; None: as the teacher."""
  if not config.init_dit:
    return None
  return networks.find("dit", config.size, config.init_dit)


def find_stories(config: ml_collections.ConfigDict) -> Storyboard:
  """All stories, as long as the longest rollout; raises ValueError as their readers."""
  return request.build_storyboard(
    prompts=config.data.prompts or None,
    images=config.data.images or None,
    chunks=config.rollout.max_chunks,
  )


def init_generator(
  config: ml_collections.ConfigDict, sources: networks.Sources, base: dit.CausalDiT
) -> distill.Trained:
  """The generator as it begins: as the teacher, or what `init_lora`, `init_dit` say."""
  if not config.lora.rank:
    started = find_start(config) or plain_source(sources)
    return networks.load(started, "float32")
  if not config.init_lora:
    return init_adapter(config, base, number=0)
  path = Path(config.init_lora).expanduser()
  given = lora.load_lora(path, sources.dit.config.layers)
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), given)


def init_critic(
  config: ml_collections.ConfigDict, sources: networks.Sources, base: dit.CausalDiT
) -> distill.Trained:
  """The critic as it begins: as the teacher."""
  if not config.lora.rank:
    return networks.load(plain_source(sources), "float32")
  return init_adapter(config, base, number=1)


def plain_source(sources: networks.Sources) -> networks.Source:
  """The teacher's weights as they were before they were quantised."""
  return dataclasses.replace(sources.dit, precision=Precision())


def init_adapter(
  config: ml_collections.ConfigDict, base: dit.CausalDiT, number: int
) -> lora.Lora:
  key = jax.random.fold_in(jax.random.key(config.seed), number)
  return train_lora.init_lora(base, lora_settings(config), key)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; use --config.NAME=VALUE")
  absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax reports every rename
  meshes.initialize(_DISTRIBUTED.value)
  for name in ("distill", "longlive_jax"):
    logging.getLogger(name).setLevel(logging.INFO)
  keep_programs(_CONFIG.value.programs_dir)
  train(_CONFIG.value)


if __name__ == "__main__":
  app.run(main)
