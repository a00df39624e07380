"""Settings of launch/distill.py. Size and options are arguments, all else overrides.

Adapters of the shipped toy model for few steps, on one GPU:

  python -m longlive_jax.data.toy_world --captions --clips 3000 --out outputs/stories
  python launch/distill.py --config configs/distill.py:toy,steps=4
  python launch/distill.py --config configs/distill.py:toy,steps=2 \
    --config.init_lora=outputs/distill_toy_4/model/lora

and videos with them:

  python launch/generate.py --config.loras=outputs/distill_toy_4/model/lora \
    --config.steps=4 --config.guidance=1 --prompt "..."

Others:

  ... --config configs/distill.py:toy,steps=4,i2v --config.data.images=FOLDER
  ... --config configs/distill.py:ti2v-5b,steps=4,nvfp4 --config.weights=FOLDER \
    --config.data.prompts=prompts.txt
  ... --config configs/distill.py:toy,steps=4,full      no adapters: whole networks
  ... --config.mode=ode --config.workdir=outputs/ode_toy_4      a start, for init_lora
  ... --config.devices=4        share the videos of a batch
"""

import ml_collections

OPTIONS = ("i2v", "nvfp4", "full")


def get_config(arg: str = "toy") -> ml_collections.ConfigDict:
  """Settings of a run.

  Args:
    arg: a size ('toy', 'ti2v-5b', or 'test': smallest, a few steps), then
      comma-separated options: 'steps=N' (solver steps of the generator), 'i2v' (every
      video starts from an image), 'nvfp4' (the base in 4 bits), 'full' (generator and
      critic are trained whole, without adapters).

  Raises:
    ValueError: unknown size or option, or steps that are no number.
  """
  size, *options = arg.split(",")
  if size not in ("toy", "ti2v-5b", "test"):
    raise ValueError(f"config={size!r} is unknown; choose from toy, ti2v-5b, test")
  steps = [option.removeprefix("steps=") for option in options if "steps=" in option]
  if any(not n.isdecimal() or int(n) < 1 for n in steps) or len(steps) > 1:
    raise ValueError(f"config steps={','.join(steps)} must be one number, such as 4")
  for option in options:
    if option not in OPTIONS and not option.startswith("steps="):
      names = ", ".join(OPTIONS)
      raise ValueError(f"config option={option!r} is unknown; use steps=4, {names}")
  c = ml_collections.ConfigDict()
  few = int(steps[0]) if steps else 4
  c.workdir = f"outputs/distill_{size}_{few}"
  c.programs_dir = "~/.cache/longlive_jax/programs"  # compiled ones; '': not kept
  c.seed = 0
  # 'dmd', distribution matching; or 'ode', regression onto the teacher's videos, which
  # is where 'dmd' may begin: longlive_jax/train/distill.py and ode.py.
  c.mode = "dmd"
  c.steps = 1000  # updates of the critic (of the generator by 'ode') ...
  c.generator_every = 5  # ... for each so many of which the generator has one
  c.teacher_steps = 16  # of the teacher's videos
  c.batch_size = 64

  # Networks, named as in configs/generate.py. The transformer is the teacher.
  c.size = size
  c.vae = "toy"
  c.text = "toy"
  c.weights = ""
  c.dit_weights = ""
  c.vae_weights = ""
  c.text_weights = ""
  c.tokenizer = ""
  c.dtype = "bfloat16"
  c.precision = ""
  c.precision_rule = "mse"

  # Adapters of generator and critic. Rank 0 trains both networks whole. The generator
  # may begin as what another run made, of more steps or by 'ode': `init_lora`, or
  # `init_dit` without adapters.
  c.lora = ml_collections.ConfigDict()
  c.lora.rank = 16
  c.lora.alpha = 0.0  # 0: the rank
  c.lora.layers = ("blocks/*_attn/[qkvo]", "blocks/*ffn/fc[12]")
  c.init_lora = ""
  c.init_dit = ""

  # What videos are made of: a text file or a folder of captions, or one of images and
  # texts (image-to-video), see launch/generate.py.
  c.data = ml_collections.ConfigDict()
  c.data.prompts = "outputs/stories"
  c.data.images = ""
  c.height = 128
  c.width = 128
  c.cache_dir = ""  # of the prompts' embeddings; '' keeps none

  # How the generator samples: in training, and with its adapter in generation.
  c.sampling = ml_collections.ConfigDict()
  c.sampling.frames_per_chunk = 8
  c.sampling.window_frames = 32
  c.sampling.sink_frames = 8
  c.sampling.multi_shot_sink = True
  c.sampling.shot_rope_offset = 8.0
  c.sampling.relative_rope = True
  c.sampling.t_scale = 1.0
  c.sampling.solver = "unipc"
  c.sampling.steps = few
  c.sampling.timesteps = ()  # of the steps, falling; none: the solver's own
  c.sampling.shift = 3.0
  c.sampling.kv_format = ""

  # Rollouts: see longlive_jax/train/self_forcing.py and distill.py.
  c.rollout = ml_collections.ConfigDict()
  c.rollout.min_chunks = 4
  c.rollout.max_chunks = 4
  c.rollout.exit_step = "shared"  # or 'per_chunk', 'last'
  c.rollout.context_noise = 0.0
  c.rollout.through_cache = False
  c.remat = "none"  # less memory: 'blocks', 'attention', see layers/remat.py

  # Scores: see longlive_jax/train/dmd.py and distill.py. A guidance of g is what
  # configs/generate.py calls g + 1.
  c.scores = ml_collections.ConfigDict()
  c.scores.chunks = 4  # the last ones, of longer rollouts
  c.scores.teacher_forcing = True
  c.scores.timesteps = "per_block"  # or 'shared'
  c.scores.shift = 3.0
  c.scores.teacher_guidance = 1.0
  c.scores.critic_guidance = 0.0
  c.scores.min_timestep = 20.0
  c.scores.max_timestep = 980.0
  c.scores.negative_prompt = ""

  c.generator = ml_collections.ConfigDict()
  c.generator.learning_rate = 3e-4
  c.generator.final_ratio = 0.1
  c.generator.warmup = 0
  c.generator.beta1 = 0.0
  c.generator.beta2 = 0.999
  c.generator.weight_decay = 0.0
  c.generator.clip = 10.0
  c.critic = c.generator.copy_and_resolve_references()
  c.critic.learning_rate = 6e-4
  c.ema_decay = 0.99
  c.ema_start = 100  # updates of the generator

  c.devices = 1  # share the videos of a batch
  c.export_dtype = "bfloat16"  # of what is written at the end

  c.log_every = 20
  c.checkpoint_every = 250
  c.keep_checkpoints = 2

  if size == "ti2v-5b":
    c.vae, c.text, c.weights = "wan2.2", "umt5-xxl", "checkpoints/ti2v-5b"
    c.height, c.width = 704, 1280
    c.data.prompts, c.cache_dir = "prompts.txt", "~/.cache/longlive_jax/text"
    c.batch_size, c.steps, c.remat = 1, 10_000, "blocks"
    c.sampling.relative_rope, c.sampling.shift = False, 5.0
    c.scores.shift, c.scores.teacher_guidance = 5.0, 3.0
    c.lora.rank, c.ema_start, c.checkpoint_every = 128, 200, 1000
    c.generator.learning_rate, c.critic.learning_rate = 1e-5, 2e-6
  if size == "test":
    c.vae, c.text, c.dtype = "test", "test", "float32"
    c.height, c.width, c.lora.rank = 32, 32, 2
    c.steps, c.generator_every, c.batch_size = 4, 2, 2
    c.sampling.frames_per_chunk, c.sampling.sink_frames = 2, 2
    c.sampling.window_frames = 8
    c.rollout.min_chunks = c.rollout.max_chunks = 3
    c.log_every, c.checkpoint_every, c.ema_start = 1, 2, 1
  if "i2v" in options:
    c.data.prompts, c.data.images = "", "outputs/images"
    c.workdir += "_i2v"
  if "nvfp4" in options:
    c.precision = "w4a16"
  if "full" in options:
    c.lora.rank = 0
  return c
