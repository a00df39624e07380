"""What generating costs: operations and bytes of every stage, by formula.

Nothing is built or run, so a plan can be weighed (parallel/plan.py) and a measured time
held against its floor (tools/bench_generate.py). Operations are those of products,
attention and convolutions, two for a multiplication with its addition. Bytes are the
least that must move: what a stage reads, its weights and what it writes, once.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from longlive_jax.kernels.clip_layout import ClipLayout
from longlive_jax.models.dit import WanConfig
from longlive_jax.models.vae import VAEConfig

# Bits of a number with its scales: 16 of an NVFP4 block share one of 8 bits.
WEIGHT_BITS = {"w4a16": 4.5, "w4a4": 4.5, "w4a4_native": 4.5, "w8a16": 8.0, "fp8": 8.0}
CACHE_BITS = {"e4m3": 8.0, "fp8": 8.0, "nvfp4": 4.5}
# Where weights alone are packed, they are unpacked in front of every product.
UNPACKED = ("w4a16", "w8a16")
UNITS = {"fp8": "matrix_fp8", "w4a4_native": "matrix_fp4"}


@dataclasses.dataclass(frozen=True)
class Cost:
  """A piece of work whose operations and memory traffic overlap.

  Attributes:
    flops: operations.
    bytes: read and written.
    unit: what bounds the operations, a rate of `hardware.Hardware`: 'matrix',
      'matrix_fp8', 'matrix_fp4', 'attention', 'attention_fp8' or 'convolution'.
  """

  flops: float
  bytes: float
  unit: str = "matrix"


@dataclasses.dataclass(frozen=True)
class Stage:
  """One part of a chunk: `calls` times its pieces, one after the other."""

  calls: int
  costs: tuple[Cost, ...]

  @property
  def flops(self) -> float:
    """Of one call."""
    return sum(cost.flops for cost in self.costs)

  @property
  def bytes(self) -> float:
    """Of one call."""
    return sum(cost.bytes for cost in self.costs)


@dataclasses.dataclass(frozen=True)
class Work:
  """A device's part in generating one chunk.

  Attributes:
    rows: videos on the device, times guidance branches.
    frames, window_frames: latent frames of a chunk, and attended.
    tokens: of a latent frame.
    steps: of the solver; there is one more forward, the clean pass.
    itemsize: bytes of a number that is not quantised.
    precision, kv_format: of weights and of cache, as the config names them.
    attention_format: '', or 'fp8' for attention to the window in 8 bits.
    split: devices that share the tokens of a chunk; in attention, its heads.
    unrolled: layers are run one by one, with positions that do not change.
  """

  rows: int
  frames: int
  window_frames: int
  tokens: int
  steps: int
  itemsize: int
  precision: str = ""
  kv_format: str = ""
  attention_format: str = ""
  split: int = 1
  unrolled: bool = False

  @property
  def chunk_tokens(self) -> int:
    """Tokens of a chunk of one row, each frame's filled up to a multiple of `split`."""
    return self.frames * -(-self.tokens // self.split) * self.split

  @property
  def cache_itemsize(self) -> float:
    return CACHE_BITS.get(self.kv_format, 8 * self.itemsize) / 8

  @property
  def holds_windows(self) -> bool:
    """Whether they are copied once a chunk, see `cached_forward.can_hold`."""
    formats = self.kv_format, self.attention_format
    plain = not any((self.precision, *formats))
    return self.unrolled and (plain or formats == ("e4m3", "fp8"))

  @property
  def weight_itemsize(self) -> float:
    """Of a block's linear layers."""
    return WEIGHT_BITS.get(self.precision, 8 * self.itemsize) / 8


# ------------------------------------------------------------------ transformer
def transformer_stages(config: WanConfig, work: Work) -> dict[str, Stage]:
  """Every stage of a chunk on one device, with a full window."""
  c, size = config, work.itemsize
  passes, layers = work.steps + 1, c.layers * (work.steps + 1)
  whole = layers - 1  # the clean pass needs of its last block keys and values only
  reads = 2 * c.layers - 1 if work.holds_windows else whole
  tokens = work.rows * work.chunk_tokens // work.split
  queries, width = work.rows * work.chunk_tokens, c.dim // work.split
  keys = work.rows * work.window_frames * work.tokens
  texts, frames = work.rows * c.text_len, work.rows * work.frames
  residual = Cost(0, size * tokens * c.dim)  # x is read once more
  patch = c.patch**2

  def plain(rows: int, d_in: int, d_out: int) -> Cost:
    moved = size * (d_in * d_out + rows * (d_in + d_out))
    return Cost(2 * rows * d_in * d_out, moved)

  def packed(rows: int, d_in: int, d_out: int) -> tuple[Cost, ...]:
    """A linear layer of a block."""
    product, weights = plain(rows, d_in, d_out), d_in * d_out
    stored = work.weight_itemsize * weights
    if work.precision in UNPACKED:
      return Cost(0, stored + size * weights), product
    moved = product.bytes - size * weights + stored
    return (Cost(product.flops, moved, UNITS.get(work.precision, "matrix")),)

  def attention(queries: int, keys_a_query: int, keys: int, width: int) -> Cost:
    moved = size * width * (2 * queries + 2 * keys)
    return Cost(4 * queries * keys_a_query * width, moved, "attention")

  attended = attention(queries, keys // work.rows, keys, width)
  turned = read = size  # bytes of a number of q, and of k and the window
  if work.attention_format == "fp8":
    attended = Cost(attended.flops, attended.bytes / size, "attention_fp8")
    turned, read = 1, 1 if work.kv_format == "e4m3" else size
  return {
    "patch_embedding": Stage(passes, (plain(tokens, c.in_channels * patch, c.dim),)),
    "time": Stage(
      passes,
      (
        plain(frames, c.freq_dim, c.dim),
        plain(frames, c.dim, c.dim),
        plain(frames, c.dim, 6 * c.dim),
      ),
    ),
    "qkv": Stage(layers, packed(tokens, c.dim, 3 * c.dim)),
    "norm_rope": Stage(
      layers, (Cost(0, (2 * size + turned + read) * tokens * c.dim),)
    ),
    "cache_read": Stage(
      reads, (Cost(0, 2 * keys * width * (work.cache_itemsize + read)),)
    ),
    "attention": Stage(whole, (attended,)),
    "output": Stage(whole, (*packed(tokens, c.dim, c.dim), residual)),
    "cross_attention": Stage(
      whole,
      (
        *packed(tokens, c.dim, c.dim),
        attention(tokens, c.text_len, texts, c.dim),
        *packed(tokens, c.dim, c.dim),
        residual,
      ),
    ),
    "ffn": Stage(
      whole,
      (
        *packed(tokens, c.dim, c.ffn_dim),
        *packed(tokens, c.ffn_dim, c.dim),
        residual,
      ),
    ),
    "head": Stage(work.steps, (plain(tokens, c.dim, c.out_channels * patch),)),
    "text": Stage(
      1,
      (
        plain(texts, c.text_dim, c.dim),
        plain(texts, c.dim, c.dim),
        *(c.layers * packed(texts, c.dim, 2 * c.dim)),
      ),
    ),
    "cache_write": Stage(
      1,
      (Cost(0, 2 * c.layers * queries * width * (size + 3 * work.cache_itemsize)),),
    ),
  }


def block_weights(config: WanConfig) -> int:
  """Numbers in the linear layers of all blocks, biases apart: what is quantised."""
  return config.layers * (8 * config.dim**2 + 2 * config.dim * config.ffn_dim)


def parameters(config: WanConfig) -> int:
  """Numbers of a transformer."""
  c, patch = config, config.patch**2

  def linear(d_in: int, d_out: int) -> int:
    return (d_in + 1) * d_out

  # A block: biases of 8 projections and 2 of the FFN, 4 norms of q and k, norm3 with
  # its bias, 6 rows of modulation.
  small = (8 + 1 + 4 + 2 + 6) * c.dim + c.ffn_dim
  return (
    block_weights(c)
    + c.layers * small
    + linear(c.in_channels * patch, c.dim)
    + linear(c.text_dim, c.dim)
    + linear(c.freq_dim, c.dim)
    + 2 * linear(c.dim, c.dim)
    + linear(c.dim, 6 * c.dim)
    + linear(c.dim, c.out_channels * patch)
    + 2 * c.dim
  )


def transformer_bytes(config: WanConfig, precision: str, itemsize: int) -> float:
  """Of its weights."""
  blocks = block_weights(config)
  packed = WEIGHT_BITS.get(precision, 8 * itemsize) / 8 * blocks
  return packed + itemsize * (parameters(config) - blocks)


def cache_bytes(config: WanConfig, work: Work) -> float:
  """Of a device's keys and values."""
  numbers = work.rows * work.window_frames * work.tokens * config.dim // work.split
  return 2 * config.layers * numbers * work.cache_itemsize


def forward_bytes(config: WanConfig, work: Work) -> float:
  """Temporaries of `denoise_chunk`, by what was seen of the 5B model on an H200.

  Keys of the prompts, keys and values that the clean pass hands out, a layer's window
  twice (as read, and with the chunk in it), the FFN's hidden numbers twice, and about
  16 times the tokens: within 4% of what runs with plain and with NVFP4 numbers had
  beside their weights and caches. Windows of all layers if they are held.
  """
  c, size = config, work.itemsize
  tokens = work.rows * work.chunk_tokens // work.split
  texts = 2 * c.layers * work.rows * c.text_len * c.dim * size
  kept = 2 * c.layers * tokens * c.dim * work.cache_itemsize
  window = 2 * work.rows * work.window_frames * work.tokens * c.dim // work.split
  held = cache_bytes(config, work) if work.holds_windows else 0
  inside = size * (2 * window + tokens * (2 * c.ffn_dim + 16 * c.dim))
  return texts + kept + held + inside


# ------------------------------------------------------------------ training
def clip_flops(
  config: WanConfig, layout: ClipLayout, frames: int, prompts: int
) -> dict[str, int]:
  """Operations of a forward pass over a clip, by what limits their precision.

  The backward pass has twice as many. What rematerialisation does again is left out.

  Args:
    layout: of the clip's tokens; teacher-forced they are there twice.
    frames: latent frames of the clip.
    prompts: of the clip.

  Returns:
    products: of the blocks' linear layers with tokens; attention: among tokens;
    rest: attention to prompts, what prompts and times go through, both ends.
  """
  c, tokens = config, layout.length
  texts, times = layout.halves * prompts * c.text_len, layout.halves * frames
  patch = c.patch**2
  to_text = c.layers * (4 * tokens * c.text_len * c.dim + 4 * texts * c.dim**2)
  embedded = texts * (c.text_dim * c.dim + c.dim**2)
  embedded += times * (c.freq_dim * c.dim + 7 * c.dim**2)
  ends = tokens * c.dim * patch * (c.in_channels + c.out_channels)
  block = 6 * c.dim**2 + 2 * c.dim * c.ffn_dim
  return {
    "products": 2 * c.layers * tokens * block,
    "attention": 4 * c.layers * layout.pairs() * c.dim,
    "rest": to_text + 2 * (embedded + ends),
  }


# ------------------------------------------------------------------ video VAE
@dataclasses.dataclass(frozen=True)
class Convolution:
  """A convolution of the video VAE, for one latent frame.

  Attributes:
    frames, rows, columns: of its output.
    c_in, c_out: channels.
    taps: of the kernel, space and time together.
    history: input frames that are kept between calls.
    folded: nearest 2x upsampling is part of it: four kernels of 2 x 2 for a source
      pixel instead of one of 3 x 3 for each of its four outputs.
    residual: of a residual block: in a decoder in FP8 it multiplies codes.
  """

  frames: int
  rows: int
  columns: int
  c_in: int
  c_out: int
  taps: int
  history: int = 0
  folded: bool = False
  residual: bool = False

  @property
  def positions(self) -> int:
    return self.frames * self.rows * self.columns

  @property
  def flops(self) -> int:
    taps = 4 if self.folded else self.taps
    return 2 * self.positions * self.c_in * self.c_out * taps

  @property
  def unfolded_flops(self) -> int:
    return 2 * self.positions * self.c_in * self.c_out * self.taps

  @property
  def parameters(self) -> int:
    return (self.c_in * self.taps + 1) * self.c_out

  @property
  def output(self) -> int:
    """Numbers that it writes."""
    return self.positions * self.c_out

  @property
  def input(self) -> int:
    """Numbers that it reads."""
    return self.positions * self.c_in // (4 if self.folded else 1)

  @property
  def state(self) -> int:
    """Numbers that it keeps between calls."""
    return self.history * self.rows * self.columns * self.c_in

  def operand_bytes(self, precision: str, itemsize: int) -> int:
    """Of a number that it multiplies: of inputs, state and weights."""
    return 1 if precision and self.residual else itemsize

  def unit(self, precision: str) -> str:
    """Which rate of the hardware is its own."""
    # kernels/fp8_conv.py multiplies whole tiles of channels.
    codes = precision and self.residual and self.c_in % 128 == 0
    return "convolution_fp8" if codes else "convolution"


def _residual_block(
  frames: int, rows: int, columns: int, c_in: int, c_out: int
) -> Iterator[Convolution]:
  size = (frames, rows, columns)
  yield Convolution(*size, c_in, c_out, 27, history=2, residual=True)
  yield Convolution(*size, c_out, c_out, 27, history=2, residual=True)
  if c_in != c_out:
    yield Convolution(*size, c_in, c_out, 1)


def _middle(rows: int, columns: int, c: int) -> Iterator[Convolution]:
  """Its attention is left out: `frame_attention`."""
  yield from _residual_block(1, rows, columns, c, c)
  yield Convolution(1, rows, columns, c, 3 * c, 1)
  yield Convolution(1, rows, columns, c, c, 1)
  yield from _residual_block(1, rows, columns, c, c)


def decoder_convolutions(config: VAEConfig, y: int, x: int) -> Iterator[Convolution]:
  """In the order of the network, for a latent frame of y rows and x columns."""
  z, widths = config.z_dim, config.decoder_widths
  yield Convolution(1, y, x, z, z, 1)
  yield Convolution(1, y, x, z, widths[0], 27, history=2)
  yield from _middle(y, x, widths[0])
  frames, rows, columns = 1, y, x
  time = (*config.temporal_downsample[::-1], False)
  for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
    for block in range(config.num_res_blocks + 1):
      c = c_out if block else c_in
      yield from _residual_block(frames, rows, columns, c, c_out)
    if time[i]:
      yield Convolution(frames, rows, columns, c_out, 2 * c_out, 3, history=2)
      frames *= 2
    if i < len(time) - 1:
      rows, columns = 2 * rows, 2 * columns
      yield Convolution(frames, rows, columns, c_out, c_out, 9, folded=True)
  yield Convolution(frames, rows, columns, widths[-1], 12, 27, history=2)


def encoder_convolutions(config: VAEConfig, y: int, x: int) -> Iterator[Convolution]:
  """In the order of the network, for a latent frame of y rows and x columns."""
  z, widths = config.z_dim, config.encoder_widths
  scale = config.spatial_factor // 2  # two pixels are folded beforehand
  frames, rows, columns = config.temporal_factor, y * scale, x * scale
  yield Convolution(frames, rows, columns, 12, widths[0], 27, history=2)
  time = (*config.temporal_downsample, False)
  for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
    for block in range(config.num_res_blocks):
      c = c_out if block else c_in
      yield from _residual_block(frames, rows, columns, c, c_out)
    if i < len(time) - 1:
      rows, columns = rows // 2, columns // 2
      yield Convolution(frames, rows, columns, c_out, c_out, 9)
    if time[i]:
      frames //= 2
      yield Convolution(frames, rows, columns, c_out, c_out, 3, history=1)
  yield from _middle(y, x, widths[-1])
  yield Convolution(1, y, x, widths[-1], 2 * z, 27, history=2)
  yield Convolution(1, y, x, 2 * z, 2 * z, 1)


def encoder_part_flops(config: VAEConfig, y: int, x: int) -> tuple[int, ...]:
  """Operations of a latent frame in each of `Encoder.parts`, attention included."""
  parts = [0]
  for conv in encoder_convolutions(config, y, x):
    parts[-1] += conv.flops
    if conv.history == 1:  # what halves time ends a part
      parts.append(0)
  parts[-1] += int(frame_attention(config.encoder_widths[-1], y, x, 2).flops)
  return tuple(parts)


def frame_attention(c: int, y: int, x: int, itemsize: int) -> Cost:
  """Attention of the middle of the VAE, for one latent frame."""
  pixels = y * x
  return Cost(4 * pixels**2 * c, itemsize * 4 * pixels * c, "matrix")


def decode_stage(
  config: VAEConfig,
  y: int,
  x: int,
  *,
  videos: int,
  frames: int,
  frames_per_call: int,
  itemsize: int,
  precision: str = "",
) -> Stage:
  """Decoding the latent frames of a chunk, some at a time.

  Weights and state are read, and the state written, once a call.

  Args:
    precision: of the decoder, as the config names it; here and below.
  """
  n = videos * frames_per_call
  costs = []
  for conv in decoder_convolutions(config, y, x):
    size = conv.operand_bytes(precision, itemsize)
    moved = size * (n * conv.input + conv.parameters + 2 * videos * conv.state)
    moved += itemsize * n * conv.output
    costs.append(Cost(n * conv.flops, moved, conv.unit(precision)))
  one = frame_attention(config.decoder_widths[0], y, x, itemsize)
  costs.append(Cost(n * one.flops, n * one.bytes, one.unit))
  return Stage(-(-frames // frames_per_call), tuple(costs))


def decoder_bytes(config: VAEConfig, itemsize: int, precision: str = "") -> float:
  """Of the decoder's weights; those of its norms do not show."""
  convolutions = decoder_convolutions(config, 1, 1)
  return sum(c.operand_bytes(precision, itemsize) * c.parameters for c in convolutions)


def encoder_bytes(config: VAEConfig, itemsize: int) -> float:
  """Of the encoder's weights; those of its norms do not show."""
  scale = config.spatial_factor
  convolutions = encoder_convolutions(config, scale, scale)
  return itemsize * sum(c.parameters for c in convolutions)


def decoder_state_bytes(
  config: VAEConfig, y: int, x: int, itemsize: int, precision: str = ""
) -> float:
  """What decoding one video remembers between calls."""
  convolutions = decoder_convolutions(config, y, x)
  return sum(c.operand_bytes(precision, itemsize) * c.state for c in convolutions)


def decoding_bytes(
  config: VAEConfig, y: int, x: int, frames_per_call: int, itemsize: int
) -> float:
  """Temporaries of decoding one video: about 4.2 times its largest activation.

  As seen on an H200 of the full decoder, one latent frame at a time: 3.9e9 bytes.
  """
  largest = max(conv.output for conv in decoder_convolutions(config, y, x))
  return 4.2 * itemsize * frames_per_call * largest
