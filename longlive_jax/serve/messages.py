"""What a client sends over its WebSocket: JSON, read as strictly as commands are.

  {"kind": "create", "text": "A red star.", "seed": 7}   and watch it
  {"kind": "watch", "session": "0123456789ab"}
  {"kind": "end"}                                        of the session watched
  {"kind": "prompt", "text": "..."}, "cut", "rewind" ... as generate/commands.py

Any may have "request": a number that the answer repeats.
"""

import dataclasses
import json
from typing import Any

from longlive_jax.generate import commands
from longlive_jax.generate.commands import Command
from longlive_jax.serve.limits import check_session


@dataclasses.dataclass(frozen=True)
class Create:
  text: str
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Watch:
  session: str


@dataclasses.dataclass(frozen=True)
class End:
  pass


Message = Create | Watch | End | Command


@dataclasses.dataclass(frozen=True)
class Request:
  """A message, or why it is none; `number` is what its answer repeats."""

  number: int | None
  message: Message | None = None
  error: str = ""


def read(text: str) -> Request:
  """Reads what a client sent, whatever it is; never raises."""
  try:
    data = json.loads(text, parse_constant=_no_constant)
  except (ValueError, RecursionError):
    return Request(None, error="a message must be JSON, and an object")
  if not isinstance(data, dict):
    return Request(None, error="a message must be JSON, and an object")
  number = data.pop("request", None)
  if number is not None and (type(number) is not int or not 0 <= number < 2**53):
    return Request(None, error="request must be a whole number")
  try:
    return Request(number, _message(data))
  except ValueError as error:
    return Request(number, error=str(error))


def _message(data: dict[str, Any]) -> Message:
  kind = data.get("kind")
  if kind == "create":
    _only(data, ("text", "seed"), ("text",))
    return Create(commands.check_prompt(data["text"]), _seed(data.get("seed", 0)))
  if kind == "watch":
    _only(data, ("session",), ("session",))
    return Watch(check_session(data["session"]))
  if kind == "end":
    _only(data, (), ())
    return End()
  return commands.parse(data)


def _only(
  data: dict[str, Any], fields: tuple[str, ...], needed: tuple[str, ...]
) -> None:
  for name in data:
    if name not in ("kind", *fields):
      raise ValueError(
        f"kind={data['kind']!r} has no field {name[:40]!a}; it has {list(fields)}"
      )
  for name in needed:
    if name not in data:
      raise ValueError(f"kind={data['kind']!r} needs the field {name!r}")


def _seed(value: Any) -> int:
  if type(value) is not int or not 0 <= value < 2**32:
    raise ValueError(f"seed must be a whole number from 0 to {2**32 - 1}")
  return value


def _no_constant(name: str) -> None:
  raise ValueError(f"{name} is no JSON")
