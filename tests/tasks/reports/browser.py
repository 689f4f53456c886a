"""Looking at a page with a headless Chromium, if this machine has one."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
SECONDS = 900  # a machine may be busy
PHONE, DESK = 360, 1440
REPOSITORY = Path(__file__).parents[3]
SCREENSHOTS = REPOSITORY / ".pytest_cache" / "screenshots"


# A frame as wide as the screen; what the page in it measures becomes the title.
SCREEN = """<!doctype html><meta charset="utf-8"><title>not measured</title>
<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const root = page.documentElement;
  const boxes = [...page.querySelectorAll(".wide")];
  document.title = JSON.stringify({{
    screen: root.clientWidth,
    page: root.scrollWidth,
    scrolling: boxes.filter((box) => box.scrollWidth > box.clientWidth).length,
    paper: page.defaultView.getComputedStyle(page.body).backgroundColor,
    broken: [...page.images].filter((image) => !image.naturalWidth).length,
  }});
}});
</script>
"""


def look(page: str, folder: Path, width: int, *options: str) -> tuple[dict, str]:
    """What a page measures on a screen, and what the browser's console said."""
    file = folder / "screen.html"
    file.write_text(SCREEN.format(width=width, page=escape(page)))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={DESK},900",
            "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", *options,
            file.as_uri(),
        ],
        capture_output=True, text=True, timeout=SECONDS, check=True,
    )  # fmt: skip
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)[:1]
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return json.loads(unescape(title)), console


def fits(report: Path, folder: Path) -> None:
    """A page fits a phone and a desk, loads all its pictures, and says nothing in the console.

    Its screenshots stay in `.pytest_cache/screenshots/`, named after its recipe.
    """
    page = report.read_text()
    for width in (PHONE, DESK):
        measured, console = look(page, folder, width)
        assert console == ""
        assert measured["broken"] == 0
        assert measured["page"] <= measured["screen"] <= width
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        picture = SCREENSHOTS / f"{report.parent.name}_{width}.png"
        picture.unlink(missing_ok=True)
        look(page, folder, width, f"--screenshot={picture}")
        assert picture.stat().st_size > 10_000
