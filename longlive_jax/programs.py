"""Compiled programs that outlive the process."""

import logging
import tempfile
from pathlib import Path

import jax

log = logging.getLogger(__name__)


def keep_programs(folder: str) -> None:
  """Has JAX keep what it compiles in a folder, and look there before it compiles.

  How a GPU's programs were tuned is kept beside them, so that a program that changed a
  little is tuned only in what changed. Call it before anything is compiled. Files that
  another version, device or setting made are never used, and all may be deleted.

  Args:
    folder: made if it is not there; '' leaves JAX's own settings alone. A folder that
      cannot be written is reported, and nothing is kept.
  """
  if not folder:
    return
  path = Path(folder).expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    log.warning(
      "programs_dir=%s is not writable (%s): nothing compiled is kept for the next "
      "start; choose another folder, or '' for none",
      path,
      error.strerror,
    )
    return
  jax.config.update("jax_compilation_cache_dir", str(path))
  # By default only what took a second: but a start has hundreds of small programs.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  jax.config.update(
    "jax_persistent_cache_enable_xla_caches", "xla_gpu_per_fusion_autotune_cache_dir"
  )
