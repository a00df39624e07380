"""Serves interactive videos: a page to steer them, a WebSocket to do it from programs.

  python launch/serve.py                      then open http://127.0.0.1:8000

Needs the extra `serve`: pip install -e '.[serve]'. Networks and settings are those of
launch/generate.py, but on one device, and nothing is planned (`plan` is not read):

  ... --config configs/generate.py:ti2v-5b --config.weights=DIR --config.steps=4
  ... --host 0.0.0.0 --token_file token.txt   others may connect; they need the token
  ... --folder DIR                            sessions are kept there, and come back

SIGTERM and Ctrl-C save every session. After a crash, sessions go on from their last
save (--save_every). longlive_jax/serve/app.py lists what the server answers.
"""

import os
import sys
from pathlib import Path

import jax
import uvicorn
from absl import app, flags
from ml_collections import config_flags

from longlive_jax.generate.engine import Engine, load_engine
from longlive_jax.generate.scheduler import Life, Scheduler
from longlive_jax.programs import keep_programs
from longlive_jax.serve import logs
from longlive_jax.serve.app import build
from longlive_jax.serve.limits import LOOPBACK, Access, Limits
from longlive_jax.serve.shelf import Shelf
from longlive_jax.serve.studio import Studio

# Flags belong to the process only when this file is the program: tests import several.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  str(Path(__file__).parents[1] / "configs" / "generate.py") + ":toy",
  "Settings; override with --config.NAME=VALUE.",
  flag_values=_FLAGS,
)

GRACE = 10  # seconds that connections have to end
MEMORY_USED = 0.6  # of what is free, by sessions


def define_flags() -> None:
  flags.DEFINE_string("host", "127.0.0.1", "Address to bind to.")
  flags.DEFINE_integer("port", 8000, "Port.")
  flags.DEFINE_string("token_file", None, "File with the token that all must have.")
  flags.DEFINE_list("origins", [], "Other pages that may connect, as https://a.org.")
  flags.DEFINE_string("folder", "outputs/serve", "Where sessions are kept.")
  flags.DEFINE_integer("save_every", 8, "Also save every so many chunks.")
  flags.DEFINE_integer("history_chunks", 8, "Chunks that can be rewound.")
  flags.DEFINE_integer("ahead", 2, "Chunks made ahead of what is played.")
  flags.DEFINE_integer("sessions", Limits.sessions, "Most sessions.")
  flags.DEFINE_integer("connections", Limits.connections, "Most connections.")
  flags.DEFINE_integer("chunks", Limits.chunks, "Most chunks of a video.")
  flags.DEFINE_float("messages", Limits.messages_a_second, "A second, a connection.")
  flags.DEFINE_float("disk_gb", Limits.disk_bytes / 1e9, "Beyond it nothing is kept.")
  flags.DEFINE_float("device_gb", 0, "Device memory for sessions; 0: most of it.")
  flags.DEFINE_float("host_gb", 0, "Host memory for sessions; 0: most of it.")


def make_scheduler(
  engine: Engine,
  ahead: int,
  device_gb: float = 0,
  host_gb: float = 0,
  life: Life | None = None,
) -> Scheduler:
  """With the memory that is given, or a part of what is free."""
  free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  stats = jax.local_devices()[0].memory_stats()
  device = stats["bytes_limit"] - stats["bytes_in_use"] if stats else free / 2
  return Scheduler(
    engine,
    device_bytes=device_gb * 1e9 or MEMORY_USED * device,
    host_bytes=host_gb * 1e9 or MEMORY_USED * (free if stats else free / 2),
    ahead=ahead,
    life=life,
  )


def make_server(studio: Studio, access: Access, port: int) -> uvicorn.Server:
  """uvicorn, which starts and stops the studio, and ends in order on a signal."""
  return uvicorn.Server(
    uvicorn.Config(
      build(studio, access),
      host=access.host,
      port=port,
      ws="websockets-sansio",
      ws_max_size=studio.limits.message_bytes,
      access_log=False,
      log_config=None,
      timeout_graceful_shutdown=GRACE,
    )
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  given, config = flags.FLAGS, _CONFIG.value
  logs.to_stderr()
  try:
    token = given.token_file and Path(given.token_file).read_text().strip()
    access = Access(given.host, token, tuple(given.origins))
    limits = Limits(
      sessions=given.sessions,
      connections=given.connections,
      messages_a_second=given.messages,
      chunks=given.chunks,
      disk_bytes=given.disk_gb * 1e9,
    )
    shelf = Shelf(Path(given.folder), limits.disk_bytes)
    keep_programs(config.programs_dir)
    engine = load_engine(config, history_chunks=given.history_chunks)
    scheduler = make_scheduler(engine, given.ahead, given.device_gb, given.host_gb)
    studio = Studio(engine, scheduler, shelf, limits, save_every=given.save_every)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  shown = given.host if given.host in LOOPBACK else "HOST"
  logs.event(
    "serving",
    page=f"http://{shown}:{given.port}/" + ("#token=TOKEN" if token else ""),
    sessions=min(limits.sessions, scheduler.capacity.in_all),
    at_once=scheduler.capacity.on_device,
  )
  make_server(studio, access, given.port).run()


if __name__ == "__main__":
  define_flags()
  app.run(main)
