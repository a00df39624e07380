"""The start of a run: programs that are kept, programs compiled ahead, its parts."""

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from random_weights import normal, random_dit, random_vae

from longlive_jax.generate import report
from longlive_jax.generate import stream as streaming
from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import dit
from longlive_jax.parallel import mesh as meshes
from longlive_jax.programs import keep_programs

pytestmark = pytest.mark.usefixtures("quick_compiling")

CONFIG = dit.SIZES["test"]
SAMPLING = Sampling(
  frames_per_chunk=2, window_frames=6, sink_frames=2, steps=1, solver="euler"
)
SETTINGS = (
  "jax_compilation_cache_dir",
  "jax_persistent_cache_min_compile_time_secs",
  "jax_persistent_cache_min_entry_size_bytes",
  "jax_persistent_cache_enable_xla_caches",
)


# ---------------------------------------------------------------------- kept programs
@pytest.fixture
def settings() -> Iterator[dict]:
  """JAX's settings of kept programs, put back after the test."""
  before = {name: getattr(jax.config, name) for name in SETTINGS}
  compilation_cache.reset_cache()
  yield before
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_programs_are_kept_and_found(tmp_path, settings):
  keep_programs(str(tmp_path / "new" / "programs"))
  hits = []
  count = lambda event, **_: hits.append(event.endswith("/cache_hits"))  # noqa: E731

  def compile_it():
    return jax.jit(lambda x: jnp.sin(x) * 3 + 1)(np.arange(5.0))

  first = compile_it()
  assert any((tmp_path / "new" / "programs").iterdir())
  jax.monitoring.register_event_listener(count)
  second = compile_it()  # another function of the same program
  jax.monitoring.unregister_event_listener(count)
  assert any(hits)
  np.testing.assert_array_equal(first, second)
  assert "autotune" in jax.config.jax_persistent_cache_enable_xla_caches


def test_without_a_folder_nothing_changes(tmp_path, settings, caplog):
  keep_programs("")
  (tmp_path / "file").write_text("")
  with caplog.at_level(logging.WARNING):
    keep_programs(str(tmp_path / "file" / "programs"))
  assert "file/programs is not writable (Not a directory)" in caplog.text
  assert {name: getattr(jax.config, name) for name in SETTINGS} == settings


# ---------------------------------------------------------------------- compiled ahead
@contextlib.contextmanager
def compiling() -> Iterator[list[str]]:
  """Names of the functions that are compiled meanwhile."""
  names = []

  def note(event: str, _: float, fun_name: str = "", **__) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(fun_name.removeprefix("jit(").removesuffix(")"))

  jax.monitoring.register_event_duration_secs_listener(note)
  yield names
  jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("devices", [None, 1])
def test_the_stream_finds_its_steps_compiled(devices):
  # A shift that is nobody else's: programs of other tests do not count.
  sampling = dataclasses.replace(SAMPLING, shift=4.5)
  mesh = None
  if devices:
    axes = (meshes.DATA, meshes.BRANCH, meshes.SEQUENCE)
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((devices, 1, 1), axes, axis_types=auto)
  if mesh is None:  # two chunk lengths, and two rows a video
    sampling = dataclasses.replace(sampling, guidance=2.0, independent_first_frame=True)
  story = streaming.Story(
    embeddings=normal(1, 5, CONFIG.text_dim),
    negative=normal(5, CONFIG.text_dim),
    prompt_index=np.zeros((2, 1), np.int32),
    cut=np.zeros((2, 1), bool),
    shot=np.zeros((2, 1), np.int32),
  )
  where = jax.devices()[0] if mesh is None else jax.NamedSharding(mesh, jax.P())
  networks = jax.device_put((random_dit(), random_vae()), where)

  def start(*networks):
    key, samples = jax.random.key(0), np.arange(1)
    return streaming.init_state(
      *networks, sampling, key=key, samples=samples, y=2, x=2
    )

  state = start(*networks)
  if mesh is not None:
    state = streaming.shard_state(state, mesh)
  abstract = jax.eval_shape(lambda: networks)
  empty = jax.eval_shape(lambda: start(*abstract))
  with compiling() as ahead:
    streaming.compile_ahead(*abstract, empty, story, sampling, mesh=mesh)
  assert ahead.count("_denoise") == 1 + sampling.independent_first_frame
  with compiling() as later:
    chunks = streaming.stream(*networks, state, story, sampling, mesh=mesh)
    assert next(chunks).frames is not None
  # The stream is a chunk ahead: two have been asked for.
  assert not {"_denoise", "_decode", "_noise"} & set(later)
  assert len(list(chunks)) == 1


# ---------------------------------------------------------------------- its parts
def test_the_parts_of_a_start_add_up():
  watch = report.Stopwatch(imports=5.0)
  time.sleep(0.02)
  watch.part("load")
  watch.part("compile")
  watch.frames(8)
  watch.frames(8)
  summary = watch.summary()
  parts = summary["startup_s"]
  assert list(parts) == ["imports", "load", "compile", "first_chunk"]
  assert parts["imports"] == 5.0 and parts["load"] >= 0.02
  assert parts["compile"] >= 0 and parts["first_chunk"] >= 0
  assert sum(parts.values()) == pytest.approx(summary["time_to_first_frame_s"], abs=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_process_knows_its_age():
  first = report.process_age()
  assert 0 < first < 1e6
  time.sleep(0.05)
  assert 0.03 < report.process_age() - first
