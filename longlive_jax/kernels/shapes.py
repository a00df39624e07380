"""Sizes that tests and tools/bench_kernels.py share: the real ones and tiny ones."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Clip:
  """A training clip: its latent frames, and the ranks that share its attention."""

  frames: int
  ranks: int = 1


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What kernels meet while one chunk is generated, and in training.

  Attributes:
    frames: latent frames of a chunk.
    window: latent frames that are attended.
    tokens: of a frame.
    heads, head_dim, ffn_dim: of the DiT.
    rows: numbers of rows that a product with packed weights is measured at.
    clips: training clips by their length in seconds. A rank has its share of heads.
  """

  frames: int
  window: int
  tokens: int
  heads: int
  head_dim: int
  ffn_dim: int
  rows: tuple[int, ...]
  clips: dict[str, Clip]

  @property
  def dim(self) -> int:
    return self.heads * self.head_dim

  @property
  def activations(self) -> tuple[int, int, int]:
    """(frames, tokens, dim): what a linear layer reads."""
    return self.frames, self.tokens, self.dim

  @property
  def chunk_keys(self) -> tuple[int, int, int, int]:
    """(frames, tokens, heads, head_dim): keys or values that a chunk adds."""
    return self.frames, self.tokens, self.heads, self.head_dim

  @property
  def window_keys(self) -> tuple[int, int, int, int]:
    """(window, tokens, heads, head_dim): cached keys or values of a layer."""
    return self.window, self.tokens, self.heads, self.head_dim

  @property
  def weights(self) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of a block."""
    return {
      "qkvo": (self.dim, self.dim),
      "fc1": (self.ffn_dim, self.dim),
      "fc2": (self.dim, self.ffn_dim),
    }


SIZES = {
  # 704 x 1280 pixels: 7,040 tokens a chunk, 28,160 a window.
  "ti2v-5b": Sizes(
    frames=8, window=32, tokens=880, heads=24, head_dim=128, ffn_dim=14336,
    rows=(1, 16, 64, 256, 7040),
    clips={"5s": Clip(32), "16s": Clip(96), "64s": Clip(384, ranks=4)},
  ),
  # Tokens that fill no tile, and widths that fill no tile of a product.
  "test": Sizes(
    frames=2, window=3, tokens=37, heads=3, head_dim=32, ffn_dim=208, rows=(1, 17, 74),
    clips={"5s": Clip(4), "16s": Clip(6, ranks=3)},
  ),
}  # fmt: skip
