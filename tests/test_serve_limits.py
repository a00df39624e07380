"""Who is let in, what is read, and how slow watchers are let go; fuzzed."""

import asyncio
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.generate.commands import Pause
from longlive_jax.serve import messages
from longlive_jax.serve.limits import Access, Bucket, Limits, check_session, new_session
from longlive_jax.serve.logs import Lines
from longlive_jax.serve.messages import Create, End, Request, Watch
from longlive_jax.serve.shelf import Shelf
from longlive_jax.serve.watchers import Item, Watcher

TOKEN = "0123456789abcdef"
LOCAL = {"host": "127.0.0.1:8000"}


# ------------------------------------------------------------------ access
def test_without_a_token_only_loopback_is_served():
  with pytest.raises(ValueError, match=r"host='0\.0\.0\.0' can be reached by others"):
    Access("0.0.0.0")
  with pytest.raises(ValueError, match="16 to 200 characters"):
    Access("0.0.0.0", "short")
  assert Access("0.0.0.0", TOKEN).refusal({"host": "example.org"}) != ""


def test_another_name_for_this_machine_is_refused_without_a_token():
  access = Access("127.0.0.1")
  for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000", "localhost"):
    assert access.refusal({"host": host}) == ""
  for host in ("evil.example:8000", "127.0.0.1.evil.example", "", "[::1", "@"):
    assert "only localhost" in access.refusal({"host": host})


@pytest.mark.parametrize(
  ("origin", "fine"),
  [
    ("http://127.0.0.1:8000", True),
    ("https://friend.example", True),
    ("http://evil.example", False),
    ("http://127.0.0.1:9000", False),
    ("null", False),
  ],
)
def test_a_page_of_another_origin_opens_no_websocket(origin, fine):
  access = Access("127.0.0.1", None, ("https://friend.example",))
  headers = {**LOCAL, "origin": origin}
  assert (access.refusal(headers, socket=True) == "") == fine
  assert access.refusal(headers) == ""  # the browser keeps the answer from the page


@given(st.text(max_size=40))
def test_no_other_token_is_let_in(given):
  access = Access("127.0.0.1", TOKEN)
  headers = {**LOCAL, "authorization": f"Bearer {given}"}
  assert (access.refusal(headers) == "") == (given == TOKEN)
  headers = {**LOCAL, "sec-websocket-protocol": f"longlive, bearer.{given}"}
  if "," not in given:
    assert (access.refusal(headers, socket=True) == "") == (given.strip() == TOKEN)
  assert access.refusal(headers) != ""  # only a WebSocket has it there


# ------------------------------------------------------------------ numbers
def test_a_bucket_gives_a_burst_and_then_the_rate():
  now = [0.0]
  bucket = Bucket(rate=2, burst=3, clock=lambda: now[0])
  assert [bucket.take() for _ in range(5)] == [True, True, True, False, False]
  now[0] = 1.0
  assert [bucket.take() for _ in range(3)] == [True, True, False]
  now[0] = 100.0
  assert sum(bucket.take() for _ in range(10)) == 3


@pytest.mark.parametrize("field", ["sessions", "queue", "chunks", "messages_a_second"])
def test_limits_below_one_are_refused(field):
  with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
    Limits(**{field: 0})


# ------------------------------------------------------------------ messages
def test_messages_are_read():
  session = new_session()
  for text, want in (
    ('{"kind": "create", "text": "A star.", "seed": 5}', Create("A star.", 5)),
    (f'{{"kind": "watch", "session": "{session}"}}', Watch(session)),
    ('{"kind": "end"}', End()),
    ('{"kind": "pause"}', Pause()),
  ):
    assert messages.read(text) == Request(None, want)
  assert messages.read('{"kind": "pause", "request": 3}') == Request(3, Pause())


@pytest.mark.parametrize(
  ("message", "why"),
  [
    ({"kind": "create"}, "needs the field 'text'"),
    ({"kind": "create", "text": "a", "seed": -1}, "seed must be"),
    ({"kind": "create", "text": "a", "seed": True}, "seed must be"),
    ({"kind": "create", "text": "a", "x" * 99: 1}, "has no field"),
    ({"kind": "watch", "session": "0123456789aB"}, "12 hexadecimal digits"),
    ({"kind": "watch", "session": ["0123456789ab"]}, "12 hexadecimal digits"),
    ({"kind": "end", "session": "0123456789ab"}, "has no field"),
    ({"kind": "pause", "request": -1}, "request must be"),
    ({"kind": "pause", "request": "1"}, "request must be"),
    ({"kind": {}}, "unknown"),
  ],
)
def test_messages_that_cannot_be_say_why(message, why):
  request = messages.read(json.dumps(message))
  assert request.message is None and why in request.error


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=8,
)
KINDS = st.sampled_from(
  ["create", "watch", "end", "prompt", "cut", "image", "rewind", "branch", "save"]
)
FIELDS = st.sampled_from(["text", "seed", "session", "chunk", "recache", "image"])
MESSAGES = st.builds(
  lambda kind, fields: {**fields, "kind": kind},
  KINDS,
  st.dictionaries(FIELDS, JSON, max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(st.text() | JSON.map(json.dumps) | MESSAGES.map(json.dumps))
def test_whatever_is_sent_is_read_or_refused_in_one_line(text):
  request = messages.read(text)
  assert (request.message is None) == bool(request.error)
  assert len(request.error) < 500 and request.error.isprintable()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.sampled_from(["..", "../a", "a/../b", "/etc", "\0"]))
def test_no_name_leads_out_of_the_folder(tmp_path_factory, name):
  shelf = Shelf(tmp_path_factory.getbasetemp() / "shelf", 1e9)
  with pytest.raises(ValueError):
    shelf.chunk(name, "000000-00000000.mp4")
  with pytest.raises(ValueError):
    shelf.chunk(new_session(), name)
  with pytest.raises(ValueError):
    shelf.drop(name)
  with pytest.raises(ValueError):
    check_session(name)


# ------------------------------------------------------------------ watchers, logs
def test_a_full_queue_refuses_until_it_starts_again():
  async def main():
    watcher = Watcher(asyncio.get_running_loop(), most=3)
    items = [Item(str(i)) for i in range(4)]
    assert [watcher.put(item) for item in items] == [True, True, True, False]
    assert watcher.restart(Item("state"), items[3]) == 3
    assert [await watcher.get() for _ in range(2)] == [Item("state"), items[3]]
    late = asyncio.create_task(watcher.get())
    await asyncio.sleep(0)
    assert not late.done()
    await asyncio.to_thread(watcher.put, items[0])  # from another thread
    assert await asyncio.wait_for(late, 5) == items[0]

  asyncio.run(main())


def test_a_log_line_is_one_line_of_json_whatever_is_in_it():
  record = logging.LogRecord("n", logging.ERROR, "f", 1, "failed", None, None)
  record.fields = {"error": "a\nb\u202e\x1b[31m", "session": "0123456789ab"}
  line = Lines().format(record)
  assert line.isascii() and line.isprintable()
  assert json.loads(line)["error"] == "a\nb\u202e\x1b[31m"


def test_a_full_shelf_takes_chunks_again_when_something_went(tmp_path):
  shelf = Shelf(tmp_path, 100)
  first, other = new_session(), new_session()
  name = shelf.keep_chunk(first, 0, b"a" * 80)
  with pytest.raises(OSError, match="MB do not fit"):
    shelf.keep_chunk(other, 0, b"b" * 80)
  assert shelf.chunk(first, name) == b"a" * 80
  shelf.drop(first)
  name = shelf.keep_chunk(other, 0, b"b" * 80)
  assert shelf.chunk(other, name) == b"b" * 80
