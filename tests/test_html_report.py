"""The page without a browser: numbers against slow oracles, and what stands in the file. `test_report_page.py` has a browser."""

import base64
import hashlib
import html
import io
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmprefix.__main__ import main
from mmprefix.data.shards import write_shard
from mmprefix.errors import InputError
from mmprefix.evaluation.attention import trace_sample
from mmprefix.evaluation.charts import percent
from mmprefix.evaluation.drawings import Drawing, DrawnSample, as_uri, drawn_section
from mmprefix.evaluation.html_report import embedded_pictures, write_report
from mmprefix.evaluation.pictures import as_stored
from mmprefix.evaluation.report import log_picture
from mmprefix.evaluation.runs import (
    Curve,
    Row,
    Run,
    exact_match_scores,
    facts_of,
    read_curves,
    read_predictions,
    read_run,
    read_scores,
)
from mmprefix.evaluation.summary import MAX_ANSWERS, confusions, paired, summarize
from mmprefix.evaluation.svg import line_chart, thinned, ticks
from mmprefix.evaluation.thumbnails import NO_PICTURE, NO_ROOM, SIDE, embed, encode, telling_first
from mmprefix.metrics.intervals import mean_interval
from mmprefix.metrics.rules import ScoringRules
from tests.conftest import colour_record, make_model


def confusions_of(rows):
    return confusions(rows, exact_match_scores(rows).items["exact match"])


ROWS = [
    Row("a", "1", "colour", "which?", "red", ("red",)),
    Row("b", "1", "shape", "what shape?", "circle", ("round", "circle")),
    Row("c", "2", "colour", "which?", "grün", ("blue",)),
    Row("d", "3", "colour", "which?", "red", ("red",)),
    Row("e", "4", "colour", "which?", "red", ("blue",)),
]
PYTHON = ScoringRules(caption_tokenizer="python")
HOSTILE = [
    "</script><script>alert(1)</script>", "<!--<script>", "]]>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>',
    "\u202eright to left\u202c", "👩🏽‍🚀 ☕ ❤️", "{{script}}", "\u2028\u2029\x00\x1b[31m", "half a pair \ud800", "&amp;lt;",
]  # fmt: skip


def run_of(rows, **kwargs):
    return Run("a run", list(rows), exact_match_scores(rows), **kwargs)


def no_picture(row):
    return NO_PICTURE


def blocks(page):
    """The two blocks of JSON of a page."""
    found = dict(re.findall(r'<script type="application/json" id="report-(\w+)">(.*?)</script>', page, flags=re.DOTALL))
    return {name: json.loads(text) for name, text in found.items()}


def write_predictions(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**row._asdict(), "references": list(row.references)}) + "\n" for row in rows))
    return path


# Numbers --------------------------------------------------------------------------------------------------------------


def test_summary_leaves_out_what_has_no_score_and_draws_images_whole():
    values, groups = np.array([1.0, 0, math.nan, 1]), [("", "x"), ("", "x"), ("", "y"), ("", "z")]
    found = summarize(values, groups)
    assert (found.value, found.scored) == (2 / 3, 3)
    assert found.interval == mean_interval([1, 0, 1], ["x", "x", "z"])
    assert found.interval != mean_interval([1, 0, 1])
    assert summarize(np.array([math.nan]), [("", "x")]).interval is None


def test_interval_is_of_the_corpus_scores_scale_or_absent():
    values, groups = np.array([0.2, 0.9, 1, 0.4]), [("", str(n)) for n in range(4)]
    low, high = mean_interval(values, groups)
    assert summarize(values, groups, 0.625).interval == (low, high)
    assert summarize(values, groups, 62.5).interval == (100 * low, 100 * high)
    assert summarize(values, groups, 0.7) == (0.7, None, 4), "BLEU is no mean of its items"


def test_confusion_matches_a_count_of_pairs():
    draw = np.random.default_rng(0)
    names = ["one", "two", "three", "ten words"]
    rows = [
        Row(
            str(n),
            str(n),
            "k",
            "?",
            str(draw.choice([*names, "else"])),
            (f"  {draw.choice(names)}  ".replace(" w", "  w"),),
        )
        for n in range(200)
    ]
    (found,) = confusions_of(rows)
    pairs = Counter((" ".join(row.references[0].split()), row.prediction) for row in rows)
    assert found.answers == tuple(sorted(names))
    for expected in names:
        for n, said in enumerate([*found.answers, "else"]):
            assert found.counts[found.answers.index(expected), n] == pairs[expected, said]
    assert found.counts.sum() == 200
    assert found.counts[:, -1].sum() > 0
    for n, (expected, said) in found.cells.items():
        assert [*found.answers, "else"][said] == rows[n].prediction
        assert found.answers[expected] == " ".join(rows[n].references[0].split())


def test_what_is_right_by_the_metrics_rules_is_no_other_answer():
    said = ["yes", "Yes.", "no", "maybe", "YES", "no."]
    expected = ["yes", "yes", "yes", "no", "no", "no"]
    rows = [
        Row(str(n), "i", "k", "?", *pair) for n, pair in enumerate(zip(said, zip(expected, strict=True), strict=True))
    ]
    (found,) = confusions(rows, np.array([1.0, 1.0, 0.0, 0.0, 0.0, np.nan]))
    assert found.counts.tolist() == [[0, 0, 3], [1, 2, 0]]
    said = ["The answer is B.", "(A)", "B", "a bird"]
    rows = [
        Row(str(n), "i", "k", "?", text, (letter,)) for n, (text, letter) in enumerate(zip(said, "ABAB", strict=True))
    ]
    (found,) = confusions(rows, np.zeros(4))
    assert found.counts.tolist() == [[0, 2, 0], [1, 0, 1]]


def test_confusion_only_for_closed_sets():
    def rows_with(answers, each):
        return [Row(f"{a}-{n}", "i", "k", "?", "x", (str(a),)) for a in range(answers) for n in range(each)]

    assert len(confusions_of(rows_with(MAX_ANSWERS, 2))) == 1
    assert confusions_of(rows_with(MAX_ANSWERS + 1, 2)) == []
    assert confusions_of(rows_with(10, 1)) == [], "captions: each reference is another"
    assert confusions_of(rows_with(1, 9)) == [], "nothing to confuse it with"
    assert confusions_of(rows_with(12, 2))[0].answers == tuple(map(str, range(12))), "numbers by value"


def test_answer_of_several_references_is_the_most_frequent():
    rows = [Row(str(n), "i", "k", "?", "no", ("yes", "no", "no") if n % 2 else ("yes", "yes", "no")) for n in range(8)]
    (found,) = confusions_of(rows)
    assert found.answers == ("no", "yes")
    assert found.counts.tolist() == [[4, 0, 0], [4, 0, 0]]


def test_pairing_takes_what_is_in_both_and_says_what_is_not():
    second = [row._replace(prediction="blue") for row in ROWS[:0:-1]] + [Row("z", "9", "", "", "", ("x",))]
    one, other, note = paired(run_of(ROWS), Run("b", second, exact_match_scores(second)))
    assert [row.id for row in one.rows] == [row.id for row in other.rows] == ["b", "c", "d", "e"]
    assert one.scores.items["exact match"].tolist() == [1, 0, 1, 0]
    assert other.scores.items["exact match"].tolist() == [0, 1, 0, 1]
    assert "4 samples" in note
    assert "1 only in a run, 1 only in b" in note
    with pytest.raises(InputError, match="no id in common"):
        paired(run_of(ROWS[:1]), run_of(ROWS[1:]))
    with pytest.raises(InputError, match="the same references.*'red'.*'pink'.*'a'"):
        paired(run_of(ROWS), run_of([ROWS[0]._replace(references=("pink",))]))


def test_corpus_score_of_a_part_is_not_shown():
    run = run_of(ROWS)
    run.scores.corpus = {"exact match": 0.6}
    whole, _, _ = paired(run, run_of(ROWS))
    part, _, _ = paired(run, run_of(ROWS[:2]))
    assert whole.scores.corpus == {"exact match": 0.6}
    assert part.scores.corpus == {}


# Pictures -------------------------------------------------------------------------------------------------------------


def test_worst_and_best_come_by_turns():
    scores = np.array([0.5, 1, 0, math.nan, 0.2, 1])
    assert list(telling_first(scores)) == [2, 1, 4, 5, 0, 3]
    assert next(iter(telling_first(scores, np.array([0, 0, 0, 0, -0.9, 0])))) == 2
    assert list(telling_first(scores, np.array([0, 0, 0, 0, -0.9, 0])))[2] == 4, "the most changed is third"


def test_pictures_are_read_once_and_only_within_the_budget(photos):
    read = []

    def picture(row):
        read.append(row)
        return photos[row % 2]

    def embedded(sources):
        return [source.startswith("data:image/webp;base64,") for source in sources]  # whole, they are slow to compare

    first, second = (len(encode(photo)) for photo in photos[:2])
    image_of = [0, 1, 0]
    assert embedded(embed([2, 0, 1], image_of, 2, picture, first + second)) == [True, True]
    assert read == [2, 1], "row 0 has the image of row 2"
    found = embed([2, 0, 1], image_of, 2, picture, first + second - 1)
    assert embedded(found) == [True, False]
    assert found[1] == NO_ROOM
    assert embed([0, 1], [0, 1], 2, lambda row: "picture not found", 0) == ["picture not found"] * 2


def test_thumbnails_are_small_and_tiny_pictures_exact(photos):
    def decoded(uri):
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")

    thumbnail = decoded(encode(photos[0]))
    assert max(thumbnail.size) == SIDE
    expected = photos[0].resize(thumbnail.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(thumbnail, float) - np.asarray(expected, float)).mean() < 8
    digit = photos[0].resize((8, 8))
    assert np.array_equal(np.asarray(decoded(encode(digit))), np.asarray(digit))


def test_several_pictures_of_a_sample_are_one(photos):
    assert as_stored([]) == NO_PICTURE
    assert as_stored([photos[0]]) is photos[0]
    assert as_stored(photos).width > SIDE
    assert photos[0].width == 640, "not changed in place"


# Charts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (0.98, 1.002), (1e-9, 5e-9), (0, 1e9), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert found
    assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) + 1e-9 for tick in found)
    assert len(found) <= 11


def test_long_curves_are_means_of_neighbours():
    steps = np.arange(10_000)
    values = np.sin(steps / 700)
    values[17] = math.nan
    thin, size = thinned(Curve(steps, values))
    assert size > 1
    assert len(thin.steps) <= 600
    kept = np.delete(steps, 17)
    for n in (0, 5, len(thin.steps) - 1):  # the slow way
        part = kept[n * size : (n + 1) * size]
        assert thin.values[n] == pytest.approx(values[part].mean())
        assert thin.steps[n] == int(part.mean())


def test_chart_says_in_words_what_it_draws():
    curve = Curve(np.array([10, 20, 30]), np.array([4.0, math.inf, 1.0]))
    chart = line_chart("<loss>", [("a & b", curve), ("none", Curve(np.array([]), np.array([])))])
    assert "&lt;loss&gt; by step: a &amp; b goes from 4 at step 10 to 1 at step 30, lowest 1, highest 4" in chart
    assert "1 values that are not finite are not drawn" in chart
    points = re.search(r'<polyline class="line line-0" points="([^"]*)"', chart)[1].split()
    assert len(points) == 2
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points)
    assert x0 < x1
    assert y0 < y1, "down is more in SVG"
    assert line_chart("empty", [("none", Curve(np.array([1]), np.array([math.nan])))]) == ""


# Files ----------------------------------------------------------------------------------------------------------------


def test_predictions_are_read_back(tmp_path):
    assert read_predictions(write_predictions(tmp_path / "p.jsonl", ROWS)) == ROWS
    (tmp_path / "q.jsonl").write_text('{"id": 7, "prediction": "x"}\n\n')
    assert read_predictions(tmp_path / "q.jsonl") == [Row("7", "7", "", "", "x", ())]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("{", "p.jsonl:1: expected a JSON object"),
        ("[1]", "p.jsonl:1: expected a JSON object, got list"),
        ('{"id": "a"}', "p.jsonl:1: expected a string 'prediction', got none"),
        ('{"id": "a", "prediction": 3}', "p.jsonl:1: expected a string 'prediction', got int '3'"),
        ('{"id": "a", "prediction": "x", "references": "x"}', "expected a list of strings 'references', got str 'x'"),
        ('{"id": "a", "prediction": "x"}\n{"id": "a", "prediction": "y"}', "p.jsonl:2: expected each id once, got 'a' as in line 1"),
        (b"\xff\xfe", "expected text in UTF-8"),
    ],
)  # fmt: skip
def test_bad_predictions_are_one_line(text, message, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["report", "--run", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "r.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "r.html").exists()


def test_scores_are_found_by_sample_or_by_image(tmp_path):
    path = tmp_path / "s.json"
    by_id = {row.id: {"BLEU-4": 0.1 * n, "CIDEr": float(n)} for n, row in enumerate(ROWS)}
    path.write_text(json.dumps({"corpus": {"CIDEr": 2.0, "SPICE": 0.2}, "items": by_id, "rules": "coco-caption", "notes": ["tokenizer=python, not official"],
                                "unavailable": {"METEOR": "no Java"}}))  # fmt: skip
    scores = read_scores(path, ROWS)
    assert scores.primary == "CIDEr"
    assert scores.items["CIDEr"].tolist() == [0, 1, 2, 3, 4]
    assert scores.corpus == {"CIDEr": 2.0, "SPICE": 0.2}
    assert scores.notes == ["coco-caption", "tokenizer=python, not official", "METEOR is unavailable: no Java"]
    assert read_scores(path, ROWS, "BLEU-4").primary == "BLEU-4"
    by_metric = {"CIDEr": {row.id: float(n) for n, row in enumerate(ROWS)}}
    path.write_text(json.dumps({"items": by_metric}))
    assert read_scores(path, ROWS).items["CIDEr"].tolist() == [0, 1, 2, 3, 4]
    path.write_text(json.dumps({"items": {"a": {"GQA": 1}, "c": {"GQA": 0}}}))
    scores = read_scores(path, ROWS)
    assert scores.items["GQA"][[0, 2]].tolist() == [1, 0]
    assert np.isnan(scores.items["GQA"][[1, 3, 4]]).all()
    assert scores.notes == ["3 of 5 predictions have no score in s.json, and are left out of all numbers."]
    path.write_text(json.dumps({"items": {"1": {"CIDEr": 5}, "2": {"CIDEr": 6}, "3": {"CIDEr": 7}, "4": {"CIDEr": 8}}}))
    assert read_scores(path, ROWS).items["CIDEr"].tolist() == [5, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"a": {"x": 1}, "y": {"x": 1}, "z": {"x": 1}}, "of these predictions only, got some of 'y', 'z'"),
        ({**{k: {"x": 1} for k in "abcde"}, "z": {"x": 1}}, "scores of these predictions only, got some of 'z'"),
        ({**{k: {"x": 1} for k in "abcd"}, "e": {"y": 1}}, "e: expected x, got y"),
        ({**{k: {"x": 1} for k in "abcd"}, "e": {"x": "1"}}, "e: x: expected a finite number, got str '1'"),
        ({**{k: {"x": 1} for k in "abcd"}, "e": {"x": math.nan}}, "e: x: expected a finite number, got float 'nan'"),
        ([1], "expected {\"corpus\""),
    ],
)  # fmt: skip
def test_bad_scores_are_one_line(items, message, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"items": items}))
    with pytest.raises(InputError) as caught:
        read_scores(tmp_path / "s.json", ROWS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_curves_are_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    assert read_curves(path) == {}
    path.write_text("epoch,step,train/loss,val/x\n0,1,2.5,\n0,3,,0.5\n1,4,nan,0.75\n")
    curves = read_curves(path)
    assert set(curves) == {"train/loss", "val/x"}
    assert curves["train/loss"].steps.tolist() == [1, 4]
    assert curves["val/x"].values.tolist() == [0.5, 0.75]
    path.write_text("step,x\n1,abc\n")
    with pytest.raises(InputError, match=r"metrics.csv:2: x: expected numbers, got 'abc' at step '1'"):
        read_curves(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="expected a column 'step', got a, b"):
        read_curves(path)


# The page -------------------------------------------------------------------------------------------------------------


def test_page_allows_its_own_script_and_style_only(tmp_path):
    write_report(tmp_path / "r.html", run_of(ROWS), no_picture)
    page = (tmp_path / "r.html").read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    script, style = (
        re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1],
        re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1],
    )
    for text, directive in ((script, "script-src"), (style, "style-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert not re.search(r'\b(?:src|href)="(?!#)', page), "nothing to load"
    assert " style=" not in page, "the policy would refuse it"
    assert " on" not in " ".join(re.findall(r"<[a-z][^<>]*>", page.partition("<body>")[2].partition("<script")[0])).replace(
        "95% interval", "")  # fmt: skip


def test_hostile_text_stays_data(tmp_path):
    rows = [Row(f"id {text}", text, text, text, text, (text,), text) for text in HOSTILE]
    rows += [row._replace(id=f"2{row.id}", prediction="other") for row in rows]
    rows += [row._replace(id=f"3{row.id}", prediction="other", kind="same", dataset="") for row in rows[: len(HOSTILE)]]
    rows += [row._replace(id=f"4{row.id}") for row in rows[-len(HOSTILE) :]]
    run = Run(HOSTILE[0], rows, exact_match_scores(rows), {f"val/{HOSTILE[3]}": Curve(np.array([1]), np.array([1.0]))},
              {HOSTILE[1]: HOSTILE[0]}, (HOSTILE[0], {HOSTILE[0]: 0.5}))  # fmt: skip
    write_report(tmp_path / "r.html", run, lambda row: HOSTILE[0])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    plain = tmp_path / "plain.html"
    write_report(plain, run_of(ROWS), no_picture)
    for tag in ("<script", "</script", "<!--", "<img", "onerror"):
        own = plain.read_text().count(tag)
        allowed = (
            page.count("&lt;img src=x onerror") + page.count("\\u003cimg src=x onerror") if tag == "onerror" else 0
        )
        assert page.count(tag) == own + allowed, tag
    data = blocks(page)["data"]
    assert [text for text in HOSTILE if text not in data["runs"][0]["prediction"]] == []
    assert {references[0] for references in data["references"]} == set(HOSTILE)


def test_page_holds_every_sample_and_says_what_it_left_out(tmp_path, photos):
    rows = [Row(str(n), f"i{n}", "k", "?", "x" if n % 3 else "y", ("x",)) for n in range(30)]
    line = write_report(tmp_path / "r.html", run_of(rows), lambda row: photos[row % 2], max_samples=10, budget=30_000)
    found = blocks((tmp_path / "r.html").read_text())
    assert len(found["data"]["id"]) == 10
    scores = found["data"]["runs"][0]["scores"][0]
    assert sorted(scores) == [0] * 5 + [1] * 5, "the worst and the best"
    sources = found["pictures"]["sources"]
    embedded = sum(source.startswith("data:") for source in sources)
    assert 0 < embedded < 10
    assert sum(map(len, (s for s in sources if s.startswith("data:")))) <= 30_000
    assert {s for s in sources if not s.startswith("data:")} == {NO_ROOM}
    page = (tmp_path / "r.html").read_text()
    assert "10 of 30 samples" in page
    assert f"{embedded} of 10 pictures" in page
    assert "<b>0.6667</b>" in page, "numbers are of all"
    assert f"10 samples, {embedded} of 10 pictures" in line


def test_texts_are_cut_and_say_so(tmp_path):
    write_report(tmp_path / "r.html", run_of([ROWS[0]._replace(prediction="word " * 10_000)]), no_picture)
    (said,) = blocks((tmp_path / "r.html").read_text())["data"]["runs"][0]["prediction"]
    assert len(said) < 20_100
    assert said.endswith(" … (30,000 more characters)")


def test_same_page_from_the_same_run(tmp_path):
    from datetime import UTC, datetime

    for name in ("a", "b"):
        write_report(tmp_path / name, run_of(ROWS), no_picture, written=datetime(2026, 1, 1, tzinfo=UTC))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rows_without_references_have_no_score(tmp_path):
    write_report(tmp_path / "r.html", run_of([row._replace(references=()) for row in ROWS]), no_picture)
    page = (tmp_path / "r.html").read_text()
    assert blocks(page)["data"]["runs"][0]["scores"] == [[None] * 5]
    assert 'id="kinds"' not in page
    assert "nan" not in page.partition("<main>")[2].partition("<script")[0]


# The command ----------------------------------------------------------------------------------------------------------


def run_folder(path, rows):
    write_predictions(path / "predictions.jsonl", rows)
    (path / "config.yaml").write_text(
        "seed_everything: 3\nmodel: {vision: {name: vit}, connector: {kind: mlp}, decoder: {name: gemma}}\n"
    )
    (path / "metrics.csv").write_text(
        "epoch,step,train/loss,lr/a,lr/b,val/acc\n0,1,2.5,0.1,0.1,\n0,9,1.5,0.2,0.2,0.5\n"
    )
    return path


def test_command_reads_a_run_folder_with_pictures_from_shards(tmp_path, capsys):
    records = [colour_record(n) for n in range(4)]
    write_shard(tmp_path / "s" / "val-000.tar", records)
    rows = [
        Row(sample["id"], key, sample["kind"], sample["instruction"], "red", (sample["target"],))
        for key, _, payload in records for sample in json.loads(payload)
    ]  # fmt: skip
    folder = run_folder(tmp_path / "one", rows)
    out = tmp_path / "r.html"
    assert main(["report", "--run", str(folder), "--images", str(tmp_path / "s"), "--out", str(out)]) == 0
    assert "8 samples, 4 of 4 pictures" in capsys.readouterr().out
    page = out.read_text()
    for text in ("vit → mlp → gemma", "train/loss", "a, b", "val/acc", "<dt>Seed</dt>"):
        assert text in page
    uris = embedded_pictures(out)
    for n, (key, encoded, _) in enumerate(records):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uris["", key].partition(",")[2]))).convert("RGB"))
        assert np.array_equal(shown, np.asarray(Image.open(io.BytesIO(encoded)))), n
    # A page beside the predictions gives its pictures to the next one.
    (folder / "report.html").write_bytes(out.read_bytes())
    assert main(["report", "--run", str(folder), "--out", str(tmp_path / "again.html")]) == 0
    assert embedded_pictures(tmp_path / "again.html") == uris
    assert main(["report", "--run", str(folder), "--images", str(tmp_path / "none"), "--out", str(out)]) == 2
    other = write_predictions(tmp_path / "other.jsonl", [*rows, Row("new", "unknown", "", "", "", ())])
    assert main(["report", "--run", str(other), "--images", str(tmp_path / "s"), "--out", str(out)]) == 0
    assert "1 of 9 samples are not in these shards" in capsys.readouterr().out


def test_command_compares_two_runs(tmp_path):
    rows = [Row(str(n), str(n // 2), "k", "?", "yes", ("yes" if n % 5 else "no",)) for n in range(60)]
    better = run_folder(tmp_path / "better", rows)
    worse = run_folder(tmp_path / "worse", [row._replace(prediction="no") for row in rows])
    out = tmp_path / "r.html"
    assert main(["report", "--run", str(better), "--compare", str(worse), "--out", str(out)]) == 0
    page = out.read_text()
    assert "<bdi>better</bdi> is better: the interval of the difference does not hold 0." in page
    assert "+0.6000" in page
    assert "<dt><bdi>better</bdi> better</dt><dd><b>48</b>" in page
    assert "<dt><bdi>worse</bdi> better</dt><dd><b>12</b>" in page
    assert main(["report", "--run", str(worse), "--compare", str(better), "--out", str(out)]) == 0
    assert "<bdi>better</bdi> is better" in out.read_text(), "whichever is first"
    assert main(["report", "--run", str(worse), "--compare", str(worse), "--out", str(out)]) == 0
    assert "No difference is shown" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "p.jsonl", "--out", "p.jsonl"], "--out: expected another file than what is read, got p.jsonl"),
        (["--run", "nowhere", "--out", "r.html"], "expected predictions at nowhere, found none"),
        (["--run", "p.jsonl", "--out", "r.html", "--metric", "CIDEr"], "--metric: expected --scores with 'CIDEr'"),
        (["--run", "p.jsonl", "--out", "r.html", "--max-samples", "0"], "--max-samples: expected at least 1, got 0"),
        (["--run", "p.jsonl", "--out", "r.html", "--picture-budget", "nan"], "--picture-budget: expected MiB"),
        (["--run", "p.jsonl", "--out", "."], "--out: expected the name of a file, got the folder ."),
        (["--run", "p.jsonl", "--out", "r.html", "--compare-scores", "x"], "--compare-scores: expected --compare with it"),
        (["--run", "p.jsonl", "--out", "r.html", "--scores", "x"], "--scores: expected a file, found none at x"),
        (["--run", "p.jsonl", "--out", "r.html", "--visualize", "2"], "--visualize: expected --images with it"),
        (["--run", "p.jsonl", "--out", "r.html", "--visualize", "2", "--images", "s"], "expected a run folder or --checkpoint"),
        (["--run", "p.jsonl", "--out", "r.html", "--visualize", "101"], "--visualize: expected a number of samples from 0"),
        (["--run", "p.jsonl", "--out", "r.html", "--checkpoint", "x"], "--checkpoint: expected --visualize with it"),
        (["--out", "r.html"], "report: the following arguments are required: --run"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_predictions(tmp_path / "p.jsonl", ROWS)
    assert main(["report", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_scores_that_are_no_shares_are_not_called_right(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(
        json.dumps(
            {"items": {row.id: {"CIDEr": 0.1 * n, "accuracy": n % 2, "points": 2.0 * n} for n, row in enumerate(ROWS)}}
        )
    )
    run = read_run(write_predictions(tmp_path / "p.jsonl", ROWS), path)
    write_report(tmp_path / "r.html", run, no_picture)
    data = blocks((tmp_path / "r.html").read_text())["data"]
    assert (data["metrics"], data["shares"], data["primary"]) == (
        ["CIDEr", "accuracy", "points"],
        [False, True, False],
        0,
    )


# Attention and loss ---------------------------------------------------------------------------------------------------


def drawing(seed, title="Mask", words="which token sees which", side=40):
    noise = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    return Drawing(title, words, Image.fromarray(noise))


def test_drawings_are_in_the_page_with_words_for_them(tmp_path):
    drawn = [
        DrawnSample(2, (drawing(0), drawing(1, "<b>Loss</b>", '"red" <0.5> nats'))),
        DrawnSample(0, (), ("Not drawn: <too long>",)),
    ]
    line = write_report(tmp_path / "r.html", run_of(ROWS), no_picture, drawn=drawn)
    assert "2 drawn" in line
    page = (tmp_path / "r.html").read_text()
    assert page.count('<details class="drawn"') == 2
    section = page[page.index('<section id="inside"') :].partition("</section>")[0]
    uris = re.findall(r'<img src="data:image/webp;base64,([^"]+)" width="40" height="40" alt="([^"]*)"', section)
    assert [words for _, words in uris] == ["which token sees which", "&quot;red&quot; &lt;0.5&gt; nats"]
    for seed, (uri, _) in enumerate(uris):  # charts are kept without loss
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
        assert np.array_equal(shown, np.asarray(drawing(seed).picture))
    assert "&lt;b&gt;Loss&lt;/b&gt;" in section
    assert "Not drawn: &lt;too long&gt;" in section
    assert "<b>Loss" not in section
    assert "grün" in section
    assert blocks(page)["data"]["drawn"] == {"2": 2, "0": 0}
    write_report(tmp_path / "r.html", run_of(ROWS), no_picture)
    assert 'id="inside"' not in (tmp_path / "r.html").read_text()


def test_drawings_have_a_budget_and_say_what_it_left_out():
    samples = [DrawnSample(n, (drawing(n),)) for n in range(4)]
    one = len(as_uri(samples[0].drawings[0]))
    section, rows = drawn_section(samples, run_of(ROWS), budget=int(2.5 * one))
    assert rows == [0, 1]
    assert "2 of 4 samples are left out" in section
    assert len(section) < 2.5 * one + 4000
    assert drawn_section(samples, run_of(ROWS))[1] == [0, 1, 2, 3]


def test_two_runs_point_to_the_first_ones_drawings(tmp_path):
    second = [row._replace(prediction="red") for row in reversed(ROWS[1:])]
    write_report(tmp_path / "r.html", run_of(ROWS), no_picture, run_of(second), drawn=[DrawnSample(3, (drawing(0),))])
    data = blocks((tmp_path / "r.html").read_text())["data"]
    ((place, row),) = data["drawn"].items()
    assert (data["id"][int(place)], row) == (ROWS[3].id, 3)


@pytest.mark.parametrize("reference", ["red", "no"])
def test_command_draws_what_the_model_did(reference, tmp_path, capsys):
    model, processor = make_model()
    folder = tmp_path / "run"
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    records = [colour_record(n) for n in range(3)]
    write_shard(tmp_path / "s" / "val-000.tar", records)
    rows = [
        Row(sample["id"], key, sample["kind"], sample["instruction"], "red", (reference,))
        for key, _, payload in records for sample in json.loads(payload)
    ]  # fmt: skip
    rows.insert(0, Row("none", "nowhere", "", "?", "", ("x",)))  # the worst, of which there is no picture
    run_folder(folder, rows)
    out = tmp_path / "r.html"
    arguments = ["report", "--run", str(folder), "--images", str(tmp_path / "s"), "--out", str(out)]
    assert main([*arguments, "--visualize", "2"]) == 0
    assert "2 drawn" in capsys.readouterr().out
    page = out.read_text()
    section = page[page.index('<section id="inside"') :].partition("</section>")[0]
    assert re.findall(r'id="drawn-(\d+)"', section) == ["1", "2"]
    expected = ["Where the answer's words look, mean of 2 layers", "Loss of the answer"]
    expected += ["Loss of what was expected: no"] if reference == "no" else []
    expected += ["Mask", "Attention of layer 0", "Attention of layer 1"]
    titles = [html.unescape(text) for text in re.findall(r"<figcaption><bdi>(.*?)</bdi>", section)]
    assert titles == 2 * expected
    words = [html.unescape(text) for text in re.findall(r'alt="(.*?)"', section)][: len(expected)]
    trace = trace_sample(model, processor, [Image.open(io.BytesIO(records[0][1]))], "which colour?", "red")
    assert f"r {trace.losses[0]:.2f}; e {trace.losses[1]:.2f}; d {trace.losses[2]:.2f}; </s>" in words[1]
    share = percent(float(trace.image_attention(trace.words[0]).sum()))
    assert f"red {share}; </s>" in words[0]
    to_image = float(
        trace.attention[0][trace.sequence.label_positions.numpy()][:, trace.sequence.regions == 0].sum(1).mean()
    )
    assert f"{percent(to_image)} to the image" in words[-2]
    assert f"{trace.sequence.num_image_tokens} image, " in words[-3]


def test_samples_that_cannot_be_drawn_say_why(tmp_path, capsys):
    model, processor = make_model()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    turns = [
        {"id": "t", "instruction": ["a", "b", "c"], "target": "d"},
        {"id": "long", "instruction": "x", "target": "y"},
    ]
    record = colour_record(0)
    write_shard(tmp_path / "s" / "val-000.tar", [(record[0], record[1], json.dumps(turns).encode())])
    rows = [Row("t", "0000", "", "other words", "e", ("d",)), Row("long", "0000", "", "x" * 5000, "e", ("y",))]
    write_predictions(tmp_path / "p.jsonl", rows)
    arguments = [
        "report",
        "--run",
        str(tmp_path / "p.jsonl"),
        "--images",
        str(tmp_path / "s"),
        "--out",
        str(tmp_path / "r.html"),
    ]
    assert main([*arguments, "--visualize", "5", "--checkpoint", str(tmp_path / "model")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "Not drawn: its turns were put into a template" in page
    assert "Not drawn: sample: expected at most 2048 tokens" in page
    write_predictions(tmp_path / "p.jsonl", [rows[0]._replace(instruction="a\nb\nc")])
    assert main([*arguments, "--visualize", "5", "--checkpoint", str(tmp_path / "model")]) == 0
    assert "Not drawn" not in (tmp_path / "r.html").read_text()


# Loggers --------------------------------------------------------------------------------------------------------------


def test_pictures_go_to_whichever_logger_takes_them(photos, tmp_path):
    from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

    calls = []

    class Wandb(WandbLogger):
        def __init__(self):
            pass

        def log_image(self, key, images, step=None, **kwargs):
            calls.append(("wandb", key, images, step))

    class Client:
        def log_image(self, run_id, image, artifact_file):
            calls.append(("mlflow", run_id, image, artifact_file))

    class MLFlow(MLFlowLogger):
        run_id, experiment = "r1", Client()

        def __init__(self):
            pass

    class Board(TensorBoardLogger):
        class experiment:
            @staticmethod
            def add_image(name, pixels, step, dataformats):
                calls.append(("tensorboard", name, pixels.shape, step, dataformats))

        def __init__(self):
            pass

    for logger in (Wandb(), MLFlow(), Board(), CSVLogger(tmp_path)):
        log_picture(logger, "val/predictions", photos[0], 7)
    assert calls == [
        ("wandb", "val/predictions", [photos[0]], 7),
        ("mlflow", "r1", photos[0], "val/predictions/step=00000007.png"),
        ("tensorboard", "val/predictions", (427, 640, 3), 7, "HWC"),
    ]


def test_facts_are_those_of_fit_or_of_an_evaluation_alone(tmp_path):
    assert facts_of(tmp_path) == {}
    (tmp_path / "config-test.yaml").write_text("seed_everything: 3")
    assert facts_of(tmp_path) == {"Seed": "3"}
    (tmp_path / "config.yaml").write_text("seed_everything: 7")
    assert facts_of(tmp_path) == {"Seed": "7"}


def test_every_evaluation_leaves_a_page_of_its_own(tmp_path, photos):
    from types import SimpleNamespace

    from mmprefix.data.images import UndecodableImageError
    from mmprefix.evaluation.report import PredictionReport
    from mmprefix.evaluation.runner import Evaluation, score_predictions
    from mmprefix.packing import Reference

    def originals(split, record):
        if record == 2:
            raise UndecodableImageError("no image")
        return {0: [photos[0]], 1: []}[record]

    datamodule = SimpleNamespace(originals=originals, baseline=lambda split: ("SVC", {"k": 0.5}))
    trainer = SimpleNamespace(datamodule=datamodule, ckpt_path="runs/x/step=7.ckpt", global_step=7)
    predictions = [(Reference(f"a{n}", f"i{n}", "k", "?", ("x",), (n, 0)), "x") for n in range(3)]
    report = PredictionReport(str(tmp_path), name="predictions-validate")
    report._write_page(trainer, "val", Evaluation(predictions, score_predictions(predictions, {})))
    assert [path.name for path in tmp_path.iterdir()] == ["report-validate.html"]
    page = (tmp_path / "report-validate.html").read_text()
    sources = blocks(page)["pictures"]["sources"]
    assert sources[0].startswith("data:image/webp")
    assert sources[1:] == [NO_PICTURE, "picture can't be read"]
    for text in ("runs/x/step=7.ckpt", "predictions-validate.jsonl", "SVC", "torch "):
        assert text in page


def test_a_page_has_the_scores_that_the_run_was_scored_by():
    """Of each set its own metric, on its own rows; of several sets no number for all."""
    from mmprefix.evaluation.report import page_scores
    from mmprefix.evaluation.runner import Evaluation, score_predictions
    from mmprefix.packing import Reference

    def predictions(dataset, texts, first):
        return [
            (Reference(f"a{n}", f"i{n}", "k", "?", (right,), (n, 0), dataset), said)
            for n, (said, right) in enumerate(texts, first)
        ]

    captions = predictions("captions", [("a red bus", "a red bus"), ("a dog", "two cats on a sofa")], 0)
    questions = predictions("questions", [("yes", "yes"), ("no", "yes")], 2)
    both = [*captions, *questions]
    evaluation = Evaluation(both, score_predictions(both, {"captions": "caption"}, PYTHON))
    rows = [Row(r.id, r.image_id, r.kind, r.instruction, said, r.references, r.dataset) for r, said in both]
    scores = page_scores(evaluation, rows)
    assert scores.primary == "CIDEr"
    assert scores.items["CIDEr"][0] > scores.items["CIDEr"][1]
    assert np.isnan(scores.items["CIDEr"]).tolist() == [False, False, True, True]
    np.testing.assert_array_equal(scores.items["exact match"], [np.nan, np.nan, 1, 0])
    assert scores.corpus == {}
    assert scores.notes[0] == "captions: tokenizer=python, not official"
    alone = page_scores(Evaluation(captions, score_predictions(captions, {"captions": "caption"}, PYTHON)), rows[:2])
    assert alone.corpus["CIDEr"] == pytest.approx(np.mean(alone.items["CIDEr"]))
    unscored = page_scores(Evaluation(both), rows)
    assert unscored.primary == "exact match"
