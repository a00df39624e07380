"""The benchmark of distillation, at sizes for a CPU."""

import json

import bench_distill
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_compiling")

TINY = (
  "--frames=2", "--frames_per_chunk=1", "--steps=1", "--rank=2", "--updates=1",
  "--teacher_guidance=0", "--noteacher_forcing", "--dtype=float32",
)  # fmt: skip


def settings_of(*flags: str):
  bench_distill._FLAGS(["bench", *flags])
  try:
    return bench_distill.make_settings()
  finally:
    bench_distill._FLAGS.unparse_flags()


def test_an_iteration_of_adapters(tmp_path, capsys):
  out = tmp_path / "figures.json"
  bench_distill._FLAGS(["bench", *TINY, "--every=3", f"--out={out}"])
  bench_distill.main([])
  bench_distill._FLAGS.unparse_flags()
  found = json.loads(out.read_text())
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert all(found[line["figure"]] == line["value"] for line in lines)
  assert found["size"] == "test" and found["settings"]["exit_step"] == "last"
  # Two adapters of float32; an average and a second moment of one, and one of both.
  adapter = found["average_bytes"]
  assert found["trained_bytes"] == 2 * adapter
  assert 2 * adapter < found["optimizer_bytes"] < 2 * adapter + 100
  for name in ("critic", "generator"):
    held = found["base_bytes"] + 2 * adapter
    assert found[f"{name}_program_bytes"] > held
    assert found[f"{name}_seconds"] == found[f"{name}_each_seconds"][0]
    assert np.isfinite(list(found[f"{name}_metrics"].values())).all()
  assert found["iteration_seconds"] == pytest.approx(
    3 * found["critic_seconds"] + found["generator_seconds"]
  )


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--frames=12",), "frames=12 must be a multiple of frames_per_chunk=8"),
    (("--whole", "--base=w4a16"), "base='w4a16' needs adapters"),
    (("--height=40",), "height=40 must be a multiple of 32"),
  ],
)
def test_flags_that_do_not_go_together(flags, message):
  with pytest.raises(ValueError, match=message):
    settings_of(*flags)


def test_settings_of_the_full_model():
  settings = settings_of("--height=704", "--width=1280", "--gradient=through_cache")
  assert settings.rollout.through_cache and settings.rollout.remat == "blocks"
  assert settings.rollout.sampling.window_frames == 32 and settings.score_chunks == 4
