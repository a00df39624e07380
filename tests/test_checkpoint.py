"""Checkpoints: exact round trips, errors that say what to do, nothing half-written."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from longlive_jax.checkpoint import store


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  params: Any
  moments: tuple[Any, ...]
  nothing: Any
  key: jax.Array
  step: jax.Array
  size: int = dataclasses.field(default=3, metadata={"static": True})


def make_state(seed: int = 0) -> State:
  rng = np.random.default_rng(seed)
  network = {"q": nnx.Param(jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16))}
  moments = (jnp.asarray(rng.normal(size=5), jnp.float32), (jnp.zeros((0, 2)),))
  return State(network, moments, None, jax.random.key(seed), jnp.int32(7))


def same(a: Any, b: Any) -> bool:
  if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
    a, b = jax.random.key_data(a), jax.random.key_data(b)
  a, b = np.asarray(a), np.asarray(b)
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_round_trip_of_any_tree_is_exact(tmp_path):
  state = make_state()
  store.save(tmp_path / "s", state, {"chunk": 3})
  loaded = store.load(tmp_path / "s", jax.eval_shape(make_state))
  assert jax.tree.structure(loaded) == jax.tree.structure(state)
  assert jax.tree.all(jax.tree.map(same, state, loaded))
  assert store.load_metadata(tmp_path / "s") == {"chunk": 3}
  flat = store.load(tmp_path / "s")
  assert set(flat) == {"params.q", "moments.0", "key", "step"}
  assert flat["params.q"].dtype == jnp.bfloat16


def test_an_array_larger_than_what_is_read_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(store, "_READ_BYTES", 64)
  tree = {name: np.full(100, i, np.float32) for i, name in enumerate("abc")}
  store.save(tmp_path / "s", tree)
  half = jax.eval_shape(lambda: {name: jnp.zeros(100, jnp.bfloat16) for name in tree})
  for like in (tree, half):
    loaded = store.load(tmp_path / "s", like)
    assert all((loaded[name] == tree[name]).all() for name in tree)


@pytest.mark.parametrize(
  "write", [store.save, lambda path, tree: store.save_stream(path, tree.items())]
)
def test_large_arrays_are_written_in_parts(tmp_path, monkeypatch, write):
  """A thread reads a part."""
  monkeypatch.setattr(store, "_PART_BYTES", 512)
  shapes = {"layers": (10, 16), "words": (1000, 1), "small": (10, 8), "number": ()}
  tree = {k: np.random.default_rng(0).random(s, np.float32) for k, s in shapes.items()}
  tree = {name: np.asarray(array) for name, array in tree.items()}
  write(tmp_path / "s", tree)
  stored = ocp.metadata(tmp_path / "s").metadata
  parts = {name: stored[name].storage_metadata.chunk_shape for name in tree}
  assert parts["layers"] == (1, 16) and parts["small"] == (10, 8)
  assert 64 < parts["words"][0] <= 128
  for name, array in store.load(tmp_path / "s").items():
    np.testing.assert_array_equal(array, tree[name])


def test_arrays_land_where_the_abstract_tree_says(tmp_path):
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.NamedSharding(mesh, jax.P("data"))
  store.save(tmp_path / "s", {"a": np.arange(8.0), "n": 5})
  like = {"a": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=sharding), "n": 0}
  loaded = store.load(tmp_path / "s", like)
  assert loaded["a"].sharding == sharding and loaded["a"].dtype == jnp.bfloat16
  assert loaded["n"] == 5 and isinstance(loaded["n"], int)


def test_stream_of_arrays_equals_a_saved_tree(tmp_path, monkeypatch):
  monkeypatch.setattr(store, "_GROUP_BYTES", 40)
  arrays = {f"a.{i}": np.full((4, i + 1), i, np.float32) for i in range(5)}
  store.save_stream(tmp_path / "s", arrays.items(), {"kind": "x"})
  loaded = store.load(tmp_path / "s")
  assert sorted(loaded) == sorted(arrays)
  assert all(same(arrays[name], loaded[name]) for name in arrays)
  assert store.load_metadata(tmp_path / "s") == {"kind": "x"}


def test_a_stream_that_breaks_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(store, "_GROUP_BYTES", 1)

  def leaves():
    yield "a", np.ones(3)
    yield "b", np.ones(3)
    raise RuntimeError("source ends early")

  with pytest.raises(RuntimeError, match="ends early"):
    store.save_stream(tmp_path / "s", leaves())
  assert not list(tmp_path.iterdir())


def test_overwriting_keeps_the_old_until_the_new_is_whole(tmp_path, monkeypatch):
  path = tmp_path / "s"
  store.save(path, {"a": np.zeros(3)})
  with pytest.raises(FileExistsError, match="exists; remove it"):
    store.save(path, {"a": np.ones(3)})
  with monkeypatch.context() as patch:
    fails = lambda *_, **__: (_ for _ in ()).throw(OSError)  # noqa: E731
    patch.setattr(store.ocp, "save_async", fails)
    with pytest.raises(OSError):
      store.save(path, {"a": np.ones(3)}, overwrite=True)
  assert store.load(path)["a"].sum() == 0
  store.save(path, {"a": np.ones(3)}, overwrite=True)
  assert store.load(path)["a"].sum() == 3
  assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_all_mismatches_are_reported_together(tmp_path):
  store.save(tmp_path / "s", {"a": np.zeros(3), "b": np.zeros((2, 2)), "c": np.ones(1)})
  like = {"a": np.zeros(4), "b": np.zeros((2, 2)), "d": np.zeros(5)}
  with pytest.raises(ValueError) as error:
    store.load(tmp_path / "s", like)
  for part in ("a has shape (3,) instead of (4,)", "d (5,) is missing",
               "c (1,) has no place", "3 arrays"):  # fmt: skip
    assert part in str(error.value)


def test_missing_foreign_and_truncated_checkpoints(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*convert_checkpoint"):
    store.load(tmp_path / "nowhere")
  (tmp_path / "other").mkdir()
  with pytest.raises(ValueError, match="not a checkpoint of this project"):
    store.load(tmp_path / "other")
  path = tmp_path / "s"
  store.save(path, {"a": np.random.default_rng(0).normal(size=(64, 64))})
  data = max(
    (p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
  )
  data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
  with pytest.raises(ValueError, match=r"is damaged: .* bytes instead of"):
    store.load_metadata(path)  # noticed before any array is read
  (path / "sizes.json").unlink()  # as plain Orbax writes it
  with pytest.raises(ValueError, match="is damaged"):
    store.load(path)
  (path / "state" / "_METADATA").write_text("{")
  with pytest.raises(ValueError, match="is damaged"):
    store.load(path)


@pytest.mark.parametrize("kind", store.NETWORKS)
def test_networks_come_back_by_kind(tmp_path, kind):
  config = store.NETWORKS[kind][2]["test"]
  rng = np.random.default_rng(0)
  model = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
    store.abstract_network(kind, config, jnp.bfloat16),
  )
  store.save_network(tmp_path / "n", model, source="random")
  record = store.load_metadata(tmp_path / "n")
  assert (record["kind"], record["size"]) == (kind, "test")
  assert record["dtype"] == "bfloat16"
  loaded = store.load_network(tmp_path / "n", kind)
  assert loaded.config == model.config
  assert jax.tree.all(jax.tree.map(same, model, loaded))
  wide = store.load_network(tmp_path / "n", kind, jnp.float32)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}
  with pytest.raises(ValueError, match="give the folder of a"):
    store.load_network(tmp_path / "n", "vae" if kind != "vae" else "dit")
