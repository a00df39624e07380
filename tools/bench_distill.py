"""Measures one iteration of distillation, with random weights.

  python tools/bench_distill.py --size=ti2v-5b --height=704 --width=1280 \
    --base=w4a16 --out=distill_nvfp4.json

prints a JSON line a figure and writes all of them to --out. The programs are those of
launch/distill.py: an update of the critic, and one of the generator; an iteration has
--every of the first for one of the second. Prompts are embedded beforehand, one for
each chunk, so the text encoder is not measured. Every device has a video of its own and
its part of the state.

  --base        number format of the one transformer that adapters of generator and
                critic stand beside, and that is the teacher; w4a16 is NVFP4, '' is
                --dtype. Its weights are random codes from the start.
  --whole       no adapters: both networks are trained whole, beside a plain teacher.
  --gradient    through_cache or detached: see longlive_jax/train/self_forcing.py.
  --exit_step   last, of every chunk, is the longest that a rollout takes; shared and
                per_chunk draw it, as training does.
  --teacher_forcing  teacher and critic see clean chunks beside the noised ones: twice
                the tokens. The reference does without.

`program_bytes` is what a compiled update takes on a device. The peak is that of the
fullest device and of the process: --only=critic or generator asks for that of one
update. Beyond what is there between updates (base, adapters, average, optimiser) it has
`rest_bytes`: gradients, activations, caches, and scratch of the compiler's trials. Give
the same --programs folder to two runs, and the second one compiles nothing.
"""

import dataclasses
import functools
import json
import time
from typing import Any

import bench_networks
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from longlive_jax.generate import networks, report, request
from longlive_jax.generate.sampler import Sampling
from longlive_jax.layers import kv_slots
from longlive_jax.layers import remat as remats
from longlive_jax.models import dit
from longlive_jax.parallel import mesh as meshes
from longlive_jax.quant import weights
from longlive_jax.train import distill, dmd, lora, self_forcing
from longlive_jax.train import state as train_state

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_SIZE = flags.DEFINE_string("size", "test", "Transformer size.", flag_values=_FLAGS)
_HEIGHT = flags.DEFINE_integer("height", 32, "Pixels.", flag_values=_FLAGS)
_WIDTH = flags.DEFINE_integer("width", 32, "Pixels.", flag_values=_FLAGS)
_FRAMES = flags.DEFINE_integer(
  "frames", 32, "Latent frames of a video.", flag_values=_FLAGS
)
_CHUNK = flags.DEFINE_integer(
  "frames_per_chunk", 8, "Latent frames.", flag_values=_FLAGS
)
_STEPS = flags.DEFINE_integer("steps", 4, "Of the generator.", 1, flag_values=_FLAGS)
_GRADIENT = flags.DEFINE_enum(
  "gradient", "detached", ["detached", "through_cache"], "Of a rollout.",
  flag_values=_FLAGS,
)  # fmt: skip
_EXIT = flags.DEFINE_enum(
  "exit_step", "last", distill.EXIT_STEPS, "Of the chunks.", flag_values=_FLAGS
)
_KV_FORMAT = flags.DEFINE_enum(
  "kv_format", "", list(kv_slots.NAMES), "Of the rollout's cache.", flag_values=_FLAGS
)
_TEACHER_FORCING = flags.DEFINE_bool(
  "teacher_forcing", True, "Of teacher and critic.", flag_values=_FLAGS
)
_GUIDANCE = flags.DEFINE_float(
  "teacher_guidance", 3.0, "0: one pass of the teacher, not two.", flag_values=_FLAGS
)
_BASE = flags.DEFINE_enum(
  "base", "", ["", *weights.MODES], "Number format.", flag_values=_FLAGS
)
_WHOLE = flags.DEFINE_bool("whole", False, "Without adapters.", flag_values=_FLAGS)
_RANK = flags.DEFINE_integer("rank", 128, "Of the adapters.", 1, flag_values=_FLAGS)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of computation.", flag_values=_FLAGS
)
_REMAT = flags.DEFINE_enum(
  "remat", "blocks", remats.NAMES, "Of layers/remat.py.", flag_values=_FLAGS
)
_DEVICES = flags.DEFINE_integer("devices", 1, "Videos, too.", flag_values=_FLAGS)
_EVERY = flags.DEFINE_integer(
  "every", 5, "Updates of the critic for one.", 1, flag_values=_FLAGS
)
_ONLY = flags.DEFINE_enum(
  "only", "", ["", "critic", "generator"], "Update.", flag_values=_FLAGS
)
_UPDATES = flags.DEFINE_integer(
  "updates", 2, "Of each, timed; median.", 1, flag_values=_FLAGS
)
_PROGRAMS = flags.DEFINE_string(
  "programs", "", "Folder that keeps compiled programs.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string("out", "", "JSON file.", flag_values=_FLAGS)


def make_settings() -> distill.DistillSettings:
  """Of the flags; all else as in configs/distill.py.

  Raises:
    ValueError: flags that do not go together.
  """
  if _FRAMES.value < 1 or _FRAMES.value % _CHUNK.value:
    raise ValueError(
      f"frames={_FRAMES.value} must be a multiple of frames_per_chunk={_CHUNK.value}"
    )
  if _WHOLE.value and _BASE.value:
    raise ValueError(
      f"base={_BASE.value!r} needs adapters: networks that are trained whole begin as "
      "a plain base; leave out whole or base"
    )
  request.check_picture(_HEIGHT.value, _WIDTH.value, fps=24)
  sampling = Sampling(
    frames_per_chunk=_CHUNK.value,
    window_frames=4 * _CHUNK.value,
    sink_frames=_CHUNK.value,
    steps=_STEPS.value,
    kv_format=_KV_FORMAT.value,
  )
  rollout = self_forcing.RolloutSettings(
    sampling, through_cache=_GRADIENT.value == "through_cache", remat=_REMAT.value
  )
  return distill.DistillSettings(
    rollout,
    dmd.DMDSettings(_CHUNK.value, teacher_guidance=_GUIDANCE.value),
    exit_step=_EXIT.value,
    teacher_forcing=_TEACHER_FORCING.value,
    score_chunks=_FRAMES.value // _CHUNK.value,
  )


# ------------------------------------------------------------------ what is there
def make_base(config: dit.WanConfig) -> dit.CausalDiT:
  """The base, drawn in its own number format, one array after the other."""
  abstract = bench_networks.abstract_model(config, jnp.dtype(_DTYPE.value), _BASE.value)
  return networks.random_like(abstract)


def make_trained(base: dit.CausalDiT, number: int) -> distill.Trained:
  """Generator or critic as it begins: an adapter, or the base in float32."""
  if _WHOLE.value:
    return jax.jit(lambda base: train_state.cast(base, jnp.float32))(base)
  key = jax.random.key(number, impl="rbg")
  return lora.init_lora(base, lora.LoraSettings(_RANK.value), key)


def make_stories(config: dit.WanConfig, mesh: Mesh | None) -> distill.Stories:
  """A random story of one shot for every device."""
  b, chunks = _DEVICES.value, _FRAMES.value // _CHUNK.value
  y, x = _HEIGHT.value // request.SPATIAL, _WIDTH.value // request.SPATIAL
  rng = np.random.default_rng(0)
  text = (b, chunks, config.text_len, config.text_dim)
  stories = distill.Stories(
    text=rng.standard_normal(text, np.float32),
    cuts=np.zeros((b, chunks), bool),
    given=np.zeros((b, 0, y, x, config.in_channels), np.float32),
  )
  return meshes.shard_batch(stories, mesh)


def held_bytes(tree: Any) -> int:
  """What the arrays take on the first device."""
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


# ------------------------------------------------------------------ figures
def measure(settings: distill.DistillSettings) -> dict[str, Any]:
  """All figures, each printed as soon as it is there."""
  figures: dict[str, Any] = {}

  def note(**found: Any) -> None:
    figures.update(found)
    for name, value in found.items():
      print(json.dumps({"figure": name, "value": value}), flush=True)
    if _OUT.value:  # after every figure: a machine may be taken away
      report.write_json(_OUT.value, content(settings) | figures)

  config, mesh = dit.size(_SIZE.value), meshes.training_mesh(_DEVICES.value)
  optimizer = train_state.make_optimizer(
    train_state.OptimizerSettings(steps=1000, warmup=1)
  )
  began = time.perf_counter()
  base = make_base(config)
  state = distill.DistillState(
    train_state.init_state_on(mesh, make_trained(base, 0), optimizer),
    train_state.init_state_on(mesh, make_trained(base, 1), optimizer, average=False),
  )
  negative = jax.random.normal(jax.random.key(2), (config.text_len, config.text_dim))
  fixed = meshes.replicate(distill.Fixed(base, negative), mesh)
  del base
  stories = make_stories(config, mesh)
  jax.block_until_ready((state, fixed, stories))
  note(networks_s=time.perf_counter() - began)
  both = state.generator, state.critic
  parts = {
    "base_bytes": held_bytes(fixed),
    "trained_bytes": held_bytes([one.params for one in both]),
    "average_bytes": held_bytes(state.generator.ema),
    "optimizer_bytes": held_bytes([one.opt_state for one in both]),
  }
  note(**parts)

  generator_step = functools.partial(distill.generator_step, ema_decay=0.99)
  steps = {"critic": distill.critic_step, "generator": generator_step}
  specs = meshes.last_axis_specs(state, mesh)
  for number, (name, step) in enumerate(steps.items()):
    if _ONLY.value not in ("", name):
      continue
    began = time.perf_counter()
    run = distill.program(
      functools.partial(step, optimizer=optimizer), number, settings,
      jax.random.key(0), specs, mesh,
    )  # fmt: skip
    compiled = run.lower(state, stories, fixed).compile()
    note(**{f"{name}_compile_s": time.perf_counter() - began})
    memory = compiled.memory_analysis()
    note(**{
      f"{name}_program_bytes": memory.argument_size_in_bytes
      + memory.temp_size_in_bytes + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    })  # fmt: skip
    seconds = []
    for _ in range(_UPDATES.value):
      began = time.perf_counter()
      state, metrics = compiled(state, stories, fixed)
      jax.block_until_ready((state, metrics))
      seconds.append(time.perf_counter() - began)
      note(**{f"{name}_each_seconds": list(seconds)})
    note(**{f"{name}_seconds": float(np.median(seconds))})
    note(**{f"{name}_metrics": jax.tree.map(float, metrics)})
  if not _ONLY.value:
    rounds = _EVERY.value * figures["critic_seconds"] + figures["generator_seconds"]
    note(iteration_seconds=rounds)
  peak = report.peak_bytes()
  if peak is not None:
    note(peak_bytes=peak, rest_bytes=peak - sum(parts.values()))
  return figures


def content(settings: distill.DistillSettings) -> dict[str, Any]:
  """What was measured, and on what."""
  return {
    "size": _SIZE.value,
    "pixels": f"{_HEIGHT.value}x{_WIDTH.value}",
    "frames": _FRAMES.value,
    "base": _BASE.value,
    "rank": 0 if _WHOLE.value else _RANK.value,
    "dtype": _DTYPE.value,
    "devices": _DEVICES.value,
    "generator_every": _EVERY.value,
    "settings": dataclasses.asdict(settings),
    **report.environment(),
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  if _PROGRAMS.value:
    jax.config.update("jax_compilation_cache_dir", _PROGRAMS.value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  measure(make_settings())


if __name__ == "__main__":
  app.run(main)
