"""Caption metrics: against loops, against the official scorers where they are installed, and what must hold of any score."""

import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmarks.caption_corpus import hostile, make_corpus, ordinary
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mmprefix.errors import InputError
from mmprefix.metrics import CaptionMetrics, score_captions
from mmprefix.metrics import java as java_programs
from mmprefix.metrics.bleu import bleu
from mmprefix.metrics.captions import in_order
from mmprefix.metrics.cider import cider
from mmprefix.metrics.java_scorers import meteor
from mmprefix.metrics.ngrams import CaptionCorpus
from mmprefix.metrics.ptb import OFFICIAL, PYTHON, clean, drop_punctuation, official_lines, tokenize
from mmprefix.metrics.rouge import longest_common_subsequences, rouge_l
from mmprefix.metrics.treebank import split_captions
from tests.caption_oracles import bleu_by_counts, cider_by_dicts, lcs_by_table, rouge_by_table

NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
HIGHEST = dict.fromkeys(NAMES, 1.0) | {"CIDEr": 10.0}

needs_official = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap (the extra `captions`) is not installed"
)
needs_java = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="no Java, or pycocoevalcap is not installed",
)

# Few words, so that n-grams repeat within and between captions; doubled spaces, and captions of no word.
tokens = st.lists(st.sampled_from(["a", "dog", "cat", "on", "b\u00a0c", ""]), max_size=9).map(" ".join)
corpora = st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=3)), min_size=1, max_size=6)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def split_pairs(pairs):
    return [prediction for prediction, _ in pairs], [list(references) for _, references in pairs]


def made_tokens(images, caption=ordinary, seed=0):
    made = make_corpus(images, caption, seed=seed)
    texts = [*made.predictions.values(), *(text for texts in made.references.values() for text in texts)]
    tokenized = tokenize(texts, "python").captions
    return list(tokenized[:images]), [list(tokenized[n : n + 5]) for n in range(images, len(tokenized), 5)]


# --- against loops


@quick
@given(corpora)
@example([("", ["a"]), ("a b", ["a b c", "b"])])
def test_scores_match_loops(pairs):
    predictions, references = split_pairs(pairs)
    corpus = CaptionCorpus(predictions, references)
    total, images = bleu(corpus)
    np.testing.assert_allclose(total, bleu_by_counts(predictions, references), rtol=1e-9, atol=1e-12)
    one_by_one = [bleu_by_counts([p], [r]) for p, r in pairs]
    np.testing.assert_allclose(images.T, one_by_one, rtol=1e-9, atol=1e-12)
    for function, expected in (
        (cider, cider_by_dicts(predictions, references)),
        (rouge_l, [rouge_by_table(p, r) for p, r in pairs]),
    ):
        total, images = function(corpus)
        np.testing.assert_allclose(images, expected, rtol=1e-9, atol=1e-12)
        assert math.isclose(total, sum(expected) / len(expected), rel_tol=1e-9, abs_tol=1e-12)


def test_scores_match_loops_on_whole_captions():
    """Hypothesis' captions are short: these have every length, and scores that are neither 0 nor 1."""
    predictions, references = made_tokens(8)
    corpus = CaptionCorpus(predictions, references)
    expected = cider_by_dicts(predictions, references)
    assert 0.5 < sum(expected) / 8 < 9
    np.testing.assert_allclose(cider(corpus)[1], expected, rtol=1e-9)
    np.testing.assert_allclose(bleu(corpus)[0], bleu_by_counts(predictions, references), rtol=1e-9)
    np.testing.assert_allclose(
        rouge_l(corpus)[1], [rouge_by_table(p, r) for p, r in zip(predictions, references, strict=True)]
    )


@quick
@given(
    st.lists(st.sampled_from("abc"), max_size=90), st.lists(st.lists(st.sampled_from("abcd"), max_size=90), max_size=3)
)
def test_bit_parallel_subsequence_matches_table(words, others):
    assert longest_common_subsequences(words, others) == [lcs_by_table(words, other) for other in others]


# --- against the official scorers


@needs_official
@pytest.mark.parametrize("caption", [ordinary, hostile])
def test_scores_match_the_official_scorers(caption):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    predictions, references = made_tokens(150, caption, seed=3)
    predictions[3], predictions[4], references[5][1] = "", "dog", ""
    corpus = CaptionCorpus(predictions, references)
    expected = {name: [text] for name, text in enumerate(predictions)}
    given_references = dict(enumerate(references))
    for ours, (total, images) in (
        (bleu(corpus), Bleu(4).compute_score(given_references, expected, verbose=0)),
        (rouge_l(corpus), Rouge().compute_score(given_references, expected)),
        (cider(corpus), Cider().compute_score(given_references, expected)),
    ):
        np.testing.assert_allclose(ours[0], total, rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours[1], images, rtol=0, atol=1e-9)


# --- what must hold of any score

texts = st.text(max_size=40) | st.sampled_from(
    ["", ".", "A dog 🐶.", "a ||| b", "犬 が いる", "a\u2028b\r\n", "\ud83d"]
)
raw_corpora = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5)


def by_id(pairs):
    return {str(n): p for n, (p, _) in enumerate(pairs)}, {str(n): r for n, (_, r) in enumerate(pairs)}


def score(predictions, references):
    return score_captions(predictions, references, tokenizer="python")


@quick
@given(raw_corpora)
def test_any_text_has_scores_within_range(pairs):
    scores = score(*by_id(pairs))
    assert set(scores.corpus) == set(NAMES)
    for name, total in scores.corpus.items():
        assert list(scores.items[name]) == [str(n) for n in range(len(pairs))]
        for value in (total, *scores.items[name].values()):
            assert -1e-12 <= value <= HIGHEST[name] + 1e-9, name


@quick
@given(corpora, st.randoms(use_true_random=False))
def test_order_of_images_and_of_references_does_not_matter(pairs, shuffler):
    predictions, references = by_id(pairs)
    order = list(references)
    shuffler.shuffle(order)
    shuffled = {name: shuffler.sample(references[name], len(references[name])) for name in order}
    one, other = score(predictions, references), score(predictions, shuffled)
    for name in NAMES:
        assert math.isclose(one.corpus[name], other.corpus[name], rel_tol=1e-9, abs_tol=1e-12)
        for key, value in one.items[name].items():
            assert math.isclose(value, other.items[name][key], rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_identical_prediction_scores_highest(seed):
    made = make_corpus(20, seed=seed)
    references = {name: texts[:1] for name, texts in made.references.items()}
    best = score({name: texts[0] for name, texts in references.items()}, references)
    for name in NAMES:
        assert math.isclose(best.corpus[name], HIGHEST[name], rel_tol=1e-6), name
    assert score(made.predictions, references).corpus["CIDEr"] < 8, "other captions must not reach it"


@quick
@given(raw_corpora | corpora)
def test_no_prediction_scores_higher_than_its_only_reference(pairs):
    """Of each image and of the corpus: by every metric, whatever the text, other images' references included."""
    predictions, references = by_id(pairs)
    references = {name: texts[:1] for name, texts in references.items()}
    best = score({name: texts[0] for name, texts in references.items()}, references)
    for number in range(len(pairs)):
        predictions |= {str(number): references[str((number + 1) % len(pairs))][0]} if number % 2 else {}
    other = score(predictions, references)
    for name in NAMES:  # BLEU of a reference without words is not quite 0
        assert other.corpus[name] <= best.corpus[name] + 1e-6, name
        for key, value in other.items[name].items():
            assert value <= best.items[name][key] + 1e-6, name


@quick
@given(st.integers(1, 10_000), st.sampled_from(["dog", "🐶 ", "a, b", "naïve\u0301", "1,000"]))
def test_any_number_of_any_words_has_a_score(number, word):
    scores = score({"1": " ".join([word] * number), "2": "a cat"}, {"1": ["a dog runs", word], "2": ["a cat sits"]})
    assert all(0 <= value <= HIGHEST[name] + 1e-9 for name, value in scores.corpus.items())


def test_empty_prediction_scores_zero():
    made = make_corpus(5)
    scores = score({**made.predictions, "2": " .\n"}, made.references)
    assert scores.items["CIDEr"]["1"] > 0
    for name in NAMES:
        assert scores.items[name]["2"] < 1e-12
    nothing = score(dict.fromkeys(made.predictions, ""), made.references)
    assert max(nothing.corpus.values()) < 1e-12


def test_references_without_a_word_do_not_crash():
    """The official CIDEr raises here; ROUGE-L takes an empty caption for one empty token, as the official one does."""
    assert score({"1": ""}, {"1": ["."]}).corpus == dict.fromkeys(NAMES, 0.0) | {"ROUGE-L": 1.0} | {
        name: pytest.approx(0, abs=1e-12) for name in NAMES[:4]
    }


def test_prediction_of_ten_thousand_words():
    made = make_corpus(3)
    long = " ".join(random.Random(0).choices(["a", "man", "riding", "🐶", "dog's"], k=10_000))
    scores = score({**made.predictions, "0": long}, {**made.references, "1": [long, "a man"]})
    assert 0 < scores.items["ROUGE-L"]["0"] < 0.5
    assert scores.items["CIDEr"]["0"] < 1e-12


def test_a_corpus_of_one_image_has_no_cider():
    made = make_corpus(2)
    one = score({"0": made.predictions["0"]}, {"0": made.references["0"]})
    assert one.corpus["CIDEr"] == 0
    assert one.corpus["BLEU-1"] > 0.1


# --- tokens

TOKENS = {
    'A man\'s dog isn\'t on the "red" bench.': "a man 's dog is n't on the red bench",
    "It's 5:30 p.m. on Mr. Smith's clock.": "it 's 5:30 p.m. on mr. smith 's clock",
    "a black-and-white cat; $5.99 and 50% off 1/2": "a black-and-white cat $ 5.99 and 50 % off 1/2",
    "can't cannot gonna y'all 'em ma'am o'clock": "ca n't can not gon na y' all 'em ma'am o'clock",
    "(left) [right] !! ?! * & /": "-lrb- left -rrb- -lsb- right -rsb- !! ?! * & /",
    "1 1/2 (555) 123-4567": "1\u00a01/2 -lrb-555-rrb-\u00a0123-4567",
    "£5 €6 ½ ¢7 ❤ 🐶 ☕": "# 5 $ 6 1/2 cents 7 ❤ ☕",
    "dog,cat dog.cat a tv. a t.v. etc., no. 5 no.": "dog cat dog.cat a tv a t.v. etc. no. 5 no",
    "the plan B. The dog vs. a cat": "the plan b the dog vs. a cat",
    "w/ and/or AT&T a&b #tag @me a@b.com www.a.com/bc": "w / and/or at&t a & b #tag @me a@b.com www.a.com/bc",
    "’tis “a” — b… dog’s": "tis a b dog 's",
    " . , ": "",
}  # fmt: skip


@pytest.mark.parametrize("caption", TOKENS)
def test_python_tokens(caption):
    assert tokenize([caption], "python").captions == (TOKENS[caption],)


@needs_java
def test_known_tokens_are_the_official_ones():
    assert tokenize(list(TOKENS), "official").captions == tuple(TOKENS.values())


@needs_java
@pytest.mark.parametrize(("caption", "bound"), [(ordinary, 0.0), (hostile, 0.5 / 150)], ids=["ordinary", "hostile"])
def test_python_tokens_match_the_official_ones(caption, bound):
    """The bound is a share of the CIDEr: 0.5 of 150."""
    made = make_corpus(400, caption, seed=11)
    official = score_captions(*made, tokenizer="official")
    python = score_captions(*made, tokenizer="python")
    assert (official.tokenizer, python.tokenizer) == (OFFICIAL, PYTHON)
    assert 0.5 < official.corpus["CIDEr"] < 9
    assert abs(official.corpus["CIDEr"] - python.corpus["CIDEr"]) <= bound * official.corpus["CIDEr"]
    if caption is ordinary:
        assert official.items == python.items
        assert official.corpus == python.corpus


@needs_java
def test_no_character_shifts_the_captions_behind_it():
    odd = [chr(code) for code in (*range(1, 0x20), 0x7F, *range(0x80, 0xA1), 0x2028, 0x2029, 0xFEFF, 0xD83D, 0x1F436)]
    lines = [text for character in odd for text in (f"a{character}b", f"dog {character}", "a marker")]
    captions = tokenize(lines, "official").captions
    assert set(captions[2::3]) == {"a marker"}
    assert len(captions) == len(lines)


@needs_java
def test_captions_without_a_token_keep_their_places():
    for lines in (["", "a dog", "", ""], [""], ["", ""], ["a dog", " "]):
        assert tokenize(lines, "official").captions == tuple(line.strip() for line in lines)
    assert tokenize([], "official").captions == ()


@needs_java
def test_a_letter_at_the_end_is_read_with_the_next_caption():
    """An oddity of the official program, which the python tokenizer has, too."""
    lines = ["plan B.", "The dog", "plan B.", "a dog", "in the U.S.", "The dog", "plan B.", "A", "end"]
    expected = [drop_punctuation(line) for line in official_lines(lines)]
    assert expected[0] != expected[2], "the oddity must be there"
    assert [drop_punctuation(" ".join(tokens)) for tokens in split_captions(lines)] == expected


@needs_java
def test_short_words_keep_their_period_where_the_official_program_keeps_it():
    """Every word of two letters in three spellings, and those of three that either side may keep."""
    two = [a + b for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    words = [*two, "ave", "dog", "cat", "jan", "ill", "ark", "del", "tex", "figs", "wash", "mass", "phd"]
    lines = [f"go {spelled}. x" for word in words for spelled in (word, word.capitalize(), word.upper())]
    expected = official_lines(lines)
    assert [" ".join(tokens) for tokens in split_captions(lines)] == expected
    assert 60 < sum(line.split()[1].endswith(".") for line in expected) < 300


def test_the_last_prediction_is_not_read_with_the_first_reference():
    """The official code tokenizes both by themselves."""
    assert score({"1": "A plan B."}, {"1": ["A plan B."]}).corpus["BLEU-1"] == pytest.approx(1)


_ENDS_IN_A_LETTER = [
    "this is plan B.",
    "The dog runs",
    "this is plan B.",
    "a dog with plan B.",
    "he has vitamin C.",
    "A cat",
]


@pytest.mark.parametrize("tokenizer", ["python", pytest.param("official", marks=needs_java)])
def test_scores_are_the_same_in_any_order_of_images_and_in_the_metric(tokenizer):
    """Although tokens of captions that end in a letter depend on which caption comes next."""
    names = ["9", "10", "a", "100", "B", "2"]
    captions = dict(zip(names, _ENDS_IN_A_LETTER, strict=True))
    references = {name: [text.replace("plan B.", "a plan b"), text] for name, text in captions.items()}
    mixed = dict(sorted(captions.items(), reverse=True))
    lines = [dict(zip(order, split_captions(list(order.values())), strict=True)) for order in (captions, mixed)]
    assert lines[0] != lines[1], "the order must matter to the tokenizer"
    expected = score_captions(captions, references, tokenizer=tokenizer)
    other = score_captions(captions, {name: references[name] for name in mixed}, tokenizer=tokenizer)
    assert (other.corpus, other.items) == (expected.corpus, expected.items)
    assert list(other.items["CIDEr"]) == list(mixed)
    metric = CaptionMetrics(tokenizer=tokenizer)
    for name in mixed:
        metric.update([name], [captions[name]], [references[name]])
    metric.compute()
    assert (metric.scores.corpus, metric.scores.items) == (expected.corpus, expected.items)
    assert in_order(captions) == ["2", "9", "10", "100", "B", "a"]


def test_clean_leaves_one_line():
    assert clean("a\rb\vc\fd\u2028e\u2029f\x85g\nh\x1ci") == "a b c d e f g h i"
    assert clean("x\ud83dy") == "x\ufffdy"


# --- Java that is missing, old, or ill


def fake_java(folder, monkeypatch, version, body="exit 0"):
    folder.mkdir(exist_ok=True)
    program = folder / "java"
    program.write_text(
        f"#!{sys.executable}\nimport sys, time\nif sys.argv[1] == '-version':\n"
        f"    sys.exit(print('openjdk version \"{version}\"', file=sys.stderr))\n{body}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    java_programs._version.cache_clear()


@needs_official
@pytest.mark.parametrize(
    ("version", "body", "message"),
    [
        ("1.7.0_80", "", "tokenizer=official: Java 7 at {java}: expected 8 or newer"),
        ("17.0.1", "sys.exit('Error: no memory')", "tokenizer=official: stanford-corenlp-3.4.1.jar ended with status 1: Error: no memory"),
        ("17.0.1", "print('a\\nb\\nc')", "tokenizer=official: stanford-corenlp-3.4.1.jar gave 3 lines for 2 captions"),
        ("17.0.1", "print('a')", "tokenizer=official: stanford-corenlp-3.4.1.jar gave 1 lines for 2 captions"),
        ("17.0.1", "time.sleep(60)", "tokenizer=official: stanford-corenlp-3.4.1.jar took longer than 1 s and was ended"),
    ],
    ids=["old", "fails", "more lines", "fewer lines", "hangs"],
)  # fmt: skip
def test_java_that_does_not_work_is_a_clear_line(tmp_path, monkeypatch, version, body, message):
    fake_java(tmp_path / "bin", monkeypatch, version, body)
    with pytest.raises(InputError) as error:
        tokenize(["a", "b"], "official", timeout=1)
    assert str(error.value) == message.format(java=tmp_path / "bin" / "java")
    fallen_back = tokenize(["a", "b"], "auto", timeout=1)
    assert (fallen_back.captions, fallen_back.label) == (("a", "b"), "tokenizer=python, not official")
    assert f"tokenizer=official: {fallen_back.reason}" == str(error.value)


@needs_official
def test_no_java(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="^tokenizer=official: no java on PATH: expected Java 8 or newer$"):
        tokenize(["a"], "official")
    scores = score_captions({"1": "a"}, {"1": ["a"]}, metrics=["cider", "meteor", "spice"])
    assert set(scores.corpus) == set(scores.items) == {"CIDEr"}
    assert scores.unavailable["METEOR"] == "no java on PATH: expected Java 8 or newer"
    assert set(scores.unavailable) == {"METEOR", "SPICE"}
    assert (scores.tokenizer, scores.tokenizer_reason) == (PYTHON, "no java on PATH: expected Java 8 or newer")


def test_no_extra(monkeypatch):
    monkeypatch.setattr(java_programs, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pycocoevalcap is not installed: pip install 'mmprefix\[captions\]'"):
        tokenize(["a"], "official")


@needs_official
def test_spice_reads_what_its_program_writes(tmp_path, monkeypatch):
    """Its models are not downloaded, so the program is a stand-in; the file formats are the real ones."""
    body = (
        "import json\n"
        "asked = json.load(open(next(a for a in sys.argv if a.endswith('in.json'))))\n"
        "scores = [{'image_id': a['image_id'], 'scores': {'All': {'f': len(a['refs']) / 10}}} for a in asked[::-1]]\n"
        "json.dump(scores, open(sys.argv[sys.argv.index('-out') + 1], 'w'))"
    )
    fake_java(tmp_path / "bin", monkeypatch, "17.0.1", body)
    refused = score_captions({"x": "a"}, {"x": ["a"]}, metrics=["spice"], tokenizer="python")
    assert refused.corpus == {}
    assert "not downloaded implicitly" in refused.unavailable["SPICE"]
    monkeypatch.setattr(java_programs, "jar", lambda path: tmp_path / path)
    scores = score_captions({"x": "a", "y": "b"}, {"x": ["a"], "y": ["b", "c"]}, metrics=["spice"], tokenizer="python")
    assert scores.items["SPICE"] == {"x": 0.1, "y": 0.2}
    assert scores.corpus["SPICE"] == pytest.approx(0.15)


@needs_java
@pytest.mark.timeout(900)
def test_meteor_is_the_official_program_and_text_cannot_shift_it():
    """Two images of equal captions around one that holds the separator, line breaks and nothing else."""
    same = ("a man rides a horse", ["a man riding a horse", "a man on a horse"])
    corpus = CaptionCorpus([same[0], "||| a |||", "", same[0]], [same[1], ["||| b", ""], ["a dog"], same[1]])
    total, images = meteor(corpus)
    assert images[0] == images[3]
    assert 0.3 < images[0] < 1
    assert (images[1], images[2]) == (0, 0)
    assert 0 < total < 1


def test_meteor_that_ends_early_is_unavailable(tmp_path, monkeypatch):
    fake_java(tmp_path / "bin", monkeypatch, "17.0.1", "print(input(), flush=True); sys.exit('Exception: heap')")
    monkeypatch.setattr(java_programs, "jar", lambda path: tmp_path / path)
    scores = score_captions(
        {"x": "a", "y": "b"}, {"x": ["a"], "y": ["b"]}, metrics=["meteor", "cider"], tokenizer="python"
    )
    assert scores.unavailable == {"METEOR": "meteor-1.5.jar ended with status 1 before it was done: Exception: heap"}
    assert list(scores.corpus) == ["CIDEr"]


# --- bad input


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "expected one or more items, got an empty split"),
        ({"1": "a"}, {}, "expected one or more items, got an empty split"),
        (
            {"x": "a", "y": "a"}, {str(n): ["a"] for n in range(12)},
            "expected a prediction for each of 12 ids and no others, got 12 missing (0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more), 2 unknown (x, y)",
        ),
        ({"1": 3}, {"1": ["a"]}, "prediction of id '1': expected a string, got int 3"),
        ({"1": None}, {"1": ["a"]}, "prediction of id '1': expected a string, got NoneType None"),
        ({"1": "a"}, {"1": []}, "references of id '1': expected at least one, got none"),
        ({"1": "a"}, {"1": "a dog"}, "references of id '1': expected a list of strings, got str 'a dog'"),
        ({"1": "a"}, {"1": ["a", 1.5]}, "references of id '1': expected strings, got float 1.5"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(predictions, references, message):
    with pytest.raises(InputError) as error:
        score_captions(predictions, references)
    assert str(error.value) == message


def test_unknown_metric_and_tokenizer_are_named():
    with pytest.raises(
        InputError, match="^metrics: expected some of bleu, rouge_l, cider, meteor, spice, got 'CIDEr'$"
    ):
        score_captions({"1": "a"}, {"1": ["a"]}, metrics=["CIDEr"])
    with pytest.raises(InputError, match="^tokenizer: expected auto, official or python, got 'ptb'$"):
        score_captions({"1": "a"}, {"1": ["a"]}, tokenizer="ptb")
    with pytest.raises(InputError, match="^caption 1: expected a string, got int: 7$"):
        tokenize(["a", 7])
    with pytest.raises(InputError, match="got 2 predictions and 1 sets of references"):
        CaptionCorpus(["a", "b"], [["a"]])


def test_scoring_does_not_import_torch():
    script = (
        "import sys; sys.argv = ['-m']\n"  # as `python -m mmprefix` does: the package registers no models
        "from mmprefix.metrics import exact_match, score_captions\n"
        "print(score_captions({'1': 'a dog'}, {'1': ['a dog']}, tokenizer='python').corpus['BLEU-1'] > 0.99)\n"
        "print(exact_match('a', ['a']), 'torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "True", "False"]


# --- in the loop, across ranks

SAMPLES = 101


def _score_as_rank(rank, world, folder, queue):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    made = make_corpus(SAMPLES)
    names = list(made.predictions)
    mine = names[rank::world]
    mine += names[: -(-SAMPLES // world) - len(mine)]  # samplers pad ranks with samples of the beginning
    metric, idle = CaptionMetrics(tokenizer="python"), CaptionMetrics(tokenizer="python")
    for start in range(0, len(mine), 8):
        batch = mine[start : start + 8]
        metric.update(batch, [made.predictions[n] for n in batch], [made.references[n] for n in batch])
    if rank == 0:  # the other rank has no batch at all
        idle.update(names[:9], [made.predictions[n] for n in names[:9]], [made.references[n] for n in names[:9]])
    values = {name: float(value) for name, value in metric.compute().items()}
    few = {name: float(value) for name, value in idle.compute().items()}
    metric.reset()
    queue.put((rank, len(mine), values, metric.scores.items, few, len(idle.scores.items["CIDEr"])))
    dist.destroy_process_group()


def test_two_ranks_match_one(tmp_path):
    context = mp.get_context("spawn")
    queue = context.Queue()
    for rank in range(2):
        context.Process(target=_score_as_rank, args=(rank, 2, tmp_path, queue), daemon=True).start()
    ranks = sorted((queue.get(timeout=600) for _ in range(2)), key=lambda result: result[0])
    assert sum(result[1] for result in ranks) == SAMPLES + 1, "one sample must be there twice"
    made = make_corpus(SAMPLES)
    alone = CaptionMetrics(tokenizer="python")
    alone.update(list(made.predictions), list(made.predictions.values()), list(made.references.values()))
    expected = {name: float(value) for name, value in alone.compute().items()}
    assert expected["CIDEr"] > 0.5
    for _, _, values, items, few, images in ranks:
        assert values == expected
        assert items == alone.scores.items
        assert list(items["CIDEr"]) == in_order(made.predictions)
        assert images == 9
        assert few["CIDEr"] > 0
    assert ranks[0][4] == ranks[1][4]
    assert expected["CIDEr"] == pytest.approx(score(*made).corpus["CIDEr"], rel=1e-6)


def test_metric_scores_the_split_and_not_its_batches():
    made = make_corpus(6)
    metric = CaptionMetrics(tokenizer="python")
    for name in made.predictions:
        metric.update([name], [made.predictions[name]], [made.references[name]])
    metric.update([], [], [])
    values = metric.compute()
    assert float(values["CIDEr"]) == pytest.approx(score(*made).corpus["CIDEr"])
    assert float(values["CIDEr"]) > 0, "the mean over images by themselves is 0"
    assert values["CIDEr"].dtype == torch.float32
    assert json.loads(json.dumps(metric.scores.items)) == metric.scores.items
    metric.reset()
    with pytest.raises(InputError, match="^expected one or more items, got an empty split$"):
        metric.compute()


def test_metric_takes_an_image_once_and_refuses_two_captions_of_it():
    metric = CaptionMetrics(metrics=["cider"], tokenizer="python")
    metric.update(["1", "2", "1"], ["a dog", "a\u2028cat", "a dog"], [["a dog"], ["a cat"], ["a dog"]])
    metric.compute()
    assert metric.scores.items == {"CIDEr": {"1": pytest.approx(5.0), "2": pytest.approx(5.0)}}
    metric.update(["2"], ["a fish"], [["a cat"]])
    with pytest.raises(InputError, match=r"^expected one caption for each id, got several different ones for 2$"):
        metric.compute()
    with pytest.raises(InputError, match="got 2 ids, 1 predictions, 1 sets of references"):
        metric.update(["1", "2"], ["a"], [["a"]])
