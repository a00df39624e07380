"""The benchmark of training steps, at sizes for a CPU."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import bench_train
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.checkpoint import store
from longlive_jax.kernels.clip_layout import ClipLayout
from longlive_jax.models import dit
from longlive_jax.parallel import costs

pytestmark = pytest.mark.usefixtures("quick_compiling")

ROOT = Path(__file__).parent.parent

TINY = (
  "--height=32", "--width=32", "--frames_per_chunk=2", "--seconds=0.6", "--steps=1",
  "--dtype=float32",
)  # fmt: skip


def cases_of(*flags: str) -> list[bench_train.Case]:
  bench_train._FLAGS(["bench", *flags])
  try:
    return [*bench_train.cases(dit.size(bench_train._SIZE.value))]
  finally:
    bench_train._FLAGS.unparse_flags()


def test_a_step_and_its_gradients_alone(tmp_path, capsys):
  rows = []
  for what in ("step", "gradients"):
    out = tmp_path / f"{what}.json"
    bench_train._FLAGS(["bench", *TINY, f"--what={what}", f"--out={out}"])
    bench_train.main([])
    bench_train._FLAGS.unparse_flags()
    content = json.loads(out.read_text())
    assert content["size"] == "test" and content["device"]["kind"]
    rows += content["rows"]
  step, gradients = rows
  assert step["frames"] == 4 and step["layers"] == 2
  assert step["flops"] == gradients["flops"]
  assert step["tokens_per_second"] == pytest.approx(4 / step["step_seconds"])
  used = sum(step["flops"].values()) / step["peak_flops"]
  assert step["utilisation"] == pytest.approx(used / step["step_seconds"])
  # An average and two moments beside the weights.
  assert step["program_bytes"] > gradients["program_bytes"]
  assert np.isfinite([step["loss"], gradients["loss"]]).all()
  assert "utilisation" in capsys.readouterr().out


SCRIPT = """
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 2)

import bench_train
from random_weights import TINY_VAE

from longlive_jax.models import vae

vae.VAE_SIZES["tiny"] = TINY_VAE
bench_train._FLAGS(["bench", *sys.argv[1:]])
bench_train.main([])
"""


def test_layouts_with_encoding_on_two_devices(tmp_path):
  out = tmp_path / "rows.json"
  paths = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT)]
  flags = (
    "--vae=tiny", "--height=8", "--width=8",
    "--layouts=none,plain,balanced", "--encode=spans", "--remat=blocks",
    "--what=gradients", "--precisions=fp8", f"--out={out}",
    f"--programs={tmp_path / 'programs'}",
  )  # fmt: skip
  run = subprocess.run(
    [sys.executable, "-c", f"import sys\nsys.path[:0] = {paths!r}\n{SCRIPT}", *TINY,
     *flags],
    capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert run.returncode == 0, run.stderr[-3000:]
  plain, balanced = json.loads(out.read_text())["rows"]  # none has nothing to share
  assert (plain["layout"], balanced["layout"]) == ("plain", "balanced")
  assert plain["precision"] == balanced["precision"] == "fp8"
  assert plain["loss"] == pytest.approx(balanced["loss"], rel=1e-4)
  assert plain["flops"] == balanced["flops"]
  for row in plain, balanced:
    assert row["step_seconds"] > row["encode_seconds"] > 0
    assert row["devices"] == 2 and row["program_bytes"] > 0
    # Of four latent frames the second device has the first two as its halo.
    assert sum(row["halo_cost"]) == pytest.approx(1)


def test_operations_of_the_full_model():
  """A chunk of 7,040 tokens has 61 TFLOP in products, and 73 in attention to 28,160
  (BASELINES.md); a clip of 16 s has 12 chunks twice."""
  config = dit.size("ti2v-5b")
  layout = ClipLayout.of_frames(96, 8, 880)
  flops = costs.clip_flops(config, layout, 96, 12)
  assert flops["products"] == pytest.approx(24 * 61e12, rel=0.01)
  pairs = 2 * 7040**2 * sum(range(1, 13))
  assert flops["attention"] == pytest.approx(73e12 * pairs / (7040 * 28160), rel=0.01)
  case = bench_train.Case(16.0, 96, "step", "", "none", "blocks", 30, "", 4)
  bench_train._FLAGS(["bench", "--size=ti2v-5b"])
  four = bench_train.clip_flops(case, config, 44, 80)  # samples, and backward
  bench_train._FLAGS.unparse_flags()
  assert four == {name: 12 * count for name, count in flops.items()}


def test_operations_are_those_that_xla_counts():
  """A single layer, which XLA does not count as a loop; without a mask it has pairs
  that the model does not."""
  config = dataclasses.replace(dit.size("test"), dim=128, ffn_dim=256, layers=1)
  model = store.abstract_network("dit", config)
  f, y = 4, 8
  latents = jax.ShapeDtypeStruct((1, f, y, y, config.in_channels), jnp.float32)
  time = jax.ShapeDtypeStruct((1, f, config.freq_dim), jnp.float32)
  text = jax.ShapeDtypeStruct((1, 2, config.text_len, config.text_dim), jnp.float32)

  def forward(model, latents, time, text):
    return dit.train_forward(
      model, latents, time, text, frames_per_chunk=2, clean=latents, clean_time=time
    )

  counted = jax.jit(forward).lower(model, latents, time, text).cost_analysis()["flops"]
  layout = ClipLayout.of_frames(f, 2, config.tokens_per_frame(y, y))
  flops = costs.clip_flops(config, layout, f, 2)
  flops["attention"] /= layout.unmasked_fraction()
  assert sum(flops.values()) <= counted <= 1.1 * sum(flops.values())


def test_a_line_through_few_layers_gives_all():
  config = dit.size("toy")
  bench_train._FLAGS(["bench", "--size=toy"])
  case = bench_train.Case(4.0, 24, "step", "", "none", "blocks", 1, "", 1)
  rows = [
    {**dataclasses.asdict(case), "layers": n, "step_seconds": 1.0 + 2 * n,
     "program_bytes": 10 * n}
    for n in (1, 2, 3)
  ]  # fmt: skip
  unfinished = {**rows[0], "remat": "none", "does_not_fit": "no"}
  del unfinished["step_seconds"]
  (found,) = bench_train.extrapolated([*rows, unfinished], config, 4, 4)
  bench_train._FLAGS.unparse_flags()
  assert found["layers"] == 6 and found["extrapolated_from_layers"] == [1, 2, 3]
  assert found["step_seconds"] == pytest.approx(13)
  assert found["program_bytes"] == pytest.approx(60)
  table = bench_train.table([*rows, unfinished, found])
  assert "extrapolated from [1, 2, 3] layers" in table and "does not fit" in table


def test_collectives_and_those_that_run_alone():
  events = [
    ("gemm", 0.0, 4.0), ("ncclDevKernel_AllGather", 3.0, 6.0), ("gemm", 7.0, 8.0),
    ("ncclDevKernel_SendRecv", 5.0, 7.0), ("fusion", 9.0, 10.0),
  ]  # fmt: skip
  found = bench_train.shares(events)
  assert found["communication_share"] == pytest.approx(0.4)  # 3 to 7
  assert found["communication_alone_share"] == pytest.approx(0.3)  # 4 to 7


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--precisions=fp6", "precisions='fp6' is unknown; use , nvfp4, fp8"),
    ("--layouts=even", "layouts='even' is unknown; use none, balanced, plain"),
    ("--remat=all", "remat='all' is unknown"),
    ("--encode=half", "encode='half' is unknown"),
  ],
)
def test_settings_that_do_not_exist(flag, message):
  with pytest.raises(ValueError, match=message):
    cases_of(flag)


def test_lengths_are_rounded_up_to_chunks():
  found = cases_of("--size=ti2v-5b", "--seconds=5,16,32,64", "--layers=4,8")
  assert [case.frames for case in found[::2]] == [32, 96, 192, 384]
  assert [case.layers for case in found[:2]] == [4, 8]
