"""A page in headless Chromium: what it writes to the console, and what it looks like."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROBE = """
<script>
addEventListener("load", () => {
  const figures = [...document.querySelectorAll("figure")].map(figure => {
    const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
    const marks = [...svg.querySelectorAll("path, use, rect")].filter(mark => {
      const size = mark.getBoundingClientRect();
      return size.width + size.height > 1 && !mark.closest("defs, clipPath");
    });
    const words = [...svg.querySelectorAll("text")].map(text => text.textContent.trim());
    return {id: figure.id, width: box.width, height: box.height, marks: marks.length, words};
  });
  const page = {figures, wide: document.documentElement.scrollWidth > innerWidth, ids: [...document.
    querySelectorAll("[id]")].length, colour: getComputedStyle(document.body).backgroundColor};
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(page);
  document.body.append(out);
});
</script>
"""


def browser() -> str:
    """Chromium's path; without one the test is skipped, loudly."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        warnings.warn("NO BROWSER: the report was not tested in one (apt-get install chromium)", stacklevel=2)
        pytest.skip("no chromium on PATH: the report is NOT tested in a browser")
    return found


def opened(page: Path, *, width: int = 1200, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    """What a script finds in a copy of the page, and what the console said."""
    probed = page.with_name(f"{page.stem}.probed.html")
    probed.write_text(
        page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8"
    )
    outcome = _run(["--dump-dom"], probed, width, dark)
    found = re.search(r'<pre id="probe">(.*?)</pre>', outcome.stdout, re.DOTALL)
    assert found, outcome.stderr[-2000:]
    said = [line for line in outcome.stderr.splitlines() if ":CONSOLE" in line or "CONSOLE(" in line]
    values: dict[str, Any] = json.loads(html.unescape(found[1]))
    return values, said


def screenshot(page: Path, picture: Path, *, width: int = 1200, dark: bool = False) -> None:
    """A PNG of the page."""
    _run([f"--screenshot={picture}"], page, width, dark)


def _run(what: list[str], page: Path, width: int, dark: bool) -> subprocess.CompletedProcess[str]:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    options += [f"--window-size={width},2400", f"--user-data-dir={page.parent / 'profile'}"]
    options += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    line = [browser(), *options, *what, page.resolve().as_uri()]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
