"""Cases of tools/bench_kernels.py: attention over training clips."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.kernels import flash_attention, launch
from longlive_jax.kernels.clip_layout import ClipLayout
from longlive_jax.kernels.flash_attention import Tiles
from longlive_jax.kernels.shapes import Sizes
from longlive_jax.layers import teacher_forcing

Array = jax.Array
Case = tuple[dict[str, Any], Callable[..., Any], Callable[[Array], tuple]]

# Those that fit the registers and the shared memory of a Hopper at heads of 128.
SWEEP = {
  "forward": [
    Tiles(128, 128, 8, 2), Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 2),
    Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 4), Tiles(128, 64, 4, 3),
    Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 2),
  ],
  "query_gradient": [
    Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2),
    Tiles(128, 32, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3),
  ],
  "key_gradient": [
    Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 3), Tiles(32, 128, 8, 3),
    Tiles(32, 128, 8, 4), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3),
  ],
}  # fmt: skip
# Matrix products of a kernel: the forward pass has two, and a mask leaves part of each.
PRODUCTS = {"forward": 2, "backward": 5, "query_gradient": 3, "key_gradient": 4}


def clip_of(sizes: Sizes, name: str) -> tuple[ClipLayout, tuple[int, int, int, int]]:
  """Layout of a clip, and shape of a rank's queries, keys or values.

  Raises:
    ValueError: an unknown name.
  """
  if name not in sizes.clips:
    raise ValueError(f"clips={name!r} is unknown; use {', '.join(sizes.clips)}")
  clip = sizes.clips[name]
  layout = ClipLayout.of_frames(
    clip.frames, sizes.frames, sizes.tokens, ranks=clip.ranks
  )
  return layout, (1, layout.length, sizes.heads // clip.ranks, sizes.head_dim)


def _case(
  kernel: str, sizes: Sizes, name: str, function, arguments, **labels: Any
) -> Case:
  layout, shape = clip_of(sizes, name)
  operations = 2 * PRODUCTS[kernel] * layout.pairs() * shape[2] * shape[3]
  labels = {"clip": name, "shape": list(shape), "operations": operations, **labels}
  return {"kernel": f"teacher_forcing_{kernel}", **labels}, function, arguments


def numbers(key: Array, count: int, shape: tuple[int, ...]) -> tuple[Array, ...]:
  return tuple(jax.random.normal(key, (count, *shape), jnp.bfloat16))


def cases(sizes: Sizes, clips: list[str], implementation: str) -> Iterator[Case]:
  """Attention over training clips, forward and backward."""
  for name in clips:
    layout, shape = clip_of(sizes, name)
    attend = functools.partial(
      teacher_forcing.attention, layout=layout, implementation=implementation
    )

    def pull_back_of(key, attend=attend, shape=shape):
      q, k, v, gradient = numbers(key, 4, shape)
      return jax.vjp(attend, q, k, v)[1], gradient

    labels = {"implementation": implementation}
    arguments = functools.partial(numbers, count=3, shape=shape)
    yield _case("forward", sizes, name, attend, arguments, **labels)
    yield _case("backward", sizes, name, lambda f, *g: f(*g), pull_back_of, **labels)


def sweep(sizes: Sizes, clips: list[str], run: launch.Launcher) -> Iterator[Case]:
  """Each kernel of the Triton attention with each of its tiles."""
  for name in clips:
    layout, shape = clip_of(sizes, name)
    for kernel, choices in SWEEP.items():
      call = getattr(flash_attention, f"{kernel}_call")
      for tiles in choices:

        def function(*arrays, call=call, layout=layout, tiles=tiles):
          return run(call(arrays, None, layout, tiles))

        arguments = functools.partial(_arguments, kernel=kernel, shape=shape)
        labels = {"implementation": "triton", "tiles": dataclasses.asdict(tiles)}
        yield _case(kernel, sizes, name, function, arguments, **labels)


def _arguments(key: Array, kernel: str, shape: tuple[int, ...]) -> tuple[Array, ...]:
  """What a kernel reads: q, k, v; backward also the gradient, lse and delta."""
  if kernel == "forward":
    return numbers(key, 3, shape)
  b, s, n, _ = shape
  row = jnp.zeros((b, n, s), jnp.float32)
  return *numbers(key, 4, shape), row + np.log(s), row
