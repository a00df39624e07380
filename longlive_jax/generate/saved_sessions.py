"""Sessions on disk: as whole as in memory, their past included.

A folder holds one session: its arrays, and a JSON record of all that is no array. It
gets its name when it is whole, so that a save that fails leaves the one before.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longlive_jax.checkpoint import store
from longlive_jax.generate import history, recache, session
from longlive_jax.generate.engine import Engine
from longlive_jax.generate.history import History, Latents, Step
from longlive_jax.generate.script import Blend, Made, Mix, Script
from longlive_jax.generate.session import Session
from longlive_jax.models import vae_fp8


def save(
  engine: Engine,
  saved: Session,
  path: str | Path,
  about: Mapping[str, Any] | None = None,
) -> None:
  """Writes a session, which is only read; an older one at `path` is replaced.

  Args:
    about: more for the record, of JSON values; `about` reads it.

  Raises:
    OSError or ValueError: the disk refuses; an older one stays usable.
  """
  past = saved.past.on_host()
  tree = {
    "state": saved.state,
    "overwritten": [step.overwritten for step in past.steps],
    "finite": [step.finite for step in past.steps],
    "latents": [each.latents for each in past.latents],
  }
  if saved.script.picture is not None:
    tree["picture"] = saved.script.picture
  record = {
    "settings": _settings(engine),
    "seed": saved.seed,
    "paused": saved.paused,
    "script": _script_record(saved.script),
    "settled": _script_record(saved.settled),
    "made": [dataclasses.asdict(each) for each in saved.made],
    "steps": [
      {
        "chunk": step.chunk,
        "script": _script_record(step.script),
        "writes": len(step.overwritten),
      }
      for step in past.steps
    ],
    "latents": [each.chunk for each in past.latents],
    "picture": None
    if saved.script.picture is None
    else list(saved.script.picture.shape),
  }
  whole = {"session": record, "about": dict(about or {})}
  store.save(path, tree, whole, overwrite=True)


def about(path: str | Path) -> dict[str, Any]:
  """What `save` was given as `about`; raises as `load`."""
  return _record(path)["about"]


def load(engine: Engine, path: str | Path) -> Session:
  """The session as it was saved, on the first device.

  Raises:
    FileNotFoundError, ValueError: there is none; it is damaged; it was made by other
      networks or with other settings.
  """
  record = _record(path)["session"]
  settings = {"vae_precision": "", **record["settings"]}  # older ones do not say
  for name, value in _settings(engine).items():
    if settings.get(name) != value:
      raise ValueError(
        f"session={path} was made with {name}={settings.get(name)!r}, but "
        f"the engine has {value!r}; start it with the settings of the session"
      )
  y, x, c = engine.latent_shape
  n = engine.sampling.frames_per_chunk
  frames = jax.ShapeDtypeStruct((1, n), np.int32)
  cut = jax.ShapeDtypeStruct((1,), np.bool_)
  state = jax.eval_shape(lambda: session.empty_state(engine, 0))
  lost = jax.tree.map(
    lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape),
    jax.eval_shape(
      lambda *arrays: history.look(*arrays, engine.sampling), state.cache, frames, cut
    ),
  )
  steps = record["steps"]
  like = {
    "state": state,
    "overwritten": [(lost,) * step["writes"] for step in steps],
    "finite": [np.bool_(True)] * len(steps),
    "latents": [np.zeros((1, n, y, x, c), np.float32)] * len(record["latents"]),
  }
  if record["picture"]:
    like["picture"] = np.zeros(record["picture"], np.uint8)
  tree = store.load(path, like)
  script = _script(record["script"])
  return Session(
    state=jax.device_put(tree["state"], jax.local_devices()[0]),
    script=dataclasses.replace(script, picture=tree.get("picture")),
    settled=_script(record["settled"]),
    made=tuple(Made(**each) for each in record["made"]),
    past=History(
      tuple(
        Step(step["chunk"], _script(step["script"]), overwritten, finite)
        for step, overwritten, finite in zip(
          steps, tree["overwritten"], tree["finite"], strict=True
        )
      ),
      tuple(map(Latents, record["latents"], tree["latents"])),
    ),
    seed=record["seed"],
    paused=record["paused"],
  )


def _record(path: str | Path) -> dict[str, Any]:
  record = store.load_metadata(path)
  if "session" not in record:
    raise ValueError(f"session={path} holds something else")
  return record


def _settings(engine: Engine) -> dict[str, Any]:
  """What must not change between saving and loading, as JSON reads it."""
  settings = {
    **dataclasses.asdict(engine.sampling),
    "height": engine.height,
    "width": engine.width,
    "dtype": str(engine.model.dtype),
    "model": dataclasses.asdict(engine.model.config),
    "vae_precision": vae_fp8.precision_of(engine.video_vae),
  }
  return json.loads(json.dumps(settings))  # which has lists where there were tuples


def _script_record(script: Script) -> dict[str, Any]:
  record = dataclasses.asdict(dataclasses.replace(script, picture=None))
  return record | {"switch": script.switch and str(script.switch)}


def _script(record: Mapping[str, Any]) -> Script:
  blend = record["blend"]
  if blend is not None:
    blend = Blend(**{**blend, "source": _mix(blend["source"])})
  switch = record["switch"]
  return Script(
    **{
      **record,
      "mix": _mix(record["mix"]),
      "blend": blend,
      "switch": switch and recache.parse(switch),
    }
  )


def _mix(record: list[list[Any]]) -> Mix:
  return tuple((text, weight) for text, weight in record)
