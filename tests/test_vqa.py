"""VQA accuracy: equal to the official code's scores, which are kept in `golden/vqa.jsonl`, and to a slow reference."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmprefix.errors import InputError
from mmprefix.metrics.contractions import CONTRACTIONS, VIZWIZ_CONTRACTIONS
from mmprefix.metrics.vqa import VARIANTS, normalized_answer, vqa_accuracy
from tests.reference_answers import reference_vqa_answer, reference_vqav2

# Made by running the code of each variant (docs/metrics.md says which text of it) on 65,000 random pairs of a prediction and
# ten answers: punctuation, numbers, runs of periods, contractions, typographic apostrophes, Unicode, all ten equal, annotators
# in other orders. All scores were equal to those of `vqa_accuracy`, bit for bit; rows on which variants disagree were kept, and
# some others. So were 399 pairs, run in the same way, that take one rule, mark, number word or contraction each.
GOLDEN = [json.loads(line) for line in (Path(__file__).parent / "golden" / "vqa.jsonl").read_text().splitlines()]

_WORDS = [
    "yes",
    "Yes",
    "no",
    "a",
    "the",
    "An",
    "two",
    "none",
    "ten",
    "2",
    "1,000",
    "3.5",
    "cant",
    "Im",
    "girl's",
    "it's",
    "犬",
    "😀",
    "ß",
]
_TEXTS = st.one_of(
    st.sampled_from(_WORDS),
    st.lists(st.sampled_from([*_WORDS, *';/[]"{}()=+\\_-><@`,?!.:\'’', " ", " ", "\n", "\t", "\r", "0", "7", "٣"]), max_size=9).map("".join),
    st.text(max_size=12),
    st.integers(30, 40).map(lambda n: "." * n + " x"),
)  # fmt: skip
_PEOPLE = st.lists(_TEXTS, min_size=1, max_size=3).flatmap(
    lambda some: st.lists(st.sampled_from(some), min_size=10, max_size=10)
)


def test_the_golden_rows_tell_the_variants_apart():
    assert len(GOLDEN) > 400
    for one in VARIANTS:
        assert {round(row["scores"][one], 3) for row in GOLDEN} >= {0, 0.3, 0.6, 0.9, 1}
        for other in VARIANTS:
            assert one == other or any(row["scores"][one] != row["scores"][other] for row in GOLDEN)


@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy_matches_the_official_code_item_by_item(variant):
    for row in GOLDEN:
        assert vqa_accuracy(row["prediction"], row["answers"], variant) == row["scores"][variant], row


@settings(max_examples=150, deadline=None)
@given(_TEXTS)
def test_normal_form_matches_the_reference(text):
    assert normalized_answer(text) == reference_vqa_answer(text)


@settings(max_examples=150, deadline=None)
@given(_PEOPLE, _TEXTS, st.booleans())
def test_accuracy_matches_the_reference(answers, other, answered):
    prediction = answers[0] if answered else other
    assert vqa_accuracy(prediction, answers) == pytest.approx(float(reference_vqav2(prediction, answers)), abs=1e-12)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two  dogs!", "2 dogs"), ("a", ""), ("the none", "0"), ("1,000-2,000", "10002000"), ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"), ("cant", "can't"), ("Im", "im"), ("u.s.a.", "usa"), ("3.5", "3.5"), ("2.", "2"),
        ("." * 33 + "x", ".x"), ("12/25", "12 25"), ("6:30", "6:30"), ("girl's", "girl's"), ("", ""),
    ],
)  # fmt: skip
def test_oddities_by_hand(text, normal):
    assert normalized_answer(text) == normal


def test_when_all_agree_nothing_but_white_space_is_normalised():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("Yes", ["yes"] * 10, "vqav2-2016") == 1


def test_variants_by_hand():
    answers = ["A red one."] * 9 + ["x"]
    assert vqa_accuracy("red 1", answers) == 1
    assert vqa_accuracy("red 1", answers, "vqav2-2016") == 0  # of people's answers, only punctuation goes
    assert vqa_accuracy("the girl s", ["girl's"] * 10, "textvqa") == 0
    assert vqa_accuracy("girl 's", ["girl's"] * 10, "textvqa") == 1
    assert vqa_accuracy("don't", ["dont"] * 9 + ["x"]) == 1
    assert vqa_accuracy("dont", ["don't"] * 10, "vizwiz") == 0  # a typographic apostrophe
    assert vqa_accuracy("dont", ["don’t"] * 10, "vizwiz") == 1


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_matches_of_ten(matches, score):
    assert vqa_accuracy("yes", ["yes"] * matches + ["no"] * (10 - matches)) == pytest.approx(score)


@settings(max_examples=100, deadline=None)
@given(_PEOPLE, _TEXTS, st.sampled_from(sorted(VARIANTS)), st.randoms(use_true_random=False))
def test_range_and_order_of_annotators(answers, prediction, variant, chance):
    score = vqa_accuracy(prediction, answers, variant)
    assert 0 <= score <= 1
    mixed = list(answers)
    chance.shuffle(mixed)
    assert vqa_accuracy(prediction, mixed, variant) == pytest.approx(score, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(_PEOPLE, _TEXTS, st.sampled_from(["vqav2", "textvqa"]))
def test_no_prediction_beats_what_most_people_said(answers, prediction, variant):
    best = max(vqa_accuracy(answer, answers, variant) for answer in answers)
    assert vqa_accuracy(prediction, answers, variant) <= best
    assert best > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_and_very_long_predictions(variant):
    answers = ["red"] * 5 + ["blue"] * 5
    long = " ".join(random.Random(0).choices(["red", "blue,", "1,000", "a...", "😀"], k=10_000))
    assert vqa_accuracy("", answers, variant) == 0
    assert vqa_accuracy(long, answers, variant) == 0
    assert vqa_accuracy("red", answers, variant) == 1


def test_the_tables_of_contractions():
    assert len(CONTRACTIONS) == len(VIZWIZ_CONTRACTIONS) == 120
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert sum("’" in value for value in VIZWIZ_CONTRACTIONS.values()) == 111


def test_input_errors():
    with pytest.raises(InputError, match="expected a variant of VQA accuracy .vqav2, .*got 'vqa'"):
        vqa_accuracy("x", ["x"], "vqa")
    with pytest.raises(InputError, match="got none"):
        vqa_accuracy("x", [])
