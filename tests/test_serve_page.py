"""The page in a real Chromium, which Debian packages; without one this is skipped."""

import json
import shutil

import pytest
from playwright.sync_api import Page, sync_playwright
from serving import BLUE, GREEN, RED, get, make_studio, running, tiny_engine, until

CHROMIUM = shutil.which("chromium")
pytestmark = [
  pytest.mark.usefixtures("quick_compiling"),
  pytest.mark.skipif(not CHROMIUM, reason="needs chromium (apt install chromium)"),
]
RING = "A white ring."
ARGUMENTS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
]
# Sums of a few rows of what a player shows at this moment.
PIXELS = """(number) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 16;
  const pen = canvas.getContext("2d");
  pen.drawImage(players[number].video, 0, 0, 16, 16);
  const data = pen.getImageData(0, 0, 16, 16).data;
  return Array.from({length: 8}, (_, row) =>
    data.slice(row * 128, row * 128 + 128).reduce((a, b) => a + b, 0)).join();
}"""


def test_a_video_is_typed_watched_and_steered(tmp_path):
  studio = make_studio(tiny_engine(fps=16.0), tmp_path)
  with running(studio) as host, sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: m.type == "error" and errors.append(m.text))
    page.goto(f"http://{host}/")

    # Type, and watch frames change.
    page.fill("#text", RED)
    page.press("#text", "Enter")
    shows(page, "p.video.currentTime > 0.3")
    frames_change(page)
    assert "s" in page.inner_text(".first")
    session = page.evaluate("players[0].session")

    # Another prompt, a cut.
    page.fill("#text", BLUE)
    page.click("#change")
    shows(page, "p.chunks.at(-1).made.prompt === 'A blue star.'")
    page.fill("#text", GREEN)
    page.click("#cut")
    shows(page, "p.chunks.at(-1).made.shot === 1")
    shows(page, "p.root.querySelector('.timeline .told') !== null")
    shows(page, "p.root.querySelector('.timeline .cut.odd') !== null")
    frames_change(page)

    # Pause and resume, by the keyboard.
    page.locator(".player").focus()
    page.keyboard.press(" ")
    shows(page, "p.status.paused")
    length = studio.records[session].status()["length"]
    assert studio.records[session].paused
    page.keyboard.press(" ")
    shows(page, f"p.chunks.length > {length}")

    # Look back and rewind.
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    picked = page.evaluate("players[0].picked")
    page.keyboard.press("r")
    until(lambda: f"Back at chunk {picked}" in page.inner_text("#message"))
    shows(page, f"p.chunks.length > {picked} && !p.video.seeking")
    frames_change(page)

    # Branch, beside its parent, told something else.
    page.click("[data-do=branch]")
    branch = until(lambda: page.evaluate("players[1]?.session"))
    assert studio.records[branch].parent.startswith(session)
    page.fill("#text", RING)
    page.click("#cut")
    shows(page, "p.chunks.at(-1).made.prompt === 'A white ring.'", 1)
    shows(page, "p.video.currentTime > 0", 1)
    frames_change(page, 1)
    assert page.evaluate("players[0].status.prompt") != RING

    # Reload, and find both again.
    page.reload()
    until(lambda: page.evaluate("players.length") == 2)
    for number, name in enumerate((session, branch)):
      shows(page, "p.video.currentTime > 0", number)
      assert page.evaluate(f"players[{number}].session") == name
      frames_change(page, number)

    # Download, delete.
    with page.expect_download() as download:
      page.locator("[data-do='video.mp4']").first.click()
    assert download.value.suggested_filename == f"{session}-video.mp4"
    page.locator("[data-do=end]").last.click()
    page.locator("[data-do=end]").last.click()
    until(lambda: page.evaluate("players.length") == 1)
    assert list(json.loads(get(host, "/sessions")[1])) == [session]

    # A phone shows it without scrolling sideways.
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert errors == []
    browser.close()


def shows(page: Page, what: str, number: int = 0) -> None:
  """Waits until an expression of `p`, a player, is true."""
  until(lambda: page.evaluate(f"((p) => p && ({what}))(players[{number}])"))


def frames_change(page: Page, number: int = 0) -> None:
  """Waits for three different pictures."""
  seen: set[str] = set()

  def another() -> bool:
    seen.add(page.evaluate(PIXELS, number))
    return len(seen) >= 3

  until(another)
