"""A session: the bytes of a stream, rewound, branched, saved, told another prompt."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest
from random_weights import TINY_VAE, random_dit, random_vae

from longlive_jax.generate import engine as engines
from longlive_jax.generate import recache, saved_sessions, storyboard
from longlive_jax.generate import session as sessions
from longlive_jax.generate import stream as streaming
from longlive_jax.generate.commands import Cut, Prompt, Rewind
from longlive_jax.generate.sampler import Sampling
from longlive_jax.models import dit

CONFIG = dit.SIZES["test"]
N = 2
SAMPLING = Sampling(
  frames_per_chunk=N, window_frames=4 * N, sink_frames=N, steps=2, solver="euler",
  relative_rope=True,
)  # fmt: skip
NVFP4 = dataclasses.replace(SAMPLING, kv_format="nvfp4", guidance=3.0)
RED, BLUE, GREEN = "A red star.", "A blue star.", "A green star."


def embed(prompt: str) -> np.ndarray:
  seed = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
  rng = np.random.default_rng(seed)
  return rng.standard_normal((5, CONFIG.text_dim)).astype(np.float32)


@pytest.fixture(scope="module")
def networks():
  # Committed, as loaded ones are.
  return jax.device_put((random_dit(), random_vae()), jax.devices()[0])


@pytest.fixture(params=[SAMPLING, NVFP4], ids=["plain", "nvfp4"])
def engine(networks, request):
  return engine_of(networks, request.param)


@pytest.fixture
def plain(networks):
  return engine_of(networks, SAMPLING)


def engine_of(networks, sampling, **changes) -> engines.Engine:
  side = TINY_VAE.spatial_factor * 2
  settings = {"height": side, "width": side, "history_chunks": 4, **changes}
  return engines.Engine(
    *networks, sampling, embed, embed("nothing"), decode_frames=N, **settings
  )


def play(engine, session, *plan):
  """Applies commands and advances by numbers; the session and its chunks."""
  chunks = []
  for step in plan:
    if not isinstance(step, int):
      session = sessions.apply(engine, session, step)
      continue
    for _ in range(step):
      session, chunk = sessions.advance(engine, session)
      chunks.append((chunk.index, np.array(chunk.latents), chunk.frames))
  return session, chunks


def fresh(engine, *plan, seed=0):
  return play(engine, sessions.start(engine, RED, seed), *plan)


def assert_same(found, want):
  assert [c[0] for c in found] == [c[0] for c in want]
  for (index, *arrays), (_, *others) in zip(found, want, strict=True):
    for a, b in zip(arrays, others, strict=True):
      np.testing.assert_array_equal(a, b, err_msg=f"chunk {index}")


def same_state(a, b):
  """Bit for bit, what was never written included."""
  a, b = (sessions.to_host(s).state for s in (a, b))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# ------------------------------------------------------------------ it is a stream
def test_a_session_has_the_bytes_of_a_stream(engine):
  session, found = fresh(engine, 2, Cut(BLUE), 3, Cut(GREEN), 2)
  board = sessions.storyboard_of(session)
  assert board == storyboard.inline([RED, BLUE, GREEN], durations=[2, 3, 2])
  arrays = board.arrays()
  story = streaming.Story(
    np.stack([embed(p) for p in arrays.prompts]),
    engine.negative if engine.sampling.branches == 2 else None,
    arrays.prompt_index,
    arrays.cut,
    arrays.shot,
  )
  state = sessions.empty_state(engine, 0)
  parts = engine.model, engine.video_vae, state, story, engine.sampling
  straight = [
    (c.index, np.asarray(c.latents), c.frames[0])
    for c in streaming.stream(*parts, decode_frames=N)
  ]
  assert_same(found, straight)


SWITCHES = (
  Prompt(BLUE, recache.parse("last:2")),
  1,
  Cut(GREEN),
  2,
  Prompt(RED, recache.parse("window+sinks")),
  1,
)


def test_a_rewound_session_goes_on_as_it_did(engine):
  plan = (3, *SWITCHES, 1)
  session, found = fresh(engine, *plan)
  assert session.chunk == 8 and session.oldest == 4
  rewound, again = play(engine, session, Rewind(4), Cut(GREEN), *plan[4:])
  assert_same(again, found[4:])
  straight, _ = fresh(engine, *plan)
  same_state(rewound, straight)
  assert rewound.made == straight.made and rewound.settled == straight.settled
  # What came after is forgotten, commands that were given there as well.
  other, _ = play(engine, rewound, Rewind(5), Prompt(BLUE), Rewind(5), 1)
  assert other.made == straight.made[:6]


def test_a_branch_does_not_change_its_parent(engine):
  want = fresh(engine, 3, Prompt(BLUE), 3)[1]
  parent, before = fresh(engine, 3, Prompt(BLUE), 1)
  here = sessions.branch(engine, parent)
  there = sessions.branch(engine, parent, 3)
  _, other = play(engine, there, Prompt(GREEN), 2)
  assert [index for index, *_ in other] == [3, 4]
  assert not np.array_equal(other[0][1], want[3][1])
  parent, after = play(engine, parent, 2)
  assert_same(before + after, want)
  assert_same(play(engine, here, 2)[1], want[4:])


def test_saved_and_evicted_sessions_go_on_as_they_did(engine, tmp_path):
  want, frames = fresh(engine, 3, *SWITCHES, Prompt(BLUE, recache.parse("blend:3")), 3)
  # Saved with a blend half way, a command that waits, and a past.
  session, _ = fresh(engine, 3, *SWITCHES, Prompt(BLUE, recache.parse("blend:3")), 1)
  session = sessions.apply(engine, session, Cut(RED))
  folder = tmp_path / "session"
  saved_sessions.save(engine, session, folder, {"name": "a"})
  assert saved_sessions.about(folder) == {"name": "a"}
  loaded = saved_sessions.load(engine, folder)
  assert loaded.script == session.script and loaded.made == session.made
  here = sessions.branch(engine, session)
  host = sessions.to_host(session)
  assert host.on_host and sessions.to_host(host) is host
  kept = jax.tree.map(np.copy, host.state)
  for each in (loaded, host, here):
    # The rewind forgets the cut.
    gone_on, found = play(engine, each, Rewind(each.chunk), 2)
    assert_same(found, frames[8:])
    same_state(gone_on, want)
    rewound, found = play(engine, gone_on, Rewind(7), Prompt(RED), Rewind(7),
                          Prompt(BLUE, recache.parse("blend:3")), 3)  # fmt: skip
    assert_same(found, frames[7:])
    same_state(rewound, want)
  same_state(dataclasses.replace(host, state=kept), host)
