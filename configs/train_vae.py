"""Settings of launch/train_vae.py.

The toy VAE of the quickstart, about six minutes on one H200:

  python -m longlive_jax.data.toy_world --out outputs/toy_data --clips 3400
  python launch/train_vae.py --config configs/train_vae.py:toy \
      --config.data.folder=outputs/toy_data --config.out=outputs/toy_vae

A look at every step of it, on a CPU, takes the argument `test` instead.
"""

import ml_collections


def get_config(arg: str = "toy") -> ml_collections.ConfigDict:
  """Settings by name.

  Args:
    arg: 'toy' (the shipped model) or 'test' (smallest sizes, a few steps).

  Raises:
    ValueError: unknown name.
  """
  if arg not in ("toy", "test"):
    raise ValueError(f"config={arg!r} is unknown; choose from toy, test")
  c = ml_collections.ConfigDict()
  c.workdir = f"outputs/train_vae_{arg}"  # metrics and checkpoints to resume from
  c.out = f"outputs/{arg}_vae"  # the trained VAE
  c.size = arg  # of longlive_jax.models.vae.VAE_SIZES
  c.programs_dir = "~/.cache/longlive_jax/programs"  # compiled ones; '': not kept
  c.seed = 0
  c.steps = 5000
  c.batch_size = 20
  c.frames = 17  # 1 + 4 k frames of a window
  c.dtype = "bfloat16"  # of the computation; master weights are float32

  c.data = ml_collections.ConfigDict()
  c.data.folder = "outputs/toy_data"
  c.data.clips = 1200  # kept in memory, 19 MB each
  c.data.holdout = 16  # of these, for the final measurement only
  c.data.statistics = 100  # clips that the latent statistics are measured on
  c.data.chunks = 12  # from the start of every clip; shorter ones are skipped
  c.data.frames_per_chunk = 8
  c.data.height = 128
  c.data.width = 128
  c.data.threads = 16

  c.loss = ml_collections.ConfigDict()
  c.loss.kl = 1e-4
  c.loss.difference = 1.0
  c.loss.square = 5.0

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.learning_rate = 2e-3
  c.optimizer.final_ratio = 0.01
  c.optimizer.warmup = 200
  c.optimizer.beta1 = 0.9
  c.optimizer.beta2 = 0.99
  c.optimizer.weight_decay = 0.0
  c.optimizer.clip = 1.0

  c.ema_decay = 0.998
  c.ema_start = 200

  c.log_every = 50
  c.checkpoint_every = 1000
  c.keep_checkpoints = 1

  if arg == "test":
    c.steps, c.batch_size, c.frames, c.dtype = 4, 2, 5, "float32"
    c.log_every, c.checkpoint_every = 1, 2
    c.data.clips, c.data.holdout, c.data.statistics = 4, 1, 2
    c.data.chunks, c.data.frames_per_chunk, c.data.threads = 1, 2, 2
    c.data.height, c.data.width = 32, 32
    c.optimizer.warmup, c.ema_start = 2, 2
  return c
