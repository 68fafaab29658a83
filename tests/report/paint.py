"""How large a page is and when a browser first paints it: ``python -m tests.report.paint`` on a machine without other work.

Wall-clock figures are no matter for a test. Prints, for 40 varied and for 1,000 records, bytes, and of five loads at
either width the milliseconds to the first paint and to the first chart.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from locallearn.report import _page, write_report
from tests.report.browser import BROWSER
from tests.report.varied import many, varied

# The clock goes by the page's own entries; what is printed comes out of the browser's log.
_PROBE = """
setTimeout(() => {
  const paint = performance.getEntriesByType("paint").map((entry) => entry.startTime);
  console.log("PROBE" + JSON.stringify({paint: Math.min(...paint), chart: window.firstChart || null}) + "END");
}, 6000);
new MutationObserver(() => {
  if (!window.firstChart && document.querySelector(".main-svg")) window.firstChart = performance.now();
}).observe(document, {childList: true, subtree: true});
"""


def load(page: Path, width: int) -> dict[str, float]:
    """One load of a page in a browser of its own."""
    assert BROWSER is not None, "neither chromium nor google-chrome is on the PATH"
    profile = tempfile.mkdtemp()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--remote-debugging-port=0"]
    command = [BROWSER, *options, f"--user-data-dir={profile}", f"--window-size={width},900", page.as_uri()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"PROBE(\{.*?\})END", line):
                return dict(json.loads(found.group(1)))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(profile, ignore_errors=True)
    raise AssertionError("the page said nothing")


def main() -> None:
    """Print the figures."""
    _page.SCRIPT += _PROBE
    with tempfile.TemporaryDirectory() as folder:
        for name, records in (("40", varied(Path(folder, "a"))), ("1000", many(Path(folder, "b")))):
            page = write_report(records, Path(folder, f"{name}.html"))
            print(f"{name} records: {page.stat().st_size:,} bytes")
            for width in (1280, 390):
                loads = [load(page, width) for _ in range(5)]
                paints, charts = ([round(one[key] or -1) for one in loads] for key in ("paint", "chart"))
                print(f"  {width} px: first paint {paints} ms, first chart {charts} ms", flush=True)


if __name__ == "__main__":
    main()
