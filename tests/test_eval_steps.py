"""The table of solver steps: its variants, and what it scores."""

import dataclasses
import itertools

import eval_steps as study
import numpy as np
import pytest

from longlive_jax.data import detectors, toy_world


def test_variants_take_the_adapter_of_their_steps_or_the_next_larger():
  known = study.variants({4: "four", 2: "two"})
  assert next(iter(known)) == study.TEACHER
  loras = {
    steps: dict(known[f"{steps} step{'s' * (steps > 1)}, distilled"].settings)["loras"]
    for steps in (4, 3, 2, 1)
  }
  assert loras == {4: ("four",), 3: ("four",), 2: ("two",), 1: ("two",)}
  assert known["4 steps"].settings == ()
  packed = dict(known["2 steps, distilled, NVFP4"].settings)
  assert packed == {
    "guidance": 1.0, "loras": ("two",), "precision": "w4a4", "kv_format": "nvfp4"
  }  # fmt: skip
  assert "4 steps, distilled" not in study.variants({2: "two"})


def test_variants_are_chosen_by_name_and_compared_with_the_teacher():
  chosen = study.chosen_variants(["1 step*"], {2: "two"})
  assert list(chosen) == [
    "50 steps", "1 step", "1 step, distilled", "1 step, distilled, NVFP4"
  ]  # fmt: skip
  with pytest.raises(ValueError, match=r"only=\['5 steps'\] fits none of 50 steps, "):
    study.chosen_variants(["5 steps"], {})


@pytest.mark.parametrize("given", ["4", "four:path", "0:path", "4:"])
def test_an_adapter_without_steps_or_path_is_refused(given):
  with pytest.raises(ValueError, match=f"lora='{given}' must be STEPS:PATH"):
    study.parse_adapters([given])
  assert study.parse_adapters(["4:a:0.5", "2:b"]) == {4: "a:0.5", 2: "b"}


def test_true_frames_score_one_and_a_still_does_not():
  scenes = [toy_world.heldout_scene(i, (1, 1)) for i in range(2)]
  found = []
  for scene in scenes:
    frames = np.split(toy_world.render(scene), [29])
    found.append([detectors.detect(shot) for shot in frames])
  pixels = detectors.motion_amount(itertools.chain(*found))
  row = study.shot_scores(scenes, found, pixels)
  assert set(row.values()) == {1.0}
  minute = study.minute_scores(scenes, found)
  assert minute["minute: all four"] == minute["minute: subject kept"] == 1
  assert minute["drift"] == minute["drift, first shot"] == 0
  still = [
    [dataclasses.replace(d, path=0 * d.path + 3) for d in shots] for shots in found
  ]
  row = study.shot_scores(scenes, still, pixels)
  assert row["motion amount"] == 0 and row["shape"] == 1
  assert "| 4 steps | 100.0% | 0.500 |" in study.table(
    {"4 steps": {"shape": 1.0, "motion amount": 0.5}}
  )
