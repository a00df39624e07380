"""Encodes a folder of videos once, for trainings that read latents instead of videos.

  python tools/encode_latents.py --data outputs/toy_data --vae outputs/toy_vae \\
    --out outputs/toy_encoded
  python launch/train.py --config configs/train.py:toy \\
    --config.data.folder=outputs/toy_encoded --config.data.encode_once=False

writes OUT/latents/<name>.npz for every clip that can be read (all its whole chunks, in
float32, with the prompt of each) and reports the others. Started again it goes on with
those that are missing. A training that reads them must have the same frames_per_chunk.
"""

import json
from pathlib import Path

import jax.numpy as jnp
from absl import app, flags, logging

from longlive_jax.checkpoint import store
from longlive_jax.data.clip import LATENTS_SUFFIX, Chunking, save_latents
from longlive_jax.data.clips import ClipSource, load_clips, video_source
from longlive_jax.models.text import fingerprint
from longlive_jax.train.latents import encode_video

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_DATA = flags.DEFINE_string("data", None, "Folder of videos.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", None, "Folder to make.", flag_values=_FLAGS)
_VAE = flags.DEFINE_string("vae", None, "Its checkpoint.", flag_values=_FLAGS)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of computation.", flag_values=_FLAGS
)
_CHUNK = flags.DEFINE_integer(
  "frames_per_chunk", 8, "Latent frames.", flag_values=_FLAGS
)
_PER_SHOT = flags.DEFINE_integer(
  "chunks_per_shot", 0, "As in configs/train.py.", flag_values=_FLAGS
)
_MOST = flags.DEFINE_integer(
  "max_chunks_per_shot", 0, "As in configs/train.py.", flag_values=_FLAGS
)
_HEIGHT = flags.DEFINE_integer("height", None, "To resize to.", flag_values=_FLAGS)
_WIDTH = flags.DEFINE_integer("width", None, "To resize to.", flag_values=_FLAGS)
_FPS = flags.DEFINE_float("fps", None, "To resample to.", flag_values=_FLAGS)
_THREADS = flags.DEFINE_integer(
  "threads", 8, "Clips read at a time.", flag_values=_FLAGS
)


def encode(
  source: ClipSource, vae_folder: str, chunking: Chunking, about: dict, out: Path
) -> int:
  """Writes what is missing in `out`; returns how many clips it has then.

  Args:
    about: what the latents depend on besides.

  Raises:
    ValueError: `out` was made with other settings or of another VAE.
  """
  about = {**about, "vae": fingerprint(vae_folder), "chunking": str(chunking)}
  record = out / "about.json"
  if record.exists() and json.loads(record.read_text()) != about:
    raise ValueError(
      f"out={str(out)!r} holds latents of another VAE or other settings "
      f"({record}); choose another folder"
    )
  (out / "latents").mkdir(parents=True, exist_ok=True)
  record.write_text(json.dumps(about))
  vae = store.load_vae(vae_folder, dtype=jnp.dtype(_DTYPE.value))

  def place(name: str) -> Path:
    return out / "latents" / f"{name}{LATENTS_SUFFIX}"

  missing = [clip for clip in source if not place(clip.name).exists()]
  for start in range(0, len(missing), _THREADS.value):
    part = ClipSource(missing[start : start + _THREADS.value])
    for clip in load_clips(part, chunking, threads=_THREADS.value):
      latents = encode_video(vae, clip["frames"], chunking.frames_per_chunk)
      save_latents(place(clip["name"]), latents, clip["prompts"])
    source.skipped.update(part.skipped)
    logging.info("%d of %d clips", start + len(part), len(missing))
  return len([*out.glob(f"latents/*{LATENTS_SUFFIX}")])


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  for name, value in ("data", _DATA), ("out", _OUT), ("vae", _VAE):
    if not value.value:
      raise app.UsageError(f"--{name} is missing")
  size = {"height": _HEIGHT.value, "width": _WIDTH.value, "fps": _FPS.value}
  source = video_source(_DATA.value, **size)
  chunking = Chunking(
    _CHUNK.value,
    chunks_per_shot=_PER_SHOT.value,
    max_chunks_per_shot=_MOST.value,
  )
  about = {**size, "dtype": _DTYPE.value}
  count = encode(source, _VAE.value, chunking, about, Path(_OUT.value))
  print(f"{count} clips in {_OUT.value}, {len(source.skipped)} skipped")
  for name, cause in source.skipped.items():
    print(f"  {name}: {cause}")


if __name__ == "__main__":
  app.run(main)
