"""How to generate. Sizes and options are arguments, everything else an override.

python launch/generate.py --prompt "a red circle moves left"
python launch/generate.py --config configs/generate.py:toy,steps=4 ...
python launch/generate.py --config configs/generate.py:toy --config.steps=12 ...
python launch/generate.py --config configs/generate.py:ti2v-5b,i2v ...
python launch/generate.py --config configs/generate.py:toy,nvfp4,kv=nvfp4 ...
python launch/generate.py \
  --config configs/generate.py:ti2v-5b,fp8,attention=fp8,kv=e4m3 ...
"""

from pathlib import Path

import ml_collections

PRECISIONS = {"nvfp4": "w4a16", "w4a4": "w4a4", "fp8": "fp8"}
KV_FORMATS = {"kv=nvfp4": "nvfp4", "kv=fp8": "fp8", "kv=e4m3": "e4m3"}
FEW_STEPS = {"steps=4": 4, "steps=2": 2}
OPTIONS = ("i2v", "no_sinks", "float32", "random", "attention=fp8", "vae=fp8",
           *FEW_STEPS, *PRECISIONS, *KV_FORMATS)  # fmt: skip
SHIPPED = Path(__file__).parents[1] / "longlive_jax" / "assets" / "toy"


def get_config(arg: str = "toy") -> ml_collections.ConfigDict:
  """Settings of a run.

  Args:
    arg: a size ('toy', 'ti2v-5b'), then comma-separated options: 'i2v' (every video
      must start from an image), 'no_sinks' (window only, to see what sinks do),
      'float32' (instead of bfloat16 at full size), 'random' (random weights, to
      measure speed), 'nvfp4' (quantise the transformer's weights while loading them),
      'w4a4' (and its activations as it runs), 'fp8' (both, in 8 bits), 'kv=nvfp4',
      'kv=fp8' or 'kv=e4m3' (quantise the cache), 'attention=fp8' (multiply in 8 bits
      in attention, too; fastest with 'kv=e4m3'), 'vae=fp8' (decode pictures with 8-bit
      convolutions), 'steps=4' or 'steps=2' (the toy's shipped adapter of so many steps,
      which need no guidance).

  Raises:
    ValueError: unknown size or option, or two that exclude each other, or an adapter
      for a size that has none.
  """
  size, *options = arg.split(",")
  if size not in ("toy", "ti2v-5b"):
    raise ValueError(f"config size={size!r} is unknown; use 'toy' or 'ti2v-5b'")
  for option in options:
    if option not in OPTIONS:
      raise ValueError(f"config option={option!r} is unknown; use {', '.join(OPTIONS)}")
  for group in (FEW_STEPS, PRECISIONS, KV_FORMATS):
    chosen = [name for name in group if name in options]
    if len(chosen) > 1:
      names = " and ".join(map(repr, chosen))
      raise ValueError(f"config options {names} exclude each other; use one")
  config = ml_collections.ConfigDict()

  # Networks: names in the tables of sizes. `weights` is a folder with dit, vae, text
  # and tokenizer.json: empty for what ships with the package (toy only), 'random' to
  # measure speed. The next four replace single parts of it. `loras` are adapters beside
  # the transformer's weights, in whatever format these are: ("PATH", "PATH:0.8").
  config.size = size
  config.vae = "toy"
  config.text = "toy"
  config.weights = ""
  config.dit_weights = ""
  config.vae_weights = ""
  config.text_weights = ""
  config.tokenizer = ""
  config.loras = ()
  config.unroll = "auto"  # layers one by one in FP8 on a GPU: faster, longer to compile
  config.dtype = "float32"

  # Numbers. `precision` quantises the transformer while it is loaded, 'w4a16' and
  # 'w8a16' its weights, 'w4a4' and 'fp8' also what is multiplied with them; '' takes a
  # checkpoint as it is, quantised or not. `kv_format` is that of the cache: 'nvfp4',
  # 'fp8' with a scale a frame, or 'e4m3' without, as `attention_format` 'fp8' reads it.
  # Rules and smoothing are those of NVFP4. `vae_precision` 'fp8' quantises the VAE's
  # decoder while it is loaded; its state takes half the memory.
  config.precision = ""
  config.precision_rule = "mse"  # nearest to plain weights: README, "In 4 bits"
  config.precision_layers = ("blocks/*_attn/[qkvo]", "blocks/*ffn/fc[12]")
  config.precision_plain_edges = 0  # first and last layers that keep plain weights
  config.precision_plain_steps = ()  # as (0, -1): by a second, plain copy of weights
  config.kv_format = ""
  config.kv_smoothing = "token_mean"
  config.kv_rule = "mse"
  config.attention_format = ""
  config.vae_precision = ""

  # Picture and length. Clips of 24 frames a second; one chunk is
  # 4 * frames_per_chunk video frames.
  config.height = 128
  config.width = 128
  config.fps = 24.0
  config.frames_per_chunk = 8

  # Memory: latent frames that are attended, and those of them that stay.
  config.window_frames = 32
  config.sink_frames = 8
  config.multi_shot_sink = True
  config.shot_rope_offset = 8.0
  config.clean_recache = False
  config.relative_rope = size == "toy"  # trained on window positions
  config.t_scale = 1.0
  config.independent_first_frame = False

  # Denoising.
  config.solver = "unipc"
  config.steps = 8
  config.timesteps = ()  # of the steps, as (999.0, 750.0); none: the solver's own
  config.shift = 3.0
  config.guidance = 2.0
  config.negative_prompt = ""

  # The run. `devices` share the videos of a batch. Each may be a group: of
  # `guidance_devices` = 2, one with and one without prompt, times `sequence_devices`,
  # which share the tokens of a video and must divide the transformer's heads; keys and
  # values go between them as numbers in `exchange_format`: '', 'fp8' or 'nvfp4'.
  # `decode_frames` are decoded at a time, the last stages in `decode_tiles`: more
  # frames are faster, fewer frames and more tiles need less memory. `decode_on` says
  # where: on the 'same' devices, on an 'other' one, the next, or with every picture
  # 'split' over all of them. `plan` fills in what is not set: layout, and fewer bits if
  # nothing else fits; 'off', or 'auto' with the rates of a machine as
  # tools/bench_generate.py --out=FILE measured them: FILE.
  config.i2v = False
  config.seed = 0
  config.plan = "auto"
  config.devices = 1
  config.guidance_devices = 1
  config.sequence_devices = 1
  config.exchange_format = ""
  config.decode_frames = 8
  config.decode_tiles = 1
  config.decode_on = "same"
  config.cache_dir = "~/.cache/longlive_jax/text"
  config.programs_dir = "~/.cache/longlive_jax/programs"  # compiled ones; '': not kept

  if size == "ti2v-5b":
    config.vae = "wan2.2"
    config.text = "umt5-xxl"
    config.dtype = "bfloat16"
    config.height = 704
    config.width = 1280
    config.steps = 4
    config.shift = 5.0
    config.decode_frames = 1
    config.guidance = 1.0
  if "i2v" in options:
    config.i2v = True
  if "no_sinks" in options:
    config.sink_frames = 0
    config.multi_shot_sink = False
  if "float32" in options:
    config.dtype = "float32"
  if "attention=fp8" in options:
    config.attention_format = "fp8"
  if "vae=fp8" in options:
    config.vae_precision = "fp8"
  if "random" in options:
    config.weights = "random"
  for option in options:
    if steps := FEW_STEPS.get(option):
      if size != "toy":
        raise ValueError(
          f"config option={option!r} has no adapter for {size!r}; set config.loras, "
          "config.steps and config.guidance"
        )
      config.loras = (str(SHIPPED / f"lora_{steps}"),)
      config.steps, config.guidance = steps, 1.0
    config.precision = PRECISIONS.get(option, config.precision)
    config.kv_format = KV_FORMATS.get(option, config.kv_format)
  return config
