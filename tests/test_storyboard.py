import json
import pathlib

import numpy as np
import pytest

from longlive_jax.generate import storyboard
from longlive_jax.generate.storyboard import SCENE_CUT_PREFIX as CUT

GOLDEN = pathlib.Path(__file__).parent / "golden" / "prompt_lists"


def golden(name: str):
  return json.loads((GOLDEN / name).read_text("utf-8"))


def write_files(root: pathlib.Path, files: dict[str, str]) -> None:
  for name, text in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("case", golden("cases.json"))
def test_golden_prompt_lists(case, tmp_path):
  write_files(tmp_path, case["files"])
  path = tmp_path / case.get("path", "p.txt")
  options = case.get("options", {})
  if case["kind"] == "simple_text":
    assert storyboard.read_lines(path) == case["output"]
  elif case["kind"] == "text":
    assert storyboard.read_text_prompts(path, **options) == case["output"]
  elif "error" in case["output"]:
    with pytest.raises(ValueError, match="has no text; write its prompt to"):
      storyboard.read_image_prompts(path, **options)
  else:
    found = storyboard.read_image_prompts(path, **options)
    out = [{"image": image.name, "prompts": prompts} for image, prompts in found]
    assert out == case["output"]


@pytest.mark.parametrize("case", golden("encode_blocks.json")["cases"])
def test_golden_encoder_order(case):
  if "error" in case:
    with pytest.raises(ValueError):
      storyboard.encoder_order(case["input"], case["batch"])
  else:
    flat, blocks = storyboard.encoder_order(case["input"], case["batch"])
    assert flat == case["flat_order"] and blocks == case["per_block"]


def test_golden_shot_boundary():
  case = golden("shot_boundary.json")
  for chunk, expected in enumerate(case["is_boundary"]):
    assert storyboard.is_shot_boundary(case["prompts"], chunk) == expected


def test_inline_shots_of_one_video():
  board = storyboard.inline(["a", "b"], 5, [2, 1])
  (sample,) = board.samples
  assert sample.prompts == ("a", "a", CUT + "b", "b", "b")
  assert sample.cuts == (False, False, True, False, False)
  assert storyboard.inline(["a", "b", "c"]).chunks == 3
  assert storyboard.inline(["a", "b"], None, [2, 4]).chunks == 6
  # A prefix that the user typed is not doubled and does not cut every chunk.
  typed = storyboard.inline(["a", CUT + "b"], 4)
  assert typed.samples[0].cuts == (False, False, True, False)


def test_cuts_belong_to_each_sample():
  board = storyboard.from_prompt_lists(
    [["a", CUT + "b", "b", "b"], ["c", "c", "c", CUT + "a"], ["d"] * 4]
  )
  arrays = board.arrays()
  assert arrays.prompts == ("a", CUT + "b", "b", "c", CUT + "a", "d")
  assert arrays.prompt_index.dtype == np.int32
  assert arrays.prompt_index.T.tolist() == [[0, 1, 2, 2], [3, 3, 3, 4], [5] * 4]
  assert arrays.cut.dtype == bool
  assert arrays.cut.astype(int).T.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0] * 4]
  assert arrays.shot.dtype == np.int32
  assert arrays.shot.T.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0] * 4]
  assert (board.batch, board.chunks, board.images) == (3, 4, None)


def test_images_become_first_frames(tmp_path):
  write_files(
    tmp_path, {"x.png": "", "x.txt": "one\n \ntwo", "y.png": "", "y.txt": "z"}
  )
  found = storyboard.read_image_prompts(tmp_path, 2)
  board = storyboard.from_prompt_lists(
    [prompts for _, prompts in found], images=[image for image, _ in found]
  )
  assert [p.name for p in board.images] == ["x.png", "y.png"]
  assert board.arrays().cut.T.tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (dict(shots=["a", " \t"]), r"prompt 1 = ' \\t' is empty"),
    (dict(shots=[]), "no prompt|at least 1"),
    (dict(shots=["a", "b"], chunks=4, durations=[4, 2]), r"shot 1 .* chunk 4, outside"),
    (dict(shots=["a", "b", "c"], chunks=2), r"shot 2 .* chunks=2; use chunks=3"),
    (dict(shots=["a", "b"], chunks=4, durations=[1]), r"durations=\(1,\) must be one"),
    (dict(shots=["a", "b"], durations=[0, 2]), r"durations=\(0, 2\) must be one pos"),
    (dict(shots=["a"], chunks=0), "chunks=0 must be at least 1"),
  ],
)
def test_bad_inline_storyboards(kwargs, message):
  with pytest.raises(ValueError, match=message):
    storyboard.inline(**kwargs)


def test_bad_prompt_lists(tmp_path):
  with pytest.raises(ValueError, match="sample 1, chunk 1, is empty"):
    storyboard.from_prompt_lists([["a", "b"], ["c", CUT]])
  with pytest.raises(ValueError, match="must be chunks=1"):
    storyboard.from_prompt_lists([["a"], ["c", "d"]])
  with pytest.raises(ValueError, match="has no prompt"):
    storyboard.from_prompt_lists([])
  with pytest.raises(ValueError, match="2 images for 1 videos"):
    storyboard.from_prompt_lists([["a"]], images=[tmp_path, tmp_path])
  with pytest.raises(ValueError, match="cut at chunk 0"):
    storyboard.Storyboard((storyboard.Sample(("a",), (True,)),))
  with pytest.raises(ValueError, match="does not exist; give a text file or"):
    storyboard.read_text_prompts(tmp_path / "none", 2)
  with pytest.raises(ValueError, match="does not exist"):
    storyboard.read_image_prompts(tmp_path / "none", 2)
  (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
  with pytest.raises(ValueError, match="cannot be read as UTF-8"):
    storyboard.read_text_prompts(tmp_path / "latin.txt", 2)
