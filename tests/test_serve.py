"""The server: sessions through one WebSocket, and what goes wrong around them."""

import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import (
  BLUE,
  FRAMES,
  GREEN,
  RED,
  client,
  free_port,
  get,
  make_studio,
  running,
  tiny_engine,
  until,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus

from longlive_jax.data.video import read_video
from longlive_jax.generate import saved_sessions
from longlive_jax.generate import session as sessions
from longlive_jax.generate.scheduler import Life
from longlive_jax.serve import mp4
from longlive_jax.serve.limits import Access, Limits

pytestmark = pytest.mark.usefixtures("quick_compiling")

TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def engine():
  return tiny_engine(fps=96.0)


@pytest.fixture(scope="module")
def host(engine, tmp_path_factory):
  """A server that all tests but the violent ones share."""
  folder = tmp_path_factory.mktemp("serve")
  with running(make_studio(engine, folder, Limits(sessions=12))) as host:
    yield host


# ------------------------------------------------------------------ a session
def test_a_session_is_told_what_to_do_and_watched(host, tmp_path):
  with client(host) as c:
    session = c.ask("create", text=RED, seed=3)["session"]
    c.chunks(2)
    assert c.ask("prompt", text=BLUE, recache="last:1")["event"] == "done"
    told = c.told("prompt")
    c.chunks(told + 1)
    assert c.ask("cut", text=GREEN)["event"] == "done"
    cut = c.told("cut")
    c.chunks(cut + 1)
    assert c.ask("pause")["event"] == "done"
    length = c.told("pause")
    record = json.loads(get(host, f"/sessions/{session}")[1])
    assert record["paused"] and record["length"] == length and record["seed"] == 3
    made = [e["chunk"] for e in c.heard if e["event"] == "chunk"]
    assert [m["index"] for m in made] == list(range(length))
    assert [m["made"]["shot"] for m in made] == [int(i >= cut) for i in range(length)]
    assert made[told]["made"]["prompt"] == BLUE
    assert made[told]["made"]["recache"] == "last:1"
    assert made[0]["sink"] == made[cut]["sink"] == 1.0
    assert all(-1 <= m["sink"] <= 1 and m["std"] > 0 for m in made)
    # Every chunk plays by itself; together they are one video, frame after frame.
    frames = [1 + FRAMES - FRAMES // 2, *[FRAMES] * (length - 1)]
    assert [m["frames"] for m in made] == frames
    assert [m["first_frame"] for m in made] == [sum(frames[:i]) for i in range(length)]
    whole = get(host, f"/sessions/{session}/video.mp4")[1]
    (tmp_path / "whole.mp4").write_bytes(whole)
    assert len(read_video(tmp_path / "whole.mp4")[0]) == sum(frames)
    for (index, media), m in zip(c.media, made, strict=True):
      path = f"/sessions/{session}/chunks/{m['media']}"
      assert get(host, path) == (200, media), index
    status, sheet = get(host, f"/sessions/{session}/shots.png")
    assert status == 200 and Image.open(io.BytesIO(sheet)).height == 2 * 64  # two shots
    assert c.ask("save")["saved"] == length
    state = io.BytesIO(get(host, f"/sessions/{session}/state.tar")[1])
    tar = tarfile.open(fileobj=state)
    assert f"{session}-{length}" in tar.getnames()
    assert c.ask("end")["event"] == "done"
  assert get(host, f"/sessions/{session}")[0] == 404


def test_rewound_it_makes_the_same_bytes_and_a_branch_goes_its_own_way(host):
  with client(host) as c, client(host) as other:
    c.ask("create", text=RED)
    c.chunks(3)
    c.ask("pause")
    branch = c.ask("branch", chunk=1)["session"]
    other.ask("watch", session=branch)
    assert other.heard[0]["parent"].endswith("@1")
    other.ask("cut", text=BLUE)
    other.ask("resume")  # it was paused like its parent
    other.chunks(3)
    c.ask("rewind", chunk=1)
    c.ask("resume")
    c.wait("rewound")
    c.chunks(3)
    by_chunk = {}
    for index, media in c.media:
      by_chunk.setdefault(index, []).append(media)
    assert len(by_chunk[1]) == len(by_chunk[2]) == 2
    assert by_chunk[1][0] == by_chunk[1][1] and by_chunk[2][0] == by_chunk[2][1]
    assert dict(other.media)[1] not in by_chunk[1]
    for each in (c, other):
      each.ask("end")


def test_who_comes_later_sees_it_all_and_time_stands_still_with_nobody(host):
  with client(host) as c:
    session = c.ask("create", text=RED)["session"]
    c.chunks(4)
    length = c.length()
  until(lambda: b"longlive_watchers 0" in get(host, "/metrics")[1])
  with client(host) as c:
    c.ask("watch", session=session)
    state = c.heard[0]
    assert state["event"] == "state" and length <= len(state["chunks"]) <= length + 4
    assert c.wait("chunk")["chunk"] == state["chunks"][-1]  # a picture at once
    c.chunks(len(state["chunks"]) + 1)
    c.ask("end")


# ------------------------------------------------------------------ hostile input
@pytest.mark.parametrize(
  ("message", "why"),
  [
    ("", "must be JSON"),
    ("[" * 100_000, "must be JSON"),
    ('{"kind": "create", "text": "\\u0000"}', "control character"),
    ('{"kind": "create", "text": "a", "seed": NaN}', "must be JSON"),
    ('{"kind": "create", "text": "' + "a" * 3000 + '"}', "at most"),
    ('{"kind": "watch", "session": "../../etc/passwd"}', "12 hexadecimal digits"),
    ('{"kind": "watch", "session": "0123456789ab"}', "no session"),
    ('{"kind": "rewind", "chunk": 1}', "create or watch"),
    ('{"kind": "delete"}', "unknown"),
  ],
)
def test_a_message_that_cannot_be_is_refused_with_its_reason(host, message, why):
  with client(host) as c:
    c.socket.send(message)
    answer = c.hear()
    assert answer["event"] == "error" and why in answer["message"]
    assert c.ask("create", text=RED)["event"] == "done"  # and the connection lives
    c.ask("end")


def test_binary_and_huge_messages(host):
  with client(host) as c:
    c.socket.send(b"\x00\xff")
    assert c.hear()["event"] == "error"
    c.socket.send("a" * (13 * 2**20))
    with pytest.raises(ConnectionClosed) as closed:
      c.hear()
    assert closed.value.rcvd.code == 1009


def test_a_flood_is_answered_with_refusals_and_then_with_the_door(host):
  with client(host) as c:
    with contextlib.suppress(ConnectionClosed):
      for _ in range(10_000):
        c.socket.send('{"kind": "pause"}')
    with pytest.raises(ConnectionClosed):
      while True:
        c.hear()
    assert 0 < sum("too many messages" in e["message"] for e in c.heard) <= 100
    assert sum("create or watch" in e["message"] for e in c.heard) < 1000
  assert get(host, "/health")[0] == 200


@pytest.mark.parametrize(
  "path",
  [
    "/sessions/../secrets",
    "/sessions/..%2f..%2fetc%2fpasswd",
    "/sessions/0123456789ab/chunks/..%2f..%2fstates",
    "/sessions/%00",
    "/page/../app.py",
    "/app.py",
  ],
)
def test_paths_lead_nowhere_else(host, path):
  assert get(host, path)[0] == 404


@settings(
  max_examples=60,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=30), st.sampled_from(["", "sessions/", "sessions/a/chunks/"]))
def test_no_path_is_answered_with_more_than_its_error(host, path, folder):
  connection = http.client.HTTPConnection(host, timeout=10)
  connection.request("GET", f"/{folder}" + urllib.parse.quote(path, safe="/.%"))
  answer = connection.getresponse()
  body = answer.read()
  connection.close()
  known = path in (b"", b"health", b"metrics", b"sessions") and not folder
  assert answer.status in ((200,) if known else (307, 400, 404)), body


def test_everything_comes_with_a_policy(host):
  with urllib.request.urlopen(f"http://{host}/") as answer:
    policy = answer.headers["content-security-policy"]
  assert "default-src 'none'" in policy and "unsafe" not in policy


def test_without_the_token_there_is_nothing(engine, tmp_path):
  with running(make_studio(engine, tmp_path), Access("127.0.0.1", TOKEN)) as host:
    assert get(host, "/")[0] == get(host, "/health")[0] == 200
    right = {"Authorization": f"Bearer {TOKEN}"}
    for path in ("/metrics", "/sessions", "/sessions/0123456789ab/video.mp4"):
      assert get(host, path)[0] == 401
      assert get(host, path, Authorization=f"Bearer {TOKEN[:-1]}x")[0] == 401
    assert get(host, "/sessions", **right) == (200, b"{}")
    for how in ({}, {"subprotocols": ["longlive", "bearer.wrong"]}):
      with pytest.raises(InvalidStatus), client(host, **how):
        pass
    with client(host, subprotocols=["longlive", f"bearer.{TOKEN}"]) as c:
      assert c.socket.subprotocol == "longlive"
    with client(host, additional_headers=right) as c:
      c.ask("create", text=RED)
    foreign = {**right, "Origin": "https://elsewhere.example"}
    with pytest.raises(InvalidStatus), client(host, additional_headers=foreign):
      pass


# ------------------------------------------------------------------ limits
def test_limits_of_sessions_connections_and_chunks(engine, tmp_path):
  limits = Limits(sessions=1, connections=2, chunks=2)
  studio = make_studio(engine, tmp_path, limits)
  with running(studio) as host, client(host) as c:
    c.ask("create", text=RED)
    assert "as many as the server allows" in c.ask("branch")["message"]
    c.chunks(2)
    while not any(e.get("paused") for e in c.heard):
      c.hear()
    assert "the most it may" in c.ask("resume")["message"]
    time.sleep(0.2)  # a third one would be under way
    assert len(next(iter(studio.records.values())).chunks) == 2
    with client(host) as other:
      assert "as many as" in other.ask("create", text=RED)["message"]
      with pytest.raises(InvalidStatus), client(host):
        pass


def test_metrics_are_numbers_that_prometheus_reads(host):
  lines = get(host, "/metrics")[1].decode().splitlines()
  values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
  assert float(values["longlive_frames_total"]) > 0
  latency = 'longlive_chunk_seconds{quantile="%s"}'
  assert 0 < float(values[latency % "0.5"]) <= float(values[latency % "0.99"])
  assert float(values['longlive_memory_bytes{of="process"}']) > 1e8
  described = {line.split()[2] for line in lines if line.startswith("# TYPE")}
  assert {name.split("{")[0] for name in values} == described


# ------------------------------------------------------------------ what goes wrong
def test_who_stops_reading_loses_old_chunks_and_nobody_waits(engine, tmp_path):
  """A watcher with a full queue starts again from the state as it is."""
  studio = make_studio(engine, tmp_path, Limits(queue=4))
  with running(studio) as host, client(host) as c:
    session = c.ask("create", text=RED)["session"]
    stuck = _Stuck()
    studio.submit(lambda: studio.watch(session, stuck)).result(10)
    c.chunks(8)
    assert len(stuck.items) <= 4 and stuck.restarts > 0
    first, *rest = (json.loads(item.text) for item in stuck.items)
    assert first["event"] == "state" and len(first["chunks"]) > 4
    assert [e["event"] for e in rest].count("chunk") < 4
    known = 0  # chunks that the other has heard of: it missed none
    for news in c.heard:
      if news["event"] == "state":
        known = len(news["chunks"])
      elif news["event"] == "chunk":
        index = news["chunk"]["index"]
        assert index in (known - 1, known)  # the last one of a state comes again
        known = index + 1
    assert known >= 8


class _Stuck:
  """A watcher whose client reads nothing."""

  def __init__(self):
    self.items, self.restarts = [], 0

  def put(self, item):
    if len(self.items) >= 4:
      return False
    self.items.append(item)
    return True

  def restart(self, *items):
    lost, self.items = len(self.items), list(items)
    self.restarts += 1
    return lost


def test_a_broken_session_a_broken_encoder_and_a_full_disk_are_one_sessions(
  engine, tmp_path, monkeypatch
):
  broken = {}

  def advance(engine, session):
    if session.script.prompt == GREEN:
      raise RuntimeError("the decoder is broken")
    return sessions.advance(engine, session)

  def encode(frames, **how):
    if threading.current_thread().name == "studio" and broken.pop("encoder", False):
      raise OSError("no encoder")
    return mp4.encode(frames, **how)

  studio = make_studio(engine, tmp_path, life=Life(advance=advance), encode=encode)
  with running(studio) as host, client(host) as bad, client(host) as good:
    good.ask("create", text=RED, seed=1)
    bad_id = bad.ask("create", text=RED, seed=2)["session"]
    bad.chunks(1)
    bad.ask("save")
    broken["encoder"] = True
    until(lambda: "encoder" not in broken)
    both = bad, good
    until(lambda: any(hears(each, "problem") for each in both))
    monkeypatch.setattr(studio.shelf, "_most", 1000)
    assert "do not fit" in bad.ask("save")["message"]
    bad.chunks(bad.length() + 1)  # shown, not kept
    assert any("do not fit" in e.get("message", "") for e in bad.heard)
    bad.ask("cut", text=GREEN)
    while not any("decoder is broken" in e.get("error", "") for e in bad.heard):
      bad.hear()
    assert "decoder is broken" in bad.ask("pause")["message"]
    length = good.length()
    good.chunks(length + 2)
    assert good.ask("pause")["event"] == "done"
    monkeypatch.undo()
    good.ask("save")
  # What was saved of the broken one is still there, and goes on.
  with running(make_studio(engine, tmp_path)) as host, client(host) as c:
    c.ask("watch", session=bad_id)
    c.chunks(c.length() + 1)
    assert c.heard[0]["error"] == ""


def hears(c, kind: str) -> bool:
  return c.hear()["event"] == kind or any(e["event"] == kind for e in c.heard)


# ------------------------------------------------------------------ kill, stop, restart
@pytest.fixture
def processes():
  """Whatever fails, none of them stays."""
  started: list[subprocess.Popen] = []
  yield started
  for process in started:
    process.kill()
    process.wait()


def start_process(processes, folder, programs):
  port = free_port()
  root = Path(__file__).parents[1]
  path = os.pathsep.join([str(root), str(root / "tests"), str(root / "tools")])
  process = subprocess.Popen(
    [sys.executable, str(root / "tests" / "serving.py"), str(port), str(folder), "2"],
    env={**os.environ, "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(programs),
         "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  processes.append(process)
  for line in process.stderr:
    if '"event": "ready"' in line:
      break
  threading.Thread(target=process.stderr.read, daemon=True).start()
  return process, f"127.0.0.1:{port}"


def test_killed_at_any_moment_it_goes_on_from_its_save_with_the_same_bytes(
  tmp_path, processes
):
  folder, programs = tmp_path / "sessions", tmp_path / "programs"
  process, host = start_process(processes, folder, programs)
  with client(host) as c:
    session = c.ask("create", text=RED)["session"]
    c.chunks(1)
    c.ask("cut", text=BLUE)
    c.ask("save")  # what is told after a save is forgotten
    c.chunks(c.length() + 5)
    before = dict(c.media)
    process.kill()
  process.wait()
  process, host = start_process(processes, folder, programs)
  with client(host) as c:
    c.ask("watch", session=session)
    saved = len(c.heard[0]["chunks"])
    assert 1 <= saved <= max(before) + 1
    c.chunks(max(before) + 2)
    after = dict(c.media)
    again = sorted(set(before) & set(after))
    assert again, "nothing was made twice"
    for index in again:
      assert before[index] == after[index], index
    length = c.length()
    process.send_signal(signal.SIGTERM)
    with pytest.raises(ConnectionClosed):
      while True:
        c.hear()
        length = c.length()
  assert process.wait(30) in (0, -signal.SIGTERM)
  (state,) = (folder / session / "states").iterdir()
  listed = [chunk["media"] for chunk in saved_sessions.about(state)["chunks"]]
  kept = {path.name for path in (folder / session / "chunks").iterdir()}
  assert len(listed) >= length and set(listed) == kept


def test_mp4_moves_a_chunk_to_its_place(tmp_path):
  frames = np.random.default_rng(0).integers(0, 255, (12, 32, 48, 3), np.uint8)
  chunks = [
    mp4.encode(frames[i : i + 4], fps=24.0, first_frame=i) for i in range(0, 12, 4)
  ]
  mp4.plain(chunks, tmp_path / "all.mp4")
  video, fps = read_video(tmp_path / "all.mp4")
  assert video.shape == frames.shape and fps == 24.0
  (tmp_path / "hole.mp4").write_bytes(b"".join(mp4.join([chunks[0], chunks[2]])))
  # ffmpeg fills the hole with the last picture: time is kept.
  assert len(read_video(tmp_path / "hole.mp4", fps=24.0)[0]) == 12
  assert mp4.codec(chunks[0]).startswith("avc1.64")
  with pytest.raises(OSError, match="encoder failed"):
    mp4.encode(frames[:, :31, :31], fps=24.0, first_frame=0)
