"""The stream: one program, constant memory, byte-equal resume and branch, errors."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from random_weights import TINY_VAE, normal, random_dit, random_vae

from longlive_jax.checkpoint import store
from longlive_jax.generate import decoding, snapshots
from longlive_jax.generate import stream as streaming
from longlive_jax.generate.sampler import Sampling
from longlive_jax.generate.stream import Story, copy_state, stream
from longlive_jax.models import dit, pixels, vae

pytestmark = pytest.mark.usefixtures("quick_compiling")

CONFIG = dit.SIZES["test"]
B, N, Y, X = 2, 2, 2, 2
SAMPLING = Sampling(
  frames_per_chunk=N, window_frames=3 * N, sink_frames=N, steps=2, solver="euler"
)
NVFP4_CACHE = {"kv_format": "nvfp4", "guidance": 3.0, "relative_rope": True}
ENDLESS = dataclasses.replace(SAMPLING, relative_rope=True)
SCALE, FACTOR = TINY_VAE.spatial_factor, TINY_VAE.temporal_factor


@pytest.fixture(scope="module")
def model() -> dit.CausalDiT:
  return random_dit()


@pytest.fixture(scope="module")
def video_vae() -> vae.VideoVAE:
  return random_vae()


def state_for(model, video_vae, sampling=SAMPLING, seed=0):
  key = jax.random.key(seed)
  samples = np.arange(B)
  return streaming.init_state(
    model, video_vae, sampling, key=key, samples=samples, y=Y, x=X
  )


def story(chunks: int, seed: int = 0, cuts: bool = True) -> Story:
  """Random prompts and cuts of two videos."""
  rng = np.random.default_rng(seed)
  cut = rng.random((chunks, B)) < (0.4 if cuts else 0.0)
  cut[0] = False
  return Story(
    embeddings=normal(4, 5, CONFIG.text_dim, seed=1),
    negative=normal(5, CONFIG.text_dim, seed=2),
    prompt_index=rng.integers(0, 4, (chunks, B)).astype(np.int32),
    cut=cut,
    shot=np.cumsum(cut, axis=0).astype(np.int32),
  )


def steady(chunks: int) -> Story:
  """One prompt a video, no cut: chunks can be given as well as generated."""
  plain = story(chunks, cuts=False)
  index = np.tile(np.array([1, 2], np.int32), (chunks, 1))
  return dataclasses.replace(plain, prompt_index=index)


def run(*args, **options):
  """Latents and frames of all chunks, as bytes would show them."""
  chunks = list(stream(*args, **options))
  return [(c.index, np.asarray(c.latents), c.frames) for c in chunks]


def assert_same(found, want):
  assert [c[0] for c in found] == [c[0] for c in want]
  for (index, latents, frames), (_, want_latents, want_frames) in zip(
    found, want, strict=True
  ):
    np.testing.assert_array_equal(latents, want_latents, err_msg=f"chunk {index}")
    np.testing.assert_array_equal(frames, want_frames, err_msg=f"chunk {index}")


def compiled_by(work) -> dict[str, int]:
  """Programs that some work compiled."""
  before = streaming.compiled_programs()
  work()
  after = streaming.compiled_programs()
  return {step: after[step] - before[step] for step in after}


# ------------------------------------------------------------------ one program
def test_one_program_whatever_the_length_the_prompts_and_the_cuts(
  model, video_vae, tmp_path
):
  sampling = dataclasses.replace(SAMPLING, shift=4.9)  # nobody else's programs

  def go(weights):
    networks = (weights, video_vae)
    saved = []

    def keep(chunk, state):
      if chunk == 2:
        saved.append(copy_state(state))
        snapshots.save(tmp_path, chunk, state, {})

    run(*networks, state_for(*networks, sampling), story(5), sampling, on_state=keep)
    run(*networks, state_for(*networks, sampling, 1), story(9, seed=1), sampling)
    run(*networks, saved[0], story(4, seed=2), sampling)
    like = jax.eval_shape(lambda: state_for(*networks, sampling))
    loaded = store.load(snapshots.find(tmp_path), like)
    run(*networks, loaded, story(6, seed=3), sampling)

  once = {"denoise": 1, "remember": 0, "decode": 1}
  assert compiled_by(lambda: go(model)) == once
  # Loaded weights are committed to their device, drawn ones are not.
  sampling = dataclasses.replace(SAMPLING, shift=4.8)
  store.save_network(tmp_path / "dit", model)
  loaded = store.load_dit(tmp_path / "dit")
  assert compiled_by(lambda: go(loaded)) == once | {"decode": 0}
  sampling = dataclasses.replace(SAMPLING, shift=4.7)
  committed = jax.device_put(model, jax.devices()[0])
  assert compiled_by(lambda: go(committed)) == once | {"decode": 0}


def test_a_shorter_first_chunk_is_one_more_program(model):
  sampling = dataclasses.replace(SAMPLING, independent_first_frame=True)

  def go():
    found = run(model, None, state_for(model, None, sampling), story(5), sampling)
    assert [latents.shape[1] for _, latents, _ in found] == [1, N, N, N, N]

  assert compiled_by(go) == {"denoise": 2, "remember": 0, "decode": 0}


def test_chunk_200_costs_what_chunk_6_costs(model):
  shapes, live, frames = {}, {}, {}

  def look(chunk, state):
    if chunk in (6, 200):
      live[chunk] = sum(a.nbytes for a in jax.live_arrays())
      shapes[chunk] = jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), state)
      frames[chunk] = np.array(state.cache.frame)  # a view would keep it alive

  def go():
    chunks = stream(
      model, None, state_for(model, None, ENDLESS), story(200), ENDLESS, on_state=look
    )
    for chunk in chunks:
      assert np.isfinite(chunk.latents).all()
      del chunk

  programs = compiled_by(go)
  assert programs["denoise"] <= 1
  assert shapes[6] == shapes[200] and live[6] == live[200]
  assert np.all(frames[200].max(axis=1) == 200 * N - 1)
  assert np.all(frames[200].min(axis=1) == 0)  # the global sink is still there


# ------------------------------------------------------------------ decoded frames
@pytest.mark.parametrize("decode_frames", [1, N])
def test_frames_are_those_of_the_whole_decode(model, video_vae, decode_frames):
  state = state_for(model, video_vae)
  found = run(model, video_vae, state, story(4), SAMPLING, decode_frames=decode_frames)
  lengths = [frames.shape[1] for *_, frames in found]
  assert lengths == [FACTOR * N - (FACTOR - 1), *[FACTOR * N] * 3]
  frames = np.concatenate([frames for *_, frames in found], axis=1)
  assert frames.dtype == np.uint8 and frames.shape[2:] == (SCALE * Y, SCALE * X, 3)
  latents = np.concatenate([latents for _, latents, _ in found], axis=1)
  whole = pixels.to_uint8(jax.jit(vae.decode)(video_vae, latents))
  difference = np.abs(frames.astype(int) - np.asarray(whole, int))
  assert difference.max() <= 1 and np.mean(difference > 0) < 0.01  # rounding of .5
  assert frames.std() > 20


def test_without_a_vae_only_latents_come_out(model):
  found = run(model, None, state_for(model, None), story(2), SAMPLING)
  assert [frames for *_, frames in found] == [None, None]


def test_the_next_chunk_is_under_way_and_no_frame_is_waited_for(
  model, video_vae, monkeypatch
):
  events, denoise = [], streaming._denoise
  monkeypatch.setattr(
    streaming, "_denoise", lambda *args: events.append("denoise") or denoise(*args)
  )
  fetch = decoding.Frames.fetch
  monkeypatch.setattr(
    decoding.Frames, "fetch", lambda self: events.append("fetch") or fetch(self)
  )
  chunks = stream(model, video_vae, state_for(model, video_vae), story(3), SAMPLING)
  for chunk in chunks:
    events.append(chunk.index)
  assert events == ["denoise", "denoise", 0, "denoise", 1, 2]
  assert chunk.frames.shape[1] == FACTOR * N and events[-1] == "fetch"


def test_tiles_are_the_decoders(model, video_vae):
  with pytest.raises(ValueError, match="decode_tiles=2 does not make equal tiles"):
    state = state_for(model, video_vae)
    next(stream(model, video_vae, state, story(1), SAMPLING, decode_tiles=2))


# ------------------------------------------------------------------ going back
@pytest.mark.parametrize("change", [{}, NVFP4_CACHE], ids=str)
def test_straight_resumed_and_branched_runs_agree_byte_for_byte(
  model, video_vae, tmp_path, change
):
  plan, k = story(6), 3
  sampling = dataclasses.replace(SAMPLING, **change)
  saved = []

  def keep(chunk, state):
    if chunk == k:
      snapshots.save(tmp_path, chunk, state, {"note": "after three"})
      saved.append(copy_state(state))

  first = state_for(model, video_vae, sampling)
  straight = run(model, video_vae, first, plan, sampling, on_state=keep)
  assert [index for index, *_ in straight] == list(range(6))

  path = snapshots.find(tmp_path, k)
  assert store.load_metadata(path) == {"note": "after three"}
  like = jax.eval_shape(lambda: state_for(model, video_vae, sampling))
  loaded = store.load(path, like)
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved[0]), strict=True):
    np.testing.assert_array_equal(a, b)
  assert_same(run(model, video_vae, loaded, plan, sampling), straight[k:])
  # A stop, for whatever reason, is the same as a shorter story.
  short = dataclasses.replace(
    plan, prompt_index=plan.prompt_index[:k], cut=plan.cut[:k], shot=plan.shot[:k]
  )
  again = run(model, video_vae, state_for(model, video_vae, sampling), short, sampling)
  assert_same(again, straight[:k])

  branch = copy_state(saved[0])
  assert_same(run(model, video_vae, saved[0], plan, sampling), straight[k:])
  index = plan.prompt_index.copy()
  index[k + 1 :] = 3 - index[k + 1 :]
  other = dataclasses.replace(plan, prompt_index=index)
  branched = run(model, video_vae, branch, other, sampling)
  assert_same(branched[:1], straight[k : k + 1])
  assert not np.array_equal(branched[1][1], straight[k + 1][1])


def test_the_seed_and_the_samples_identity_make_the_video(model):
  def latents(seed, samples):
    key = jax.random.key(seed)
    state = streaming.init_state(
      model, None, SAMPLING, key=key, samples=samples, y=Y, x=X
    )
    return run(model, None, state, steady(1), SAMPLING)[0][1]

  a = latents(0, np.array([5, 8]))
  np.testing.assert_array_equal(a, latents(0, np.array([5, 8])))
  assert not np.array_equal(a, latents(1, np.array([5, 8])))
  np.testing.assert_array_equal(a[:1], latents(0, np.array([5, 9]))[:1])


# ------------------------------------------------------------------ given beginnings
def test_given_latents_are_handed_out_and_continued(model, video_vae):
  plan = steady(5)
  straight = run(model, video_vae, state_for(model, video_vae), plan, SAMPLING)
  given = np.concatenate([latents for _, latents, _ in straight[:2]], axis=1)
  rest = steady(3)
  found = run(
    model, video_vae, state_for(model, video_vae), rest, SAMPLING, given=given
  )
  assert [index for index, *_ in found] == [None, None, 0, 1, 2]
  for (_, latents, frames), (_, want, want_frames) in zip(found, straight, strict=True):
    np.testing.assert_allclose(latents, want, atol=1e-4)
    assert np.abs(frames.astype(int) - want_frames.astype(int)).max() <= 1


def test_given_latents_may_start_with_a_single_frame(model):
  sampling = dataclasses.replace(SAMPLING, independent_first_frame=True)
  state = state_for(model, None, sampling)
  given = normal(B, 1 + N, Y, X, CONFIG.in_channels)
  seen = []
  found = run(
    model, None, state, steady(2), sampling, given=given,
    on_state=lambda chunk, state: seen.append((chunk, int(state.frame))),
  )  # fmt: skip
  assert [latents.shape[1] for _, latents, _ in found] == [1, N, N, N]
  np.testing.assert_array_equal(
    np.concatenate([latents for _, latents, _ in found[:2]], axis=1), given
  )
  assert seen == [(1, 1 + 2 * N), (2, 1 + 3 * N)]


@pytest.mark.parametrize("first_alone", [False, True])
def test_an_image_is_the_first_frame(model, first_alone):
  """With an image the first chunk is whole, also where frame 0 is else alone."""
  sampling = dataclasses.replace(SAMPLING, independent_first_frame=first_alone)
  image = normal(B, 1, Y, X, CONFIG.in_channels, seed=9)
  plan = steady(2)
  found = run(
    model, None, state_for(model, None, sampling), plan, sampling, image=image
  )
  assert [latents.shape[1] for _, latents, _ in found] == [N, N]
  np.testing.assert_array_equal(found[0][1][:, :1], image)
  plain = run(model, None, state_for(model, None), plan, SAMPLING)
  for (_, a, _), (_, b, _) in zip(found, plain, strict=True):
    assert np.abs(a[:, 1:] - b[:, 1:]).max() > 1e-3  # it is looked at, and remembered


# ------------------------------------------------------------------ stopping
def test_what_is_under_way_is_handed_out_when_asked_to_stop(model):
  for stop_after in (0, 1, 3):
    asked = itertools.count()
    states = []
    found = run(
      model, None, state_for(model, None), story(5), SAMPLING,
      should_stop=lambda n=stop_after, asked=asked: next(asked) >= n,
      on_state=lambda chunk, state, states=states: states.append(chunk),
    )  # fmt: skip
    done = list(range(stop_after))
    assert [index for index, *_ in found] == done
    assert states == [index + 1 for index in done]


def test_states_come_in_order_and_say_where_they_stand(model):
  seen = []

  def look(chunk, state):
    seen.append((chunk, int(state.chunk), int(state.frame), bool(state.finite)))

  run(model, None, state_for(model, None), story(3), SAMPLING, on_state=look)
  assert seen == [(i, i, i * N, True) for i in (1, 2, 3)]


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_latent_that_is_not_finite_stops_the_run_and_names_the_chunk(model, bad):
  plan = story(4)
  index = np.where(np.arange(4)[:, None] >= bad, 3, 0) * np.ones((1, B))
  embeddings = plan.embeddings.copy()
  embeddings[3] = np.nan
  plan = dataclasses.replace(
    plan, embeddings=embeddings, prompt_index=index.astype(np.int32)
  )
  good, states = [], []
  with pytest.raises(FloatingPointError, match=f"chunk={bad} has latents that are not"):
    chunks = stream(
      model, None, state_for(model, None), plan, SAMPLING,
      on_state=lambda chunk, state: states.append(bool(state.finite)),
    )  # fmt: skip
    for chunk in chunks:
      good.append(chunk.index)
  assert good == list(range(bad))
  assert states[:bad] == [True] * bad and not any(states[bad:])  # do not save those


def test_poisoned_weights_stop_the_first_chunk(model):
  poisoned = jax.tree.map(lambda a: a * np.inf, model)
  with pytest.raises(FloatingPointError, match=r"chunk=0 .*weights"):
    run(poisoned, None, state_for(model, None), story(3), SAMPLING)


# ------------------------------------------------------------------ errors
def test_sizes_that_are_no_whole_tokens(model):
  with pytest.raises(ValueError, match="height of 3 latents must be a multiple of 2"):
    streaming.init_state(
      model, None, SAMPLING, key=jax.random.key(0), samples=[0], y=3, x=2
    )


GUIDED = dataclasses.replace(SAMPLING, guidance=2.0)
FIRST = dataclasses.replace(SAMPLING, independent_first_frame=True)
C = CONFIG.in_channels
ONE_VIDEO = dict.fromkeys(("prompt_index", "cut", "shot"), np.zeros((2, 1), np.int32))


@pytest.mark.parametrize(
  ("sampling", "change", "options", "message"),
  [
    (SAMPLING, ONE_VIDEO, {}, "story is for 1 videos, the state for 2"),
    (GUIDED, {"negative": None}, {}, "guidance=2.0 needs Story.negative"),
    (SAMPLING, {}, {"image": (B, 1, Y, X, C + 1)}, r"image has shape .* must be "),
    (SAMPLING, {}, {"image": (B, N + 1, Y, X, C)}, "image has 3 .* at most .*=2"),
    (SAMPLING, {}, {"given": (1, N, Y, X, C)}, r"given has shape .* must be "),
    (SAMPLING, {}, {"given": (B, 3, Y, X, C)}, "given has 3 .* be 0 plus a multiple"),
    (SAMPLING, {}, {"given": (B, 0, Y, X, C)}, "given has 0 latent frames"),
    (FIRST, {}, {"given": (B, N, Y, X, C)}, "given has 2 .* must be 1 plus a multiple"),
  ],
)
def test_inputs_that_do_not_fit(model, sampling, change, options, message):
  plan = story(2)
  plan = dataclasses.replace(plan, **change)
  options = {k: np.zeros(shape, np.float32) for k, shape in options.items()}
  with pytest.raises(ValueError, match=message):
    next(stream(model, None, state_for(model, None), plan, sampling, **options))


def test_a_story_has_one_shape():
  plan = story(2)
  with pytest.raises(ValueError, match=r"must have one shape \(chunks, b\)"):
    dataclasses.replace(plan, cut=plan.cut[:1])
