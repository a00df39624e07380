"""A session: the bytes of a stream, rewound, branched, saved, told another prompt."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest
from bench_memory import compilations
from random_weights import TINY_VAE, random_dit, random_vae

from longlive_jax.generate import engine as engines
from longlive_jax.generate import (
  recache,
  request,
  rewriting,
  sampler,
  saved_sessions,
  storyboard,
)
from longlive_jax.generate import script as scripts
from longlive_jax.generate import session as sessions
from longlive_jax.generate import stream as streaming
from longlive_jax.generate.commands import (
  Branch,
  Cut,
  Image,
  Pause,
  Prompt,
  Resume,
  Rewind,
)
from longlive_jax.generate.sampler import Sampling
from longlive_jax.generate.scheduler import Scheduler
from longlive_jax.layers import kv_slots
from longlive_jax.models import dit, vae, vae_fp8

pytestmark = pytest.mark.usefixtures("quick_compiling")

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


# ------------------------------------------------------------------ one program
def test_nothing_compiles_after_the_warm_up(networks, tmp_path):
  sampling = dataclasses.replace(SAMPLING, shift=4.1)  # nobody else's programs
  engine = engine_of(networks, sampling)
  before = sessions.compiled_programs()
  sessions.warm_up(engine)
  after = sessions.compiled_programs()
  mine = ("denoise", "write_again")
  assert [after[name] - before[name] for name in mine] == [1, 1]
  picture = np.zeros((30, 40, 3), np.uint8)
  folder = tmp_path / "session"
  with compilations() as seconds:
    first, _ = fresh(engine, 2, *SWITCHES, Image(picture, RED), 2, Rewind(6), 1)
    for number, rule in enumerate(["none", "last:1", "last:3", "window", "blend:2"]):
      told = Prompt(f"Text {number}.", recache.parse(rule))
      first, _ = play(engine, first, told, Pause(), Resume(), 1)
    other = sessions.branch(engine, first, first.chunk - 2)
    joined, _ = fresh(engine, Cut(RED), 1, seed=3)
    for each in (first, sessions.to_host(other)):
      play(engine, each, 1)
  assert seconds == []
  # Loading is Orbax's work, which has small programs of its own.
  saved_sessions.save(engine, joined, folder)
  loaded = saved_sessions.load(engine, folder)
  with compilations() as seconds:
    play(engine, loaded, Prompt(BLUE), 1, Rewind(1), 1)
  assert seconds == []
  assert sessions.compiled_programs() == after


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


def random_commands(rng):
  """Up to three, of any kind but a rewind; whoever sends them thinks twice."""
  texts = (RED, BLUE, GREEN)
  rules = ("none", "last:1", "last:3", "window", "window+sinks", "blend:2", "blend:3")
  picture = rng.integers(0, 255, (9, 9, 3), np.uint8)
  kinds = (
    lambda text: Prompt(text, recache.parse(rules[rng.integers(len(rules))])),
    Cut,
    lambda text: Image(picture, text),
    lambda text: Pause(),
  )
  told = [
    kinds[rng.choice(4, p=(0.6, 0.2, 0.1, 0.1))](texts[rng.integers(3)])
    for _ in range(rng.integers(4))
  ]
  return (*told, Resume(), 1)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_it_was_told_it_can_be_rewound_to_any_chunk(plain, seed):
  rng = np.random.default_rng(seed)
  plans = [random_commands(rng) for _ in range(9)]
  session, want = fresh(plain, *(step for plan in plans for step in plan))
  straight = sessions.branch(plain, session)
  for chunk in rng.permutation(np.arange(session.oldest, 9))[:3]:
    rest = (step for plan in plans[chunk:] for step in plan)
    session, found = play(plain, session, Rewind(int(chunk)), *rest)
    assert_same(found, want[chunk:])
    same_state(session, straight)
    assert session.made == straight.made and session.script == straight.script


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


# ------------------------------------------------------------------ many of them
def test_sessions_that_take_turns_do_not_notice(plain):
  """Each is moved to the host when another goes, and one more joins and leaves."""
  told = {"a": Cut(BLUE), "b": Prompt(GREEN)}
  want = {name: fresh(plain, 2, told[name], 2, seed=7)[1] for name in told}
  scheduler = Scheduler(
    plain, device_bytes=sessions.bytes_of(plain)["device"], host_bytes=1e9, ahead=1
  )
  assert scheduler.capacity.on_device == 1
  found = {"a": [], "b": [], "c": []}

  def until(chunks):
    for name in told:
      scheduler.shown(name, chunks - 1)
    while scheduler.wait(0):
      for made in scheduler.step():
        latents = np.array(made.chunk.latents)
        found[made.name].append((made.chunk.index, latents, made.frames))

  for name in told:
    scheduler.add(name, lambda: sessions.start(plain, RED, 7))
  until(2)
  scheduler.add("c", lambda: sessions.start(plain, RED))
  for name, command in told.items():
    scheduler.command(name, command)
  until(3)
  left = scheduler.remove("c")
  until(4)
  assert left.result().chunk == len(found["c"]) == 1
  for name in told:
    assert_same(found[name], want[name])


# ------------------------------------------------------------------ recache
def remembered(cache):
  """Slots by frame: (l, rows, p, n, d) each, in whatever they are stored."""
  table = np.asarray(cache.frame)[0]
  parts = jax.device_get((cache.k, cache.v))
  return {
    int(frame): jax.tree.map(lambda leaf, slot=slot: leaf[:, :, slot], parts)
    for slot, frame in enumerate(table)
    if frame >= 0
  }


def only(cache, memory):
  """A cache that holds these frames, oldest first."""
  frames = sorted(memory)
  k, v = jax.tree.map(np.zeros_like, jax.device_get((cache.k, cache.v)))
  for slot, frame in enumerate(frames):
    for mine, other in zip(
      jax.tree.leaves((k, v)), jax.tree.leaves(memory[frame]), strict=True
    ):
      mine[:, :, slot] = other
  table = np.full(cache.frame.shape, -1, np.int32)
  table[:, : len(frames)] = frames
  no = np.zeros_like(table, bool)
  return dataclasses.replace(
    cache, k=k, v=v, frame=table, pinned=no, has_pin=no[:, 0]
  )


def written_again_slowly(engine, cache, chunks, latents, prompt, shot):
  """As if each chunk were generated from latents right after what is before it."""
  clean_pass = jax.jit(sampler.clean_pass, static_argnums=4)
  memory = remembered(cache)
  for chunk in chunks:
    own = range(chunk * N, (chunk + 1) * N)
    text = storyboard.SCENE_CUT_PREFIX * (shot[0] > 0 and chunk == shot[1]) + prompt
    moment = streaming.Moment(
      embed(text)[None], engine.negative, np.array([False]), np.array([shot[0]])
    )
    inputs = streaming.chunk_inputs(
      CONFIG, engine.sampling, moment, own[0], latents[chunk]
    )
    before = only(cache, {f: kept for f, kept in memory.items() if f < own[0]})
    after = clean_pass(engine.model, before, latents[chunk], inputs, engine.sampling)
    memory |= {frame: remembered(after)[frame] for frame in own}
  return memory


def numbers(cache, memory):
  """What attention reads: float32 (2, frames, l, rows, p, n, d)."""
  stored = only(cache, memory)
  count = len(memory)
  return np.stack(
    [kv_slots.read(part, np.float32)[:, :, :count] for part in (stored.k, stored.v)]
  )


@pytest.mark.parametrize("plan", [(3,), (3, Cut(BLUE), 4)], ids=["first", "later"])
def test_rules_write_chunks_again_as_if_the_prompt_had_been_another(plain, plan):
  session, _ = fresh(plain, *plan)
  latents = {each.chunk: np.asarray(each.latents) for each in session.past.latents}
  script = dataclasses.replace(session.script, prompt=GREEN)
  shot = script.shot, script.shot_start
  rewritten = {
    "none": [],
    "blend:2": [],
    "last:1": [2] if shot[0] == 0 else [6],
    "last:2": [1, 2] if shot[0] == 0 else [5, 6],
    "window": [1, 2] if shot[0] == 0 else [5, 6],
    "window+sinks": [0, 1, 2] if shot[0] == 0 else [3, 5, 6],
  }
  for rule, chunks in rewritten.items():
    cache = sessions.branch(plain, session).state.cache
    before = remembered(cache)
    want = written_again_slowly(plain, cache, chunks, latents, GREEN, shot)
    tables = jax.device_get((cache.frame, cache.pinned, cache.has_pin))
    past = session.past
    after, lost = rewriting.follow(recache.parse(rule), plain, cache, script, past)
    assert len(lost) == len(chunks)
    for a, b in zip(tables, (after.frame, after.pinned, after.has_pin), strict=True):
      np.testing.assert_array_equal(a, b)
    found = remembered(after)
    for frame in before:
      same = jax.tree.map(np.array_equal, found[frame], before[frame])
      assert all(jax.tree.leaves(same)) == (frame // N not in chunks), (rule, frame)
    difference = np.abs(numbers(after, found) - numbers(after, want))
    assert difference.mean() < 1e-5 and np.mean(difference > 1e-4) < 1e-3


def test_the_same_prompt_writes_the_same_again(plain):
  """As long as nothing that a chunk saw has been forgotten."""
  session, _ = fresh(plain, 4)
  cache = sessions.branch(plain, session).state.cache
  before = numbers(cache, remembered(cache))
  rule = recache.parse("window+sinks")
  after, _ = rewriting.follow(rule, plain, cache, session.script, session.past)
  np.testing.assert_allclose(numbers(after, remembered(after)), before, atol=2e-5)


def test_a_blend_goes_over_in_even_parts(plain):
  session, found = fresh(plain, 2, Prompt(BLUE, recache.parse("blend:4")), 2)
  assert session.script.mix == ((RED, 0.5), (BLUE, 0.5))
  # From half way to a third prompt, and back before anything was made.
  session, _ = play(plain, session, Prompt(GREEN, recache.parse("blend:2")), 1)
  assert session.script.mix == ((RED, 0.25), (BLUE, 0.25), (GREEN, 0.5))
  moment = scripts.moment(plain, session.script, session.script.mix, cut=False)
  want = 0.25 * embed(RED) + 0.25 * embed(BLUE) + 0.5 * embed(GREEN)
  np.testing.assert_allclose(moment.text[0], want, atol=1e-6)
  session, _ = play(plain, session, 1)
  assert session.script.mix == ((GREEN, 1.0),) and session.script.blend is None
  # It changes what is made, and is less far from the old prompt than a switch.
  kept = fresh(plain, 4)[1][2][1]
  switched = fresh(plain, 2, Prompt(BLUE, recache.parse("none")), 1)[1][2][1]
  near, far = (np.abs(a - kept).mean() for a in (found[2][1], switched))
  assert 0 < near < far


def test_a_change_that_is_changed_back_is_none(plain):
  want = fresh(plain, 4)[1]
  rule = recache.parse("window+sinks")
  session, found = fresh(plain, 2, Prompt(BLUE, rule), Prompt(RED, rule), 2)
  assert_same(found, want)
  assert session.made[2].recache == ""


# ------------------------------------------------------------------ pictures
def test_a_shot_starts_from_a_picture(plain):
  frame = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
  session, found = fresh(plain, Image(frame, BLUE), 1, Image(frame, GREEN), 2)
  first, later = (plain.picture_latents(frame, first=f) for f in (True, False))
  np.testing.assert_array_equal(found[0][1][:, :1], first)
  np.testing.assert_array_equal(found[1][1][:, :1], later)
  assert not np.array_equal(found[2][1][:, :1], later)
  assert [(m.shot, m.cut, m.pictured) for m in session.made] == [
    (0, False, True), (1, True, True), (1, False, False)
  ]  # fmt: skip
  want = np.asarray(vae.encode(plain.video_vae, still(frame, 1), 1))
  np.testing.assert_allclose(first, want, atol=1e-5)


def still(frame, frames):
  side = 2 * TINY_VAE.spatial_factor
  video = np.broadcast_to(request.cover(frame, side, side), (1, frames, side, side, 3))
  return request.to_model_range(video)


# ------------------------------------------------------------------ refusals
def test_what_a_session_refuses(plain):
  session, _ = fresh(plain, 6)
  assert session.oldest == 2
  for command, error in (
    (Rewind(1), "chunk=1 is too far back: the oldest that history_chunks=4 keeps is 2"),
    (Rewind(7), "chunk=7 is not made yet; 6 chunks are"),
    (Branch(), "Branch is not applied to a session"),
    (Cut("a\x00"), "control character"),
    (Prompt(" "), "text is empty"),
    (Prompt(storyboard.SCENE_CUT_PREFIX), "text is empty"),
    (Image(np.zeros((2, 2)), "x"), "image is float64 .2, 2.; must be uint8"),
  ):
    with pytest.raises(ValueError, match=error):
      sessions.apply(plain, session, command)
  with pytest.raises(ValueError, match="chunk=1 is too far back"):
    sessions.branch(plain, session, 1)
  paused = sessions.apply(plain, session, Pause())
  with pytest.raises(ValueError, match="paused at chunk 6; resume it first"):
    sessions.advance(plain, paused)
  for seed in (-1, True, 2**32, "1"):
    with pytest.raises(ValueError, match="seed="):
      sessions.start(plain, RED, seed)
  session, _ = play(plain, paused, Resume(), Rewind(2), 1)  # and it still goes on
  assert session.chunk == 3 and session.oldest == 2


def test_without_history_nothing_is_kept(networks):
  engine = engine_of(networks, SAMPLING, history_chunks=0)
  session, _ = fresh(engine, 3)
  assert session.past.steps == () and session.oldest == 3
  with pytest.raises(ValueError, match="the oldest that history_chunks=0 keeps is 3"):
    sessions.apply(engine, session, Rewind(2))
  latents = engine.decoder_chunks * session.past.on_host().latents[0].latents.nbytes
  assert sessions.bytes_of(engine)["history"] == latents


def test_the_past_is_bounded(plain):
  most = sessions.bytes_of(plain)
  sizes = []
  session = sessions.start(plain, RED)
  for number in range(40):
    if number % 9 == 8:
      session = sessions.apply(plain, session, Cut(BLUE))
    session, _ = sessions.advance(plain, session)
    past = session.past.on_host()
    written = [o for step in past.steps for o in step.overwritten]
    tables = sum(a.nbytes for o in written for a in (o.slot, o.frame, o.pinned))
    kept = [(o.k, o.v) for o in written], [each.latents for each in past.latents]
    sizes.append(sum(a.nbytes for a in jax.tree.leaves(kept)))
    assert len(past.steps) <= 4 and tables < 1000
  # The start of the shot is there, what came long before it is not.
  start = session.script.shot_start
  assert past.of(start).shape == (1, N, 2, 2, 8) and past.of(1) is None
  # Beyond those that are counted, of latents the starts of shots.
  shots, chunk = 5, past.latents[0].latents.nbytes
  assert most["history"] <= max(sizes) <= most["history"] + shots * chunk
  assert most["device"] > most["host"]


def test_a_chunk_that_is_not_finite_is_named_and_rewound(networks):
  engine = engine_of(networks, SAMPLING)
  broken = dataclasses.replace(
    engine, embed=lambda prompt: embed(prompt) * (np.nan if prompt == BLUE else 1)
  )
  want = fresh(engine, 3)[1]
  session, _ = fresh(broken, 2, Prompt(BLUE, recache.parse("none")))
  session, chunk = sessions.advance(broken, session)
  with pytest.raises(FloatingPointError, match="chunk=2 has latents that are not fin"):
    chunk.frames.sum()
  assert not bool(session.state.finite)
  session, found = play(broken, session, Rewind(2), 1)
  assert_same(found, want[2:]) and bool(session.state.finite)


@pytest.mark.parametrize(
  ("change", "error"),
  [
    ({"height": 6}, "height=6 and width=8 must be multiples of 4"),
    ({"history_chunks": -1}, "history_chunks=-1 must not be negative"),
    ({"sampling": dataclasses.replace(SAMPLING, reference=True)}, "reference=True"),
    ({"sampling": dataclasses.replace(SAMPLING, independent_first_frame=True)},
     "independent_first_frame=True cannot be had in a session"),
    ({"sampling": NVFP4, "negative": None}, "guidance=3.0 needs Engine.negative"),
  ],
)  # fmt: skip
def test_engines_that_cannot_be(plain, change, error):
  with pytest.raises(ValueError, match=error):
    dataclasses.replace(plain, **change)


def test_a_saved_session_needs_its_settings(plain, networks, tmp_path):
  saved_sessions.save(plain, sessions.start(plain, RED), tmp_path / "a")
  other = engine_of(networks, dataclasses.replace(SAMPLING, steps=3))
  with pytest.raises(ValueError, match="was made with steps=2, but the engine has 3"):
    saved_sessions.load(other, tmp_path / "a")
  # Else numbers would become codes without their scale, in silence.
  eight = dataclasses.replace(
    plain, video_vae=vae_fp8.quantise_decoder(plain.video_vae)
  )
  with pytest.raises(ValueError, match="with vae_precision='', but the engine has 'fp"):
    saved_sessions.load(eight, tmp_path / "a")
  with pytest.raises(FileNotFoundError, match="no checkpoint at"):
    saved_sessions.load(plain, tmp_path / "b")
