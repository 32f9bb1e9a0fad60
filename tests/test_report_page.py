"""report.html in a real browser: Chromium without a window, driven over its own protocol. Skipped where there is none."""

import shutil

import numpy as np
import pytest
from PIL import Image

from mmprefix.evaluation.drawings import Drawing, DrawnSample
from mmprefix.evaluation.html_report import write_report
from mmprefix.evaluation.runs import Curve, Row, Run, Scores, exact_match_scores
from mmprefix.evaluation.thumbnails import NO_PICTURE
from tests.test_html_report import HOSTILE

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

SIZES = {"phone": (360, 740), "laptop": (1280, 900), "wide": (2560, 1300)}
PAINTED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
CURVES = {
    "train/loss": Curve(np.arange(500), 5 / np.arange(1, 501)),
    "val/loss": Curve(np.arange(0, 500, 50), np.linspace(3, 1, 10)),
    "lr/a": Curve(np.arange(500), np.linspace(0, 1e-3, 500)),
    "val/exact_match": Curve(np.array([0, 250, 499]), np.array([0.1, 0.5, 0.9])),
}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # --no-sandbox: as root, which CI often is, Chromium won't start otherwise. The page is our own.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path, photos):
    """Writes a run's page and opens it; fails on whatever the console says, and on anything that is loaded."""
    contexts, complaints = [], []

    def write_and_open(rows, second=None, size="laptop", scores=None, drawn=(), **context):
        one = Run(
            "first", rows, scores or exact_match_scores(rows), CURVES, {"Model": "a → b"}, ("SVC", {"colour": 0.4})
        )
        other = None if second is None else Run("second", second, exact_match_scores(second))
        path = tmp_path / "report.html"
        write_report(path, one, lambda row: photos[row % 3] if row % 5 else NO_PICTURE, other, drawn=drawn)
        width, height = SIZES[size]
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **context))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)  # machines of CI are busy
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
        page.goto(path.as_uri())
        if context.get("java_script_enabled", True):
            page.evaluate("document.getElementById('gallery').scrollIntoView()")  # cards are made where one looks
            page.evaluate(PAINTED)
        return page

    yield write_and_open
    for context in contexts:
        context.close()
    assert complaints == []


def colours(number):
    """Rows of two closed kinds; every third is wrong."""
    names = ("red", "green", "blue")
    return [
        Row(f"s{n:05}", f"i{n // 2}", ("colour", "warm")[n % 2], ("which colour?", "is it warm?")[n % 2],
            (names[(n // 2 + (n % 3 == 0)) % 3], ("yes", "no")[n % 3 == 0])[n % 2],
            ((names[(n // 2) % 3],), ("yes",) if n % 4 == 1 else ("no",))[n % 2])
        for n in range(number)
    ]  # fmt: skip


def shown(page):
    """How many samples the page says match."""
    return int(page.inner_text("#count").split()[0].replace(",", ""))


def places(page):
    return page.eval_on_selector_all(
        "#list > li", "items => items.map(item => Number(item.getAttribute('aria-posinset')))"
    )


def test_all_sections_are_there(opened):
    page = opened(colours(60))
    assert page.eval_on_selector_all("section", "all => all.map(one => one.id)") == [
        "summary", "kinds", "curves", "confusion", "gallery",
    ]  # fmt: skip
    assert page.locator("figure.chart").count() == 3
    assert page.locator("table.matrix").count() == 2
    assert page.locator("svg.interval .baseline").count() == 1
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1


def test_worst_first_then_best_first(opened):
    rows = colours(60)
    right = [row.prediction in row.references for row in rows]
    assert 10 < sum(right) < 50
    page = opened(rows)
    assert page.locator(".card .badge").first.inner_text() == "✗ wrong"
    assert page.locator(".card .foot bdi").first.inner_text() == rows[right.index(False)].id
    page.select_option("#order", "best")
    assert page.locator(".card .badge").first.inner_text() == "✓ right"
    assert page.locator(".card .foot bdi").first.inner_text() == rows[right.index(True)].id


def test_filters_match_a_loop_over_rows(opened):
    rows = colours(60)
    page = opened(rows)

    def expected(fits):
        return sum(map(fits, rows))

    assert shown(page) == 60
    page.fill("#query", "COLOUR green")
    both = expected(
        lambda r: "green" in "\n".join((r.id, r.instruction, r.prediction, *r.references)) and "colour" in r.instruction
    )
    assert 0 < both < 60
    assert shown(page) == both
    page.select_option("#result", "wrong")
    wrong = expected(
        lambda r: (
            "green" in "\n".join((r.id, r.instruction, r.prediction, *r.references))
            and "colour" in r.instruction and r.prediction not in r.references
        )
    )  # fmt: skip
    assert 0 < wrong < both
    assert shown(page) == wrong
    assert places(page) == list(range(1, wrong + 1))
    page.fill("#query", "no such words")
    assert shown(page) == 0
    assert page.locator("#nothing").is_visible()
    assert places(page) == []
    page.click("#nothing-reset")
    assert shown(page) == 60
    assert page.locator("#nothing").is_hidden()
    page.select_option("#kind", label="warm")
    assert shown(page) == 30


def test_cell_of_a_matrix_shows_its_samples(opened):
    rows = colours(60)
    page = opened(rows)
    button = page.locator('table.matrix td.wrong button[aria-label*="expected red, answered green"]')
    number = int(button.inner_text())
    assert number == sum(r.references == ("red",) and r.prediction == "green" for r in rows) > 0
    button.click()
    assert shown(page) == number
    assert page.inner_text("#cell-text") == "colour: red expected, green answered."
    page.click("#cell-off")
    assert shown(page) == 60


def test_bar_of_a_kind_shows_its_samples(opened):
    page = opened(colours(60))
    page.click('[data-kind="1"]')
    assert shown(page) == 30
    assert set(page.locator(".card .question").all_inner_texts()) == {"is it warm?"}


def test_many_samples_are_few_nodes_wherever_one_looks(opened):
    page = opened(colours(10_000))
    assert shown(page) == 10_000
    nodes = "document.querySelectorAll('*').length"
    assert page.evaluate(nodes) < 1_500
    for share in (0.3, 0.7, 1):
        page.evaluate(f"window.scrollTo(0, {share} * document.documentElement.scrollHeight)")
        page.evaluate(PAINTED)
        seen = places(page)
        assert seen[1] > share * 9_000, "the first is the one that Tab reaches"
        assert page.locator(".card >> visible=true").count() > 4
        assert page.evaluate(nodes) < 1_500
        assert set(page.eval_on_selector_all("#list > li", "all => all.map(one => one.ariaSetSize)")) == {"10000"}
    assert seen[-1] == 10_000
    assert seen == sorted(seen), "in the order in which they are read out"
    started = page.evaluate("performance.now()")
    page.fill("#query", "s09998")
    assert shown(page) == 1
    assert page.evaluate("performance.now()") - started < 30_000, "not frozen; benchmarks/report.py has the time"


def test_keyboard_alone_is_enough(opened):
    page = opened(colours(200))
    page.focus("#reset")
    page.keyboard.press("Tab")
    place = "document.activeElement.dataset.place"
    assert page.evaluate(place) == "0"
    columns = page.evaluate(
        "new Set([...document.querySelectorAll('#list > li')].map(one => one.getBoundingClientRect().left)).size"
    )
    assert columns > 1
    for key, expected in (
        ("ArrowRight", 1), ("ArrowDown", 1 + columns), ("ArrowLeft", columns), ("ArrowUp", 0), ("ArrowUp", 0),
        ("End", 199), ("ArrowRight", 199), ("Home", 0), ("PageDown", None),
    ):  # fmt: skip
        page.keyboard.press(key)
        if expected is not None:
            assert page.evaluate(place) == str(expected), key
        box = page.evaluate(
            "(({top, bottom}) => [top, bottom, innerHeight])(document.activeElement.getBoundingClientRect())"
        )
        assert box[0] >= 0, key
        assert box[1] <= box[2], key
    assert int(page.evaluate(place)) >= columns
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.inner_text("#detail-title") == "Sample 1 of 200"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#detail-title") == "Sample 2 of 200"
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    page.keyboard.press("Escape")
    # The browser first gives the focus back to where the dialog was opened; its event comes as a task of its own.
    page.wait_for_function(f"{place} === '1'")  # back where the dialog was left
    assert page.eval_on_selector_all('#list button[tabindex="0"]', "all => all.length") == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#list')") is None


def test_focus_survives_scrolling_away(opened):
    page = opened(colours(2_000))
    page.focus("#list button")
    page.evaluate("window.scrollTo(0, document.documentElement.scrollHeight)")
    page.evaluate(PAINTED)
    assert page.evaluate("document.activeElement.dataset.place") == "0"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.place") == "1"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top >= 0")


def test_arrows_move_between_numbers_of_a_matrix(opened):
    page = opened(colours(120))
    table = page.locator("table.matrix").first
    assert table.locator('button[tabindex="0"]').count() == 1
    table.locator('button[tabindex="0"]').focus()
    start = page.evaluate("document.activeElement.dataset.cell")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    moved = page.evaluate("document.activeElement.dataset.cell")
    assert moved != start
    assert table.locator('button[tabindex="0"]').count() == 1
    page.keyboard.press("Enter")
    assert shown(page) < 120


# Every control has a name, every picture an alternative text, headings skip no level.
NAMES = """() => {
  const found = [];
  for (const one of document.querySelectorAll("button, input, select, a, [role=region], [role=img], ul[role=list]")) {
    if (!one.checkVisibility()) continue;
    const name = one.getAttribute("aria-label") || (one.labels && one.labels[0] && one.labels[0].textContent) || one.textContent;
    if (!name.trim()) found.push(one.outerHTML.slice(0, 80));
  }
  for (const one of document.querySelectorAll("img")) if (!one.alt.trim()) found.push("no alternative text");
  let level = 0;
  for (const one of document.querySelectorAll("main h2, main h3, h1")) {
    const now = Number(one.tagName[1]);
    if (now > level + 1) found.push(`h${level} before h${now}`);
    level = now;
  }
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  if (new Set(ids).size !== ids.length) found.push("an id twice");
  return found;
}"""

# WCAG 2.2, relative luminance and contrast ratio; backgrounds are blended from the first that is opaque.
CONTRAST = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const over = (top, under) => [0, 1, 2].map((n) => top[n] * top[3] + under[n] * (1 - top[3]));
  const ground = (one) => {
    if (!one) return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
    const own = parse(getComputedStyle(one).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, ground(one.parentElement));
  };
  const light = (c) => {
    const [r, g, b] = c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  let seen = 0;
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !one.checkVisibility() || one.closest("script, style, title, noscript")) continue;
    const style = getComputedStyle(one);
    const under = ground(one);
    const paint = one.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(over(parse(paint), under)), light(under)].sort((x, y) => y - x);
    seen += 1;
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${one.tagName}.${one.className.baseVal ?? one.className}: ${walker.currentNode.textContent.slice(0, 30)}`);
  }
  return [seen, found];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_and_contrast(opened, scheme):
    rows = colours(60)
    second = [row._replace(prediction="red") for row in rows]
    page = opened(rows, second, color_scheme=scheme)
    assert page.evaluate(NAMES) == []
    seen, found = page.evaluate(CONTRAST)
    assert seen > 150
    assert found == []
    page.locator(".card").first.click()
    assert page.evaluate(NAMES) == []
    assert page.evaluate(CONTRAST)[1] == []


def test_the_contrast_check_sees_what_is_too_faint(opened):
    page = opened(colours(10))
    page.evaluate("document.querySelector('h1').style.color = '#aaa'")
    assert [text for text in page.evaluate(CONTRAST)[1] if "first" in text]


def spoken(page):
    """What the browser tells a screen reader: (role, name, properties) of each node that isn't ignored."""
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    return [
        (
            node["role"]["value"], node.get("name", {}).get("value", "").strip(),
            {one["name"]: one["value"].get("value") for one in node.get("properties", ())},
        )
        for node in tree if not node["ignored"] and "role" in node
    ]  # fmt: skip


def unnamed(nodes):
    """Roles of what can be reached or is a picture, and has no name."""
    return [
        role for role, name, properties in nodes
        if not name and role != "RootWebArea" and (properties.get("focusable") or role in ("image", "img", "dialog"))
    ]  # fmt: skip


def test_a_screen_reader_hears_names_places_and_changes(opened):
    page = opened(colours(60), drawn=drawn_samples(3))
    nodes = spoken(page)
    roles = {role for role, *_ in nodes}
    assert set("banner navigation main search searchbox combobox status list listitem heading".split()) <= roles
    assert unnamed(nodes) == []
    controls = [name for role, name, _ in nodes if role in ("searchbox", "combobox")]
    assert controls == ["Search", "Kind", "Result", "Order"], "and no choice of a single score"
    (status,) = [properties for role, _, properties in nodes if role == "status"]
    assert (status["live"], status["atomic"]) == ("polite", True)
    # What the region says must change, in one piece, for it to be read out.
    page.evaluate("""() => {
      window.heard = [];
      const region = document.getElementById("count");
      new MutationObserver(() => window.heard.push(region.textContent)).observe(region, {childList: true, characterData: true, subtree: true});
    }""")
    page.select_option("#result", "wrong")
    page.evaluate(PAINTED)
    heard = page.evaluate("window.heard")
    assert len(set(heard)) == 1, "said once"
    assert heard[0] == page.inner_text("#count")
    assert heard[0].startswith(f"{shown(page)} of 60")
    page.fill("#query", "nothing is like this")
    page.evaluate(PAINTED)
    assert page.evaluate("window.heard.at(-1)").startswith("0 of 60")
    page.click("#reset")
    page.locator(".card").first.click()
    nodes = spoken(page)
    assert unnamed(nodes) == []
    (modal,) = [properties["modal"] for role, _, properties in nodes if role == "dialog"]
    assert modal
    assert not [role for role, *_ in nodes if role in ("navigation", "search")], "what lies behind it is not there"
    page.keyboard.press("Escape")
    page.evaluate("document.getElementById('query').parentElement.replaceWith(document.getElementById('query'))")
    page.evaluate("document.getElementById('query').removeAttribute('placeholder')")
    assert unnamed(spoken(page)) == ["searchbox"], "the check sees a control that lost its name"


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_window(opened, size):
    rows = [*colours(60), Row("long" * 40, "i", "kind" * 30, "x" * 3000, "y" * 3000, ("z" * 3000,))]
    page = opened(rows, [row._replace(prediction="red") for row in rows], size=size)
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    page.locator(".card").first.click()
    width = page.evaluate("document.querySelector('dialog').getBoundingClientRect().right")
    assert width <= SIZES[size][0]
    assert page.evaluate("(one => one.scrollWidth <= one.clientWidth)(document.querySelector('dialog'))")


def test_hostile_text_is_shown_as_it_is(opened):
    rows = [Row(f"id {text}", f"image {text}", text, text, text, (text,)) for text in HOSTILE]
    rows.append(Row("words", "image words", "", "?", "word " * 10_000, ("x",)))
    page = opened(rows)
    assert page.evaluate("document.querySelectorAll('script').length") == 3
    assert page.locator("img[src='x'], [onload], [onerror]").count() == 0
    page.select_option("#order", "file")
    page.locator('.card[data-place="0"]').click()
    for text in HOSTILE:
        # As numbers: half of a pair does not travel as text.
        said = page.locator("#detail-body .text").first.evaluate(
            "one => [...one.textContent].map(c => c.codePointAt(0))"
        )
        assert said == list(map(ord, text))
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    long = page.locator("#detail-body .text").nth(1).evaluate("one => one.textContent")
    assert long.startswith("word word")
    assert long.endswith("more characters)")


def test_two_runs_side_by_side(opened):
    rows = colours(60)
    second = [row._replace(prediction=row.references[0]) for row in rows]
    page = opened(rows, second)
    assert page.inner_text("h1") == "first against second"
    assert page.locator(".card").first.locator(".answer").count() == 2
    page.select_option("#result", "second")
    assert shown(page) == sum(row.prediction not in row.references for row in rows)
    page.select_option("#result", "differ")
    assert shown(page) == sum(row.prediction not in row.references for row in rows)
    page.select_option("#order", "change")
    first = page.locator(".card").first.locator(".badge").all_inner_texts()
    assert first == ["✗ wrong", "✓ right"]


def test_another_score_sorts_anew(opened):
    rows = colours(6)
    scores = Scores(
        {"CIDEr": np.array([5.0, 0, 3, 9, 1, 2]), "accuracy": np.array([0, 1, 0.5, 0, 1, 1])}, primary="CIDEr"
    )
    page = opened(rows, scores=scores)
    first = page.locator(".card .foot bdi").first
    assert first.inner_text() == "s00001"
    assert page.locator(".card .badge").first.inner_text() == "• 0.000", (
        "CIDEr's 0 is not called wrong, its 1 not right"
    )
    page.select_option("#metric", label="accuracy")
    assert first.inner_text() == "s00000"
    assert page.locator(".card .badge").all_inner_texts()[2] == "◐ partly right 0.500"


def drawn_samples(*rows):
    picture = Image.linear_gradient("L").resize((900, 300)).convert("RGB")
    title = HOSTILE[0] + "a long title " * 20
    return [
        DrawnSample(n, (Drawing(title, "r 0.10; e 0.20", picture, n == 0), Drawing("Mask", "m", picture))) for n in rows
    ]


@pytest.mark.parametrize("size", SIZES)
def test_drawings_are_seen_and_reached_from_their_sample(opened, size):
    rows = colours(60)
    wrong = next(n for n, row in enumerate(rows) if row.prediction not in row.references)
    page = opened(rows, size=size, drawn=drawn_samples(7, wrong))
    first, second = page.locator("details.drawn").all()
    assert page.get_by_role("link", name="Attention and loss").count() == 1, "in the list of sections"
    assert first.evaluate("one => one.open")
    assert not second.evaluate("one => one.open")
    for image in first.locator("img").all():
        assert image.evaluate("one => one.complete && one.naturalWidth") == 900
        assert image.get_attribute("alt").strip()
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    assert page.evaluate(NAMES) == []
    assert page.evaluate(CONTRAST)[1] == []
    page.locator(".card").first.focus()
    page.keyboard.press("Enter")
    link = page.locator("dialog").get_by_role("link", name="Attention and loss")
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("!document.getElementById('detail').open")
    page.evaluate(PAINTED)
    assert second.evaluate("one => one.open")
    assert page.evaluate("document.activeElement.parentElement.id") == f"drawn-{wrong}"
    assert second.evaluate("one => one.getBoundingClientRect().top") < SIZES[size][1]
    page.keyboard.press("Enter")  # the keyboard closes it again
    assert not second.evaluate("one => one.open")
    page.fill("#query", rows[7].id)
    page.locator(".card").first.click()
    page.keyboard.press("Escape")
    page.wait_for_function("document.activeElement.className === 'card'")


def test_many_samples_with_drawings_have_as_few_nodes(opened):
    page = opened(colours(10_000), drawn=drawn_samples(*range(20)))
    assert shown(page) == 10_000
    assert page.locator("details.drawn").count() == 20
    assert page.evaluate("document.querySelectorAll('*').length") < 1200


def test_one_sample_is_a_page_too(opened):
    page = opened(colours(1))
    assert page.inner_text("#count") == "1 sample"
    page.locator(".card").click()
    assert page.locator("#previous").is_disabled()
    assert page.locator("#next").is_disabled()


def test_numbers_are_there_without_script(opened):
    page = opened(colours(60), java_script_enabled=False)
    assert "exact match" in page.inner_text("#summary")
    assert "needs JavaScript" in page.inner_text("#gallery")
    assert page.locator("#filters").is_hidden()
