"""The measurements of sessions: what they count, on networks that say nothing."""

import bench_sessions
import eval_switch
import jax
import numpy as np
import pytest
from random_weights import random_dit, random_vae
from test_scheduler import FakeChunk
from test_session import engine_of

from longlive_jax.data import toy_world
from longlive_jax.data.detectors import Detection
from longlive_jax.generate import session as sessions
from longlive_jax.generate.commands import Cut, Prompt
from longlive_jax.generate.recache import Recache
from longlive_jax.generate.sampler import Sampling

pytestmark = pytest.mark.usefixtures("quick_compiling")


# ------------------------------------------------------------------ bench_sessions
def test_speed_switches_and_moves_are_measured():
  sampling = Sampling(frames_per_chunk=2, window_frames=6, sink_frames=2, steps=1)
  networks = jax.device_put((random_dit(), random_vae()), jax.devices()[0])
  engine = engine_of(networks, sampling, history_chunks=2)
  two = bench_sessions.turns(engine, 2, 2)
  assert two["fps"] == pytest.approx(2 * two["fps_each"]) and two["fps"] > 0
  assert two["chunk_gap_s_largest"] >= two["chunk_gap_s_median"] > 0
  found = bench_sessions.switches(engine, ("none", "window+sinks"))
  # When a command comes, a chunk is under way already.
  assert [each["chunks_under_the_old"] for each in found.values()] == [1, 1]
  assert all(each["seconds"] > 0 for each in found.values())
  moves = bench_sessions.moves(engine)
  assert len(moves) == 5 and min(moves.values()) > 0
  assert bench_sessions.batched(engine, 1, 1)["fps_each"] > 0


# ------------------------------------------------------------------ eval_switch
def detection(shape="star", colour="red", background="grass", motion="slide"):
  return Detection(
    shape, colour, background, motion, size="small", radius=12.0, shape_score=1.0,
    colour_score=1.0, background_error=0.0, drift=0.02, found=1.0,
    path=np.zeros((32, 2)),
  )  # fmt: skip


def scene():
  subject = toy_world.Subject("star", "red", "small", "solid")
  shot = toy_world.Shot("grass", "slide", (64.0, 64.0), 0.0, 1, "A caption.")
  return toy_world.Scene(subject, (shot,))


@pytest.mark.parametrize("change", eval_switch.CHANGES)
def test_one_thing_of_a_scene_changes_and_the_caption_says_so(change):
  was = scene()
  for seed in range(10):
    now = eval_switch.changed_scene(was, change, seed)
    (old,), (new,) = was.shots, now.shots
    differ = {
      "motion": old.motion != new.motion,
      "background": old.background != new.background,
      "colour": was.subject.colour != now.subject.colour,
    }
    assert [name for name, value in differ.items() if value] == [change]
    assert new.caption == toy_world.describe(now.subject, new.background, new.motion)


def test_scores_are_of_the_changed_scene():
  changed = eval_switch.changed_scene(scene(), "motion", 0)
  motion = changed.shots[0].motion
  found = {1: detection(), 2: detection(motion=motion), 4: detection(motion=motion)}
  row = eval_switch.score(changed, "motion", found)
  assert row == {
    "follows after 1": 0.0, "follows after 2": 1.0, "follows after 4": 1.0,
    "keeps": 1.0, "identity": 1.0, "sharp": pytest.approx(0.98),
  }  # fmt: skip
  row = eval_switch.score(changed, "motion", {4: detection(colour="blue")})
  assert (row["follows after 4"], row["keeps"], row["identity"]) == (0, 0, 0)
  lines = eval_switch.table({"none": [row, row], "cut": [row, row]}).splitlines()
  assert lines[2] == "| none | 0% | 0% | 0% | 0.980 |" and len(lines) == 4


def test_each_rule_goes_on_from_the_same_state(monkeypatch):
  advanced, detected = [], []

  def advance(engine, session):
    advanced.append(session)
    return [*session, "chunk"], FakeChunk(len(session), False)

  monkeypatch.setattr(sessions, "start", lambda engine, prompt, seed: [prompt, seed])
  monkeypatch.setattr(sessions, "advance", advance)
  monkeypatch.setattr(sessions, "branch", lambda engine, session: [*session])
  monkeypatch.setattr(
    sessions, "apply", lambda engine, session, command: [*session, command]
  )
  monkeypatch.setattr(
    eval_switch.detectors, "detect", lambda frames: detected.append(frames) or "seen"
  )
  rules = ("none", "last:2", "cut")
  found = list(eval_switch.follow(None, "A", "B", rules, 2, 7))
  assert found == [{1: "seen", 2: "seen", 4: "seen"}] * 3 and len(detected) == 9
  told = [Prompt("B", Recache("none")), Prompt("B", Recache("last", 2)), Cut("B")]
  firsts = [session for session in advanced if session[-1] != "chunk"][1:]
  assert firsts == [["A", 7, "chunk", "chunk", each] for each in told]


def test_an_unknown_rule_is_refused():
  with pytest.raises(ValueError, match="recache='all' is unknown"):
    eval_switch.command_of("all", "A.")
