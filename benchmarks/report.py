#!/usr/bin/env python3
"""report.html in a real browser: how long a page of many samples takes to write, to load, to filter and to scroll.

    python benchmarks/report.py
    python benchmarks/report.py --samples 20000
    python benchmarks/report.py --smoke                  seconds: checks that the benchmark works
    python benchmarks/report.py --json rows.json

Cases:
    write    `write_report` from rows in memory: intervals, tables, thumbnails until the budget is spent
    load     from navigation to the first painted cards
    filter   a search of two words, as typed: from the event to the new cards laid out. Median, and the slowest.
    order    another order of all samples
    scroll   a jump to a random place of the list: from the scroll to cards there laid out
    nodes    elements in the document, the most at any time

Each is wall time, and beside it the processor time of the page's thread (Chromium's own counter): on a machine that others use
as well, the first says more about them.

Samples have questions of 4 to 12 words, answers of 5 to 15 and five references; the pictures are crops of two
photographs, each another one. Needs Chromium (Debian: apt-get install chromium) and playwright; without, it says so and stops.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from mmprefix.evaluation.html_report import write_report
from mmprefix.evaluation.runs import Row, Run, Scores

WORDS = [
    "a", "the", "cat", "dog", "sits", "stands", "red", "blue", "street", "table", "plate", "train", "plane",
    "man", "woman", "child", "snow", "beach", "surf", "sky", "old", "two",
]  # fmt: skip
TIMED = """async (what) => {
  const list = document.getElementById("list");
  const start = performance.now();
  if (what.query !== undefined) {
    const field = document.getElementById("query");
    field.value = what.query;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  } else if (what.order !== undefined) {
    const field = document.getElementById("order");
    field.value = what.order;
    field.dispatchEvent(new Event("change", { bubbles: true }));
  } else {
    window.scrollTo(0, what.scroll * document.documentElement.scrollHeight);
    await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
  }
  list.getBoundingClientRect();
  void list.offsetHeight;
  return [performance.now() - start, document.querySelectorAll("*").length];
}"""


def many_samples(number: int) -> tuple[Run, Callable[[int], Image.Image]]:
    """A run of so many samples, and the picture of each."""
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    rows = [
        Row(f"q{n}", f"i{n}", f"kind {n % 8}", text(4, 12), text(5, 15), tuple(text(5, 15) for _ in range(5)))
        for n in range(number)
    ]
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    corners = [(draw.randint(0, 320), draw.randint(0, 200)) for _ in rows]

    def picture(row: int) -> Image.Image:
        left, top = corners[row]
        return photos[row % 2].crop((left, top, left + 320, top + 220))

    scores = np.array([draw.choice([0, 0, 0.3, 0.6, 1, 1, 1]) for _ in rows])
    return Run("many", rows, Scores({"accuracy": scores}, primary="accuracy")), picture


def measure(path: Path, browser: str, repeats: int) -> dict[str, float]:
    """Milliseconds and nodes, as the browser has them."""
    from playwright.sync_api import sync_playwright

    found: dict[str, float] = {}
    draw = random.Random(1)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        loads = []
        for _ in range(3):
            page = chromium.new_page(viewport={"width": 1280, "height": 900})
            start = time.perf_counter()
            page.goto(path.as_uri(), wait_until="load")
            page.wait_for_selector("#list .card")
            page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            loads.append(1000 * (time.perf_counter() - start))
            if len(loads) < 3:
                page.close()
        found["load"] = statistics.median(loads)
        page.evaluate(TIMED, {"query": "first"})  # makes the folded texts; measured in a page of its own below
        counters = page.context.new_cdp_session(page)
        counters.send("Performance.enable", {"timeDomain": "threadTicks"})

        def busy() -> float:
            metrics = counters.send("Performance.getMetrics")["metrics"]
            return 1000 * next(one["value"] for one in metrics if one["name"] == "TaskDuration")

        nodes = []
        for case, values in {
            "filter": [{"query": " ".join(draw.sample(WORDS, 2))} for _ in range(repeats)],
            "order": [
                {"order": order} for _ in range(max(1, repeats // 4)) for order in ("best", "longest", "file", "worst")
            ],
            "scroll": [{"scroll": draw.random()} for _ in range(repeats)],
        }.items():
            if case == "order":
                page.evaluate(TIMED, {"query": ""})
            timed, processor = [], []
            for value in values:
                start = busy()
                timed.append(page.evaluate(TIMED, value))
                processor.append(busy() - start)
            found[case] = statistics.median(one[0] for one in timed)
            found[f"{case}, slowest"] = max(one[0] for one in timed)
            found[f"{case}, processor"] = statistics.median(processor)
            found[f"{case}, processor, slowest"] = max(processor)
            nodes += [one[1] for one in timed]
        page.close()
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.goto(path.as_uri())
        found["filter, first"] = page.evaluate(TIMED, {"query": "cat dog"})[0]
        found["nodes"] = max(nodes)
        chromium.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.smoke:
        options.samples, options.repeats = 300, 2
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("report: no Chromium on this machine: nothing is measured (Debian: apt-get install chromium)")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        run, picture = many_samples(options.samples)
        path = Path(folder) / "report.html"
        start = time.perf_counter()
        line = write_report(path, run, picture)
        written = time.perf_counter() - start
        print(f"{options.samples:,} samples: {line.partition(': ')[2]}; written in {written:.1f} s")
        found = measure(path, browser, options.repeats)
    for name, value in found.items():
        print(f"  {name:28} {value:10,.0f}{'' if name == 'nodes' else ' ms'}")
    if options.json:
        options.json.write_text(json.dumps({"samples": options.samples, "write_s": written, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
