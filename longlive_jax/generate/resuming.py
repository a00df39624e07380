"""Settings of a run that goes on from a saved state: the saved ones, or refused."""

from collections.abc import Mapping
from typing import Any

# Settings that a saved state was made with, so that a resumed run cannot have others:
# the seed is in its noise key, the rest in the shapes and the meaning of its cache.
SAVED_SETTINGS = (
  "seed", "size", "vae", "dtype", "height", "width", "frames_per_chunk",
  "window_frames", "independent_first_frame", "relative_rope", "t_scale",
  "kv_format", "kv_smoothing", "kv_rule", "vae_precision",
)  # fmt: skip


def resumed_settings(
  config: Mapping[str, Any], saved: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
  """Settings of a saved run, but for what the command line overrides.

  Args:
    config: all settings that there are. Those that the saved run lacks, being of an
      older version, are taken from here.
    saved: config of the run that is resumed.
    overrides: what was asked for now.

  Raises:
    ValueError: the saved run has settings that there are not.
  """
  if unknown := sorted(set(saved) - set(config)):
    raise ValueError(
      f"resume: the saved run has settings that are unknown here: {unknown}; resume it "
      "with the longlive_jax, and the --config file, that saved it"
    )
  return {**config, **saved, **overrides}


def check_resumed(config: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
  """Raises ValueError for settings that the saved state does not allow to change.

  Args:
    saved: config of the run that is resumed; states of older versions lack some.
  """
  saved = {"kv_format": "", "vae_precision": "", **saved}
  changed = [n for n in SAVED_SETTINGS if n in saved and config.get(n) != saved[n]]
  guidance = config["guidance"]
  guided = guidance != 1.0, saved.get("guidance", guidance) != 1.0
  if guided[0] != guided[1]:  # from 2 to 3 is fine; on and off is another cache
    changed.append("guidance")
  if changed:
    name = changed[0]
    raise ValueError(
      f"{name}={config[name]!r} cannot be set with --resume: the saved state was made "
      f"with {name}={saved[name]!r}; leave it out, or start a new video with "
      "--continue_from"
    )
