"""What the server allows, and to whom."""

import dataclasses
import hmac
import re
import secrets
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,200}")  # it travels in headers as it is
_SESSION = re.compile(r"[0-9a-f]{12}")
PROTOCOL = "longlive"  # of the WebSocket; a browser sends its token beside it
_BEARER = "bearer."


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much anyone may ask for.

  Attributes:
    sessions: at a time; the scheduler's memory may allow fewer.
    connections: WebSockets at a time.
    message_bytes: of one message; a picture in base64 must fit.
    messages_a_second, burst: of one connection.
    refusals: messages over the rate after which a connection is closed.
    chunks: of one video; it then pauses.
    queue: events that wait for a slow watcher before older ones are dropped.
    disk_bytes: of videos and states; beyond it chunks are shown but not kept, and no
      states are saved.
  """

  sessions: int = 16
  connections: int = 64
  message_bytes: int = 12 * 2**20
  messages_a_second: float = 10.0
  burst: int = 20
  refusals: int = 100
  chunks: int = 5000
  queue: int = 16
  disk_bytes: float = 50e9

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not value >= 1:
        raise ValueError(f"{field.name}={value} must be at least 1")


class Bucket:
  """A token bucket: `burst` messages at once, then `rate` a second."""

  def __init__(
    self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic
  ):
    self._rate, self._burst, self._clock = rate, burst, clock
    self._left, self._then = float(burst), clock()

  def take(self) -> bool:
    """Whether one more is allowed now."""
    now = self._clock()
    self._left = min(self._burst, self._left + (now - self._then) * self._rate)
    self._then = now
    if self._left < 1:
      return False
    self._left -= 1
    return True


@dataclasses.dataclass(frozen=True)
class Access:
  """Who may ask.

  Attributes:
    host: that the server is bound to.
    token: everyone must have; None is allowed on loopback only.
    origins: of pages, as https://example.org, that may open a WebSocket beside the
      server's own.

  Raises:
    ValueError: no token where others can connect; a token that is short or cannot be
      sent.
  """

  host: str
  token: str | None = None
  origins: tuple[str, ...] = ()

  def __post_init__(self):
    if self.token is None and self.host not in LOOPBACK:
      raise ValueError(
        f"host={self.host!r} can be reached by others: give a token of 16 characters "
        "or more, or bind to 127.0.0.1"
      )
    if self.token is not None and not _TOKEN.fullmatch(self.token):
      raise ValueError(
        "the token must have 16 to 200 characters of A-Z a-z 0-9 . _ ~ -; "
        "`openssl rand -hex 16` makes one"
      )

  def refusal(self, headers: Mapping[str, str], *, socket: bool = False) -> str:
    """Why a request is refused, or ''.

    Args:
      headers: with names in lower case.
      socket: it opens a WebSocket, which a browser lets any page do.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    if self.token is None and _name(host) not in LOOPBACK:
      # Another name for 127.0.0.1 (DNS rebinding): a stranger's page is behind it.
      return "without a token, only localhost is answered"
    if socket and origin is not None:
      own = {f"http://{host}", f"https://{host}"}
      if origin not in own and origin not in self.origins:
        return "the page that opens this WebSocket is not one of this server's"
    if self.token is None:
      return ""
    given = [headers.get("authorization", "").removeprefix("Bearer ")]
    if socket:
      offered = headers.get("sec-websocket-protocol", "").split(",")
      given += [
        each.strip().removeprefix(_BEARER)
        for each in offered
        if each.strip().startswith(_BEARER)
      ]
    # Compared in a time that does not tell how much of it is right.
    wanted = self.token.encode()
    right = [hmac.compare_digest(each.encode(), wanted) for each in given]
    return "" if any(right) else "the token is missing or wrong"


def new_session() -> str:
  return secrets.token_hex(6)


def check_session(name: object) -> str:
  """The id itself; raises ValueError for anything that this server never made."""
  if not isinstance(name, str) or not _SESSION.fullmatch(name):
    raise ValueError("session must be an id of 12 hexadecimal digits")
  return name


def _name(host: str) -> str:
  try:
    return urlsplit(f"//{host}").hostname or ""
  except ValueError:
    return ""
