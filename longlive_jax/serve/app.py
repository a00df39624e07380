"""The web server: one WebSocket to create, command and watch; HTTP for files.

  GET /                            the page
  GET /health                      {"status": "ok"}; 503 while it starts or stops
  GET /metrics                     Prometheus
  GET /sessions, /sessions/ID      what there is, as JSON
  GET /sessions/ID/video.mp4       the video so far
  GET /sessions/ID/shots.png       the storyboard: a row of frames a shot
  GET /sessions/ID/state.tar       the newest saved state
  GET /sessions/ID/chunks/FILE     one chunk, as the state lists it
  WS  /socket                      messages.py; answers, events are JSON, media binary

Of a message's answer: {"event": "done", "request": N, ...} or {"event": "error",
"request": N, "message": "..."}. All but the page and /health need the token.
"""

import asyncio
import contextlib
import logging
import os
import tarfile
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import (
  FileResponse,
  JSONResponse,
  PlainTextResponse,
  Response,
)
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from longlive_jax.data.video import read_video
from longlive_jax.generate.report import ContactSheet
from longlive_jax.serve import messages, mp4
from longlive_jax.serve.limits import PROTOCOL, Access, Bucket, check_session
from longlive_jax.serve.logs import event
from longlive_jax.serve.record import Record
from longlive_jax.serve.studio import Studio
from longlive_jax.serve.watchers import Watcher

PAGE = Path(__file__).parent / "page"
FILES = {
  "/": "index.html",
  **{f"/{name}": name for name in ("style.css", "screen.js", "player.js", "app.js")},
}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
  "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
  "connect-src 'self'; img-src 'self' blob: data:; media-src blob:; base-uri 'none'; "
  "form-action 'none'; frame-ancestors 'none'",
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
  "cache-control": "no-store",
}
SHEET_COLUMNS = 4
DOWNLOADS = 2  # made at a time
LONG = 2**16  # characters

Endpoint = Callable[[Request], Awaitable[Response]]


def build(studio: Studio, access: Access) -> Starlette:
  """The application; it starts and stops the studio."""
  server = _Server(studio, access)
  get = server.with_token
  return Starlette(
    routes=[
      *(Route(path, _page_file(file)) for path, file in FILES.items()),
      Route("/health", server.health),
      Route("/metrics", get(server.metrics)),
      Route("/sessions", get(server.sessions)),
      Route("/sessions/{session}", get(server.session)),
      Route("/sessions/{session}/video.mp4", get(server.video)),
      Route("/sessions/{session}/shots.png", get(server.shots)),
      Route("/sessions/{session}/state.tar", get(server.state)),
      Route("/sessions/{session}/chunks/{chunk}", get(server.chunk)),
      WebSocketRoute("/socket", server.socket),
    ],
    middleware=[Middleware(_Headers)],
    lifespan=server.lifespan,
  )


class _Headers:
  """Sends HEADERS with every response."""

  def __init__(self, app: ASGIApp):
    self._app = app

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def send_more(message: Message) -> None:
      if message["type"] == "http.response.start":
        more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        message["headers"] = [*message["headers"], *more]
      await send(message)

    await self._app(scope, receive, send_more)


class _Temporary(FileResponse):
  """Deletes its file in the end, also when a bad range is asked for or nobody reads."""

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      os.unlink(self.path)


def _page_file(name: str) -> Endpoint:
  path = PAGE / name

  async def endpoint(request: Request) -> Response:
    return FileResponse(path, media_type=TYPES[path.suffix])

  return endpoint


class _Server:
  """The endpoints."""

  def __init__(self, studio: Studio, access: Access):
    self._studio, self._access, self._connections = studio, access, 0
    self._downloads = asyncio.Semaphore(DOWNLOADS)

  @contextlib.asynccontextmanager
  async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
    self._studio.start()
    yield
    await run_in_threadpool(self._studio.stop)

  # ---------------------------------------------------------------- HTTP
  def with_token(self, endpoint: Endpoint) -> Endpoint:
    async def checked(request: Request) -> Response:
      if why := self._refusal(request):
        return JSONResponse({"error": why}, 401, {"www-authenticate": "Bearer"})
      return await endpoint(request)

    return checked

  async def health(self, request: Request) -> Response:
    status = self._studio.status
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)

  async def metrics(self, request: Request) -> Response:
    text = self._studio.metrics.render(self._studio.gauges())
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

  async def sessions(self, request: Request) -> Response:
    records = dict(self._studio.records)
    return JSONResponse({name: each.status() for name, each in records.items()})

  async def session(self, request: Request) -> Response:
    async def answer(name: str, record: Record) -> Response:
      return JSONResponse(record.status())

    return await self._of_session(request, answer)

  async def chunk(self, request: Request) -> Response:
    async def answer(name: str, record: Record) -> Response:
      file = request.path_params["chunk"]
      media = await run_in_threadpool(self._studio.shelf.chunk, name, file)
      return Response(media, media_type="video/mp4")

    return await self._of_session(request, answer)

  async def video(self, request: Request) -> Response:
    def make(name: str, record: Record, path: Path) -> None:
      _some(record)
      mp4.plain(self._studio.shelf.chunks(name, record), path)

    return await self._download(request, make, "video/mp4", "mp4")

  async def shots(self, request: Request) -> Response:
    def make(name: str, record: Record, path: Path) -> None:
      _some(record)
      sheet = ContactSheet(SHEET_COLUMNS)
      for chunk in _pictured(record):
        media = path.with_suffix(".chunk")
        try:
          media.write_bytes(self._studio.shelf.chunk(name, chunk.media))
          sheet.add(0, chunk.made.shot, read_video(media)[0])
        finally:
          media.unlink(missing_ok=True)
      sheet.save(path)

    return await self._download(request, make, "image/png", "png")

  async def state(self, request: Request) -> Response:
    def make(name: str, record: Record, path: Path) -> None:
      states = self._studio.shelf.states(name)
      if not states:
        raise ValueError("nothing was saved yet; send a save")
      chunks = self._studio.shelf.saved_chunks(states[-1])  # `record` may be older
      with tarfile.open(path, "w") as tar:
        tar.add(states[-1], arcname=f"{name}-{chunks}")

    return await self._download(request, make, "application/x-tar", "tar")

  async def _download(
    self,
    request: Request,
    make: Callable[[str, Record, Path], None],
    kind: str,
    suffix: str,
  ) -> Response:
    """A file that is made when it is asked for, and deleted when it was sent."""

    async def answer(name: str, record: Record) -> Response:
      handle, path = tempfile.mkstemp(suffix="." + suffix)
      os.close(handle)
      try:
        async with self._downloads:
          await run_in_threadpool(make, name, record, Path(path))
      except BaseException:
        os.unlink(path)
        raise
      return _Temporary(path, media_type=kind, filename=f"{name}.{suffix}")

    return await self._of_session(request, answer)

  async def _of_session(
    self, request: Request, answer: Callable[[str, Record], Awaitable[Response]]
  ) -> Response:
    try:
      name = check_session(request.path_params["session"])
      return await answer(name, self._studio.record(name))
    except (ValueError, OSError) as error:
      missing = isinstance(error, ValueError | FileNotFoundError)
      message = str(error) if isinstance(error, ValueError) else "the file is gone"
      if not missing:
        event("download_failed", logging.ERROR, error=str(error))
        message = "the file could not be made"
      return JSONResponse({"error": message}, 404 if missing else 500)

  def _refusal(self, connection: HTTPConnection, *, socket: bool = False) -> str:
    why = self._access.refusal(connection.headers, socket=socket)
    if why:
      self._studio.metrics.count("refused")
      client = connection.client.host if connection.client else ""
      event("refused", logging.WARNING, client=client, why=why)
    return why

  # ---------------------------------------------------------------- WebSocket
  async def socket(self, websocket: WebSocket) -> None:
    why = self._refusal(websocket, socket=True)
    if not why and self._connections >= self._studio.limits.connections:
      why = "there are too many connections"
    if why:  # before it is accepted: the client sees HTTP 403
      await websocket.close(1008, why)
      return
    offered = websocket.headers.get("sec-websocket-protocol", "")
    mine = PROTOCOL in [each.strip() for each in offered.split(",")]
    await websocket.accept(PROTOCOL if mine else None)
    self._connections += 1
    try:
      await _Connection(self._studio, websocket).run()
    finally:
      self._connections -= 1


class _Connection:
  """One client: reads its messages, and sends it what it watches."""

  def __init__(self, studio: Studio, websocket: WebSocket):
    self._studio, self._websocket = studio, websocket
    self._watcher = Watcher(asyncio.get_running_loop(), studio.limits.queue)
    self._watched = ""
    self._sending = asyncio.Lock()  # an event and its media are not torn apart

  async def run(self) -> None:
    """Until the client leaves, is thrown out, or the server stops."""
    sender = asyncio.create_task(self._send_items())
    try:
      await self._read()
    except (WebSocketDisconnect, RuntimeError, OSError):
      pass  # gone, at any moment
    finally:
      sender.cancel()
      with contextlib.suppress(asyncio.CancelledError, Exception):
        await sender
      self._leave()

  async def _send_items(self) -> None:
    while True:
      item = await self._watcher.get()
      async with self._sending:
        await self._websocket.send_text(item.text)
        if item.media:
          await self._websocket.send_bytes(item.media)

  async def _read(self) -> None:
    limits = self._studio.limits
    bucket, refused = Bucket(limits.messages_a_second, limits.burst), 0
    while True:
      received = await self._websocket.receive()
      if received["type"] != "websocket.receive":
        return
      if not bucket.take():
        refused += 1
        self._studio.metrics.count("refused")
        if refused >= limits.refusals:
          await self._websocket.close(1008, "too many messages")
          return
        await self._answer(
          {
            "event": "error",
            "message": f"too many messages; send at most {limits.messages_a_second:g} "
            "a second",
          }
        )
        continue
      text = received.get("text") or ""
      if len(text) > LONG:  # a picture, which takes a while to unpack
        request = await run_in_threadpool(messages.read, text)
      else:
        request = messages.read(text)
      answer: dict[str, Any] = {"event": "done"}
      try:
        if request.message is None:
          raise ValueError(request.error)
        answer |= await self._do(request.message)
      except (ValueError, OSError) as error:
        answer = {"event": "error", "message": str(error)}
      except Exception as error:
        event("command_failed", logging.ERROR, error=repr(error))
        answer = {"event": "error", "message": "it failed; the server's log says why"}
      if answer["event"] == "error":
        self._studio.metrics.count("refused")
      if request.number is not None:
        answer["request"] = request.number
      await self._answer(answer)

  async def _do(self, message: messages.Message) -> dict[str, Any]:
    match message:
      case messages.Create(text, seed):
        name = await self._submit(self._studio.create, text, seed)
        await self._watch(name)
        return {"session": name}
      case messages.Watch(session):
        await self._watch(session)
        return {"session": session}
    if not self._watched:
      raise ValueError("create or watch a session first")
    if isinstance(message, messages.End):
      await self._submit(self._studio.end, self._watched)
      return {}
    result = await self._submit(self._studio.command, self._watched, message)
    if isinstance(result, Future):
      return {"saved": await asyncio.wrap_future(result)}
    return {} if result is None else {"session": result}

  async def _watch(self, session: str) -> None:
    self._studio.record(session)  # before what was watched is left
    self._leave()
    self._watcher.restart()
    await self._submit(self._studio.watch, session, self._watcher)
    self._watched = session

  def _leave(self) -> None:
    if self._watched:
      watched, watcher = self._watched, self._watcher
      self._studio.submit(lambda: self._studio.leave(watched, watcher))
      self._watched = ""

  async def _submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.wrap_future(self._studio.submit(lambda: work(*arguments)))

  async def _answer(self, answer: dict[str, Any]) -> None:
    async with self._sending:
      await self._websocket.send_json(answer)


def _some(record: Record) -> None:
  if not any(chunk.media for chunk in record.chunks):
    raise ValueError("no chunk is made yet")


def _pictured(record: Record) -> list[Any]:
  """Chunks for the storyboard: a few of each shot, evenly spaced."""
  shots: dict[int, list[Any]] = {}
  for chunk in record.chunks:
    if chunk.media:
      shots.setdefault(chunk.made.shot, []).append(chunk)
  picked = []
  for row in shots.values():
    count = min(SHEET_COLUMNS, len(row))
    picked += [row[i] for i in np.linspace(0, len(row) - 1, count).astype(int)]
  return picked
