"""Settings of launch/train.py. Size and options are arguments, all else overrides.

The toy model of the quickstart, on one GPU:

  python -m longlive_jax.data.toy_world --out outputs/toy_data --clips 3400
  python launch/train_vae.py --config configs/train_vae.py:toy
  python launch/train.py --config configs/train.py:toy
  python tools/plot_metrics.py outputs/train_toy/metrics.jsonl --out curves.png

The result is in outputs/train_toy/model: dit, text and tokenizer.json. For runs on a
GPU to repeat, set XLA_FLAGS=--xla_gpu_deterministic_ops=true. A look at every step
of it, on a CPU, takes the argument `test` instead.

The 5B model on clips of 16 seconds, from checkpoints of tools/convert_checkpoint.py in
one folder; four GPUs share each clip:

  python launch/train.py --config configs/train.py:ti2v-5b \
    --config.weights=checkpoints/ti2v-5b --config.data.folder=clips

Others:

  ... --config configs/train.py:toy,lora        an adapter, on the shipped networks
  ... --config configs/train.py:ti2v-5b,i2v,lora --config.precision=w4a16
  ... --config.devices=2 --config.sequence_devices=2     four GPUs, two for each sample

On several hosts that share a file system, all start the same command with, besides,
--distributed=HOST:PORT,PROCESS,PROCESSES (or auto).
"""

import ml_collections

SIZES = ("toy", "ti2v-5b", "test")
PRECISIONS = ("nvfp4", "fp8")
OPTIONS = ("i2v", "lora", *PRECISIONS)


def get_config(arg: str = "toy") -> ml_collections.ConfigDict:
  """Settings of a run.

  Args:
    arg: a size ('toy', the shipped model; 'ti2v-5b'; 'test', smallest sizes, a few
      steps), then comma-separated options: 'i2v' (every clip goes on from its first
      latent frame), 'lora' (an adapter instead of the networks), 'nvfp4' or 'fp8'
      (products in 4 or 8 bits).

  Raises:
    ValueError: unknown size or option, or two that exclude each other.
  """
  size, *options = arg.split(",")
  if size not in SIZES:
    raise ValueError(f"config={size!r} is unknown; choose from {', '.join(SIZES)}")
  for option in options:
    if option not in OPTIONS:
      raise ValueError(f"config option={option!r} is unknown; use {', '.join(OPTIONS)}")
  precisions = [option for option in options if option in PRECISIONS]
  if len(precisions) > 1:
    names = " and ".join(map(repr, precisions))
    raise ValueError(f"config options {names} exclude each other; use one")
  c = ml_collections.ConfigDict()
  c.workdir = "_".join(["outputs/train", size, *options])
  c.programs_dir = "~/.cache/longlive_jax/programs"  # compiled ones; '': not kept
  c.seed = 0
  c.steps = 21_000
  c.batch_size = 96  # sequences of view.window chunks

  # Networks, named as in configs/generate.py; those of 'random' weights are new. A
  # tokenizer stands beside the text encoder's weights; for a new one give it here, or
  # it is learned from the captions.
  c.size = size
  c.vae = size
  c.text = size
  c.weights = "random"
  c.dit_weights = ""
  c.vae_weights = f"outputs/{size}_vae"
  c.text_weights = ""
  c.tokenizer = ""
  c.precision = ""  # of an adapter's base
  c.precision_rule = "mse"
  c.train_text = "joint"  # or 'frozen'
  c.dtype = "bfloat16"  # of the computation; master weights are float32
  c.export_dtype = "bfloat16"  # of the weights that are shipped

  c.data = ml_collections.ConfigDict()
  # Of videos and captions (longlive_jax/data/clips.py), or of latents that
  # tools/encode_latents.py wrote.
  c.data.folder = "outputs/toy_data"
  c.data.chunks = 12  # from the start of every clip
  c.data.min_chunks = 0  # shorter clips are filled up, masked; 0: skipped
  c.data.frames_per_chunk = 8
  c.data.chunks_per_shot = 0  # without shot_durations.txt; 0: shots of one length
  c.data.max_chunks_per_shot = 0  # the rest of a shot is left out; 0: nothing
  c.data.height = 0  # pixels that videos are resized and cropped to; 0: as they are
  c.data.width = 0
  c.data.fps = 0.0  # that videos are resampled to; 0: as they are
  c.data.encode_once = True  # False: read and encode during training
  c.data.latents = "outputs/toy_latents"  # where encoded clips are kept; '' nowhere
  c.data.encode_batch = 32
  c.data.threads = 16

  # Which chunks a sequence is made of: see longlive_jax/train/context.py.
  c.view = ml_collections.ConfigDict()
  c.view.window = 4
  c.view.plain = 0.15
  c.view.no_sink = 0.1
  c.view.at_cut = 0.4
  c.view.sink = True
  c.view.multi_shot_sink = True
  c.view.clean_recache = 0.5  # probability
  c.view.caption_dropout = 0.1

  c.flow = ml_collections.ConfigDict()
  c.flow.shift = 3.0
  c.flow.weighting = "uniform"
  c.flow.conditioning_frames = 0  # given ones: 1 trains image to video
  c.flow.context_noise_max = 0
  c.flow.context_jitter = 0.1

  # The errors that the network makes, kept by noise level and added to later samples:
  # see longlive_jax/train/recycle.py. The paper has 50 buckets.
  c.recycle = ml_collections.ConfigDict()
  c.recycle.buckets = 0  # off
  c.recycle.capacity = 500
  c.recycle.clean_prob = 0.2
  c.recycle.noise_prob = 0.01
  c.recycle.latent_prob = 0.9
  c.recycle.context_prob = 0.9
  c.recycle.spread = 0.3
  c.recycle.clean_keep_prob = 0.1

  # Low precision of the products with weights; master weights stay float32.
  c.quantise = ml_collections.ConfigDict()
  # 'nvfp4', forward and backward, or 'fp8', forward. The options of that name set what
  # trains best beside it.
  c.quantise.mode = ""
  c.quantise.layers = ("blocks/*_attn/[qkvo]", "blocks/*ffn/fc[12]")
  c.quantise.plain_edges = 0  # first and last blocks that are not quantised
  # Of NVFP4:
  c.quantise.activation = "mse"  # rules, of quant/nvfp4.py
  c.quantise.weight = "mse"
  c.quantise.gradient = "mse"
  c.quantise.stochastic = True  # rounding of gradients
  c.quantise.tiles = True  # weights in 16 x 16
  c.quantise.hadamard = True  # in the gradient of weights
  c.quantise.centre = 0  # tokens whose mean is not quantised; 0: all is

  # An adapter is trained instead of the networks, beside their weights: see
  # longlive_jax/train/lora.py. Only it is saved, as model/lora and model/peft.
  c.lora = ml_collections.ConfigDict()
  c.lora.rank = 0  # off
  c.lora.alpha = 0.0  # 0: the rank
  c.lora.layers = ("blocks/*_attn/[qkvo]", "blocks/*ffn/fc[12]")

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.learning_rate = 8e-4
  c.optimizer.final_ratio = 0.01
  c.optimizer.warmup = 500
  c.optimizer.beta1 = 0.9
  c.optimizer.beta2 = 0.99
  c.optimizer.weight_decay = 0.01
  c.optimizer.clip = 1.0

  # The run. `devices` share the samples of a batch. Each may be a group:
  # `sequence_devices` that share the frames and heads of a sample, by `sp_layout`, see
  # longlive_jax/parallel/balanced.py. Parameters, averages and optimiser are split over
  # all of them. A run may go on with other numbers of devices.
  c.devices = 1
  c.sequence_devices = 1
  c.sp_layout = "balanced"  # or 'plain'
  c.accumulate = 1  # parts of a batch, one after the other, for each step
  c.remat = "none"  # less memory: 'blocks', 'attention', see layers/remat.py

  c.ema_decay = 0.9995
  c.ema_start = 1000

  # Videos of the averaged weights, in workdir/eval/STEP, and what detectors find in
  # them, with the metrics: see longlive_jax/train/evaluation.py.
  c.eval = ml_collections.ConfigDict()
  c.eval.every = 0  # steps; 0 is never
  c.eval.prompts = ""  # a file or folder; '': scenes of the toy world, which get scores
  c.eval.videos = 8
  c.eval.batch = 8  # generated together
  c.eval.chunks = 4
  c.eval.negative_prompt = ""
  c.eval.seed = 0
  c.sampling = ml_collections.ConfigDict()  # of these videos, as configs/generate.py
  c.sampling.window_frames = 32
  c.sampling.sink_frames = 8
  c.sampling.multi_shot_sink = True
  c.sampling.shot_rope_offset = 8.0
  c.sampling.clean_recache = False
  c.sampling.relative_rope = True
  c.sampling.solver = "unipc"
  c.sampling.steps = 8
  c.sampling.shift = 3.0
  c.sampling.guidance = 2.0
  c.decode_frames = 8  # latent frames at a time

  c.tensorboard = False  # event files in workdir/tensorboard: needs '.[tensorboard]'
  c.log_every = 100
  c.checkpoint_every = 2000
  c.keep_checkpoints = 2  # the newest
  c.keep_every = 0  # those at multiples of it stay, too
  c.stop_every = 10  # steps until a signal to one process is heard by all

  if size == "ti2v-5b":
    c.vae, c.text, c.weights = "wan2.2", "umt5-xxl", "checkpoints/ti2v-5b"
    c.vae_weights, c.train_text = "", "frozen"
    c.data.folder, c.data.encode_once, c.data.threads = "clips", False, 4
    c.data.height, c.data.width, c.data.fps = 704, 1280, 24.0
    # Whole clips: no chunk of theirs is left out between two others.
    c.view.window, c.view.plain, c.view.caption_dropout = c.data.chunks, 1.0, 0.0
    c.flow.shift, c.flow.weighting, c.flow.context_jitter = 5.0, "bell", 0.0
    c.optimizer.learning_rate, c.optimizer.final_ratio = 1e-5, 1.0
    c.optimizer.beta1, c.optimizer.beta2, c.optimizer.clip = 0.0, 0.999, 10.0
    c.optimizer.weight_decay, c.optimizer.warmup = 0.0, 0
    c.ema_decay, c.ema_start = 0.99, 100
    c.sampling.relative_rope, c.sampling.shift = False, 5.0
    c.sampling.steps, c.sampling.guidance = 50, 5.0  # not distilled yet
    c.eval.prompts, c.eval.videos, c.eval.batch = "prompts.txt", 2, 1
    c.decode_frames = 1
    c.steps, c.batch_size, c.sequence_devices, c.remat = 3000, 1, 4, "attention"
    c.log_every, c.checkpoint_every, c.stop_every = 10, 500, 1
  if size == "test":
    c.dtype = "float32"
    c.steps, c.batch_size, c.log_every, c.checkpoint_every = 6, 4, 1, 3
    c.data.chunks, c.data.frames_per_chunk, c.data.threads = 5, 2, 2
    c.data.encode_batch, c.data.latents = 2, ""
    c.optimizer.warmup, c.ema_start = 2, 2
    c.eval.videos, c.eval.batch, c.eval.chunks = 3, 2, 2
    c.sampling.window_frames, c.sampling.sink_frames, c.sampling.steps = 8, 2, 2
  if "i2v" in options:
    c.flow.conditioning_frames = 1
  if "lora" in options:
    c.train_text, c.lora.rank = "frozen", 128 if size == "ti2v-5b" else 16
    if size == "toy":
      c.weights, c.vae_weights = "", ""  # those that ship with the package
    if size == "ti2v-5b":
      c.optimizer.learning_rate = 1e-4
  if precisions:
    c.quantise.mode = precisions[0]
  if precisions == ["nvfp4"] and size != "test":  # which has two blocks
    # What it costs to leave one of these out: README, "In 4 bits".
    c.quantise.plain_edges, c.quantise.tiles = 1, False
    c.quantise.centre = 16 if size == "toy" else 64
  return c
