"""Logs as lines of JSON: for machines, and still readable."""

import datetime
import json
import logging
from typing import Any

log = logging.getLogger("longlive_jax.serve")


def event(name: str, level: int = logging.INFO, **fields: Any) -> None:
  """Logs that something happened; a prompt never reaches the log."""
  log.log(level, name, extra={"fields": fields})


class Lines(logging.Formatter):
  """{"time": ..., "level": ..., "event": ..., fields} in one line of ASCII."""

  def format(self, record: logging.LogRecord) -> str:
    time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    line = {
      "time": time.isoformat(timespec="milliseconds"),
      "level": record.levelname.lower(),
      "event": record.getMessage(),
      **getattr(record, "fields", {}),
    }
    if record.exc_info:
      line["traceback"] = self.formatException(record.exc_info)
    return json.dumps(line, default=str)


def to_stderr() -> None:
  """All loggers of the process, in lines of JSON."""
  handler = logging.StreamHandler()
  handler.setFormatter(Lines())
  logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
  log.setLevel(logging.INFO)
