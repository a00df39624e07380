"""tools/parity.py: tolerances, verdicts and exit status, on a tree made here."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from longlive_jax.checkpoint import torch_files
from longlive_jax.generate import schedule

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def parity(monkeypatch):
  monkeypatch.syspath_prepend(str(TOOLS))
  return importlib.import_module("parity")


def write_case(folder: Path, record: dict, outputs: dict[str, np.ndarray]) -> None:
  folder.mkdir(parents=True)
  (folder / "case.json").write_text(json.dumps(record))
  specs = {name: (array.shape, array.dtype) for name, array in outputs.items()}
  torch_files.write_safetensors(folder / "outputs.safetensors", specs, outputs.items())


def step_lists(root: Path, wrong: float = 0.0) -> None:
  lists = [[1000, 500], [800, 1, 0]]
  outputs = {
    f"warped{i}": schedule.warp_timesteps(listed, 5.0) + np.float32(wrong)
    for i, listed in enumerate(lists)
  }
  outputs["default_steps3_shift2"] = schedule.few_step_list(3, 2.0)
  tolerances = {"default": {"rtol": 0, "atol": 1e-3}}
  write_case(
    root / "schedule" / "denoising_step_list",
    {"lists": lists, "tolerances": tolerances},
    outputs,
  )


@pytest.mark.parametrize(
  ("tolerance", "passes"),
  [
    ({"rtol": 0, "atol": 0.011}, True),
    ({"rtol": 0, "atol": 0.009}, False),
    ({"rtol": 0.011, "atol": 0}, False),  # 0.01 off where 0 is expected
    ({"rtol": 0, "atol": 0.009, "mismatch_fraction": 0.5}, True),
    ({"rtol": 0, "atol": 0.009, "mismatch_fraction": 0.2}, False),
    ({"rel_to_max": 0.003}, True),
    ({"rel_to_max": 0.002}, False),
  ],
)
def test_tolerances(parity, tolerance, passes):
  expected = np.array([0, 1, 2, 4], np.float32)
  off = np.array([0.01, 0, 0, 0.01])
  error = parity.compare(expected + off, expected, tolerance)
  assert error.passed == passes
  assert error.absolute == pytest.approx(0.01)
  assert error.relative == pytest.approx(0.0025)


def test_shapes_nan_and_scalars(parity):
  exact = {"rtol": 0, "atol": 0}
  assert not parity.compare(np.zeros((1, 2)), np.zeros(2), exact).passed
  assert not parity.compare(np.nan, np.float32(0), {"rtol": 1, "atol": 1}).passed
  assert not parity.compare(np.nan, np.float32(1), {"rel_to_max": 1}).passed
  assert parity.compare(np.float32(3), np.float32(3), exact).passed
  assert parity.compare([np.inf], np.array([np.inf]), exact).passed


def test_the_longest_key_in_a_name_decides(parity):
  tolerances = {"default": "d", "grad": "g", "grad.head": "h"}
  found = [parity.tolerance_of(n, tolerances) for n in ("x", "grad.q", "grad.head.b")]
  assert found == ["d", "g", "h"]


def test_table_and_verdict(parity, tmp_path, capsys):
  step_lists(tmp_path)
  write_case(tmp_path / "nvfp4" / "later", {}, {"x": np.zeros(2, np.float32)})
  write_case(tmp_path / "_shared" / "weights", {}, {"x": np.zeros(2, np.float32)})
  assert parity.run(tmp_path) == 0
  printed = capsys.readouterr().out
  assert "3 arrays" in printed and "1 pass, 0 FAIL, 1 no runner" in printed
  assert "_shared" not in printed


def test_a_wrong_number_and_a_broken_case_fail(parity, tmp_path, capsys):
  step_lists(tmp_path, wrong=0.5)
  write_case(tmp_path / "vae" / "empty", {}, {"video": np.zeros(2, np.float32)})
  assert parity.run(tmp_path) == 2
  printed = capsys.readouterr().out
  assert "warped0: abs 5.00e-01" in printed and "2 FAIL" in printed


def test_an_output_that_no_runner_computes_fails(parity, tmp_path, capsys):
  write_case(
    tmp_path / "schedule" / "denoising_step_list",
    {"lists": []},
    {"unheard_of": np.zeros(2, np.float32)},
  )
  assert parity.run(tmp_path) == 1
  assert "not computed: ['unheard_of']" in capsys.readouterr().out


def test_a_folder_without_cases_is_refused(parity, tmp_path):
  with pytest.raises(ValueError, match="holds no case"):
    parity.run(tmp_path)
