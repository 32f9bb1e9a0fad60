"""ANLS, relaxed accuracy, choices, answerability, and the entry for all tasks; as torchmetrics, too."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from sklearn.metrics import f1_score as sklearn_f1

from mmprefix.errors import InputError
from mmprefix.metrics import AnswerMetric
from mmprefix.metrics.anls import anls, edit_distance
from mmprefix.metrics.answerability import average_precision, f1_score
from mmprefix.metrics.answers import TASKS, AnswerReference, score_answers
from mmprefix.metrics.choice import chosen_letter
from mmprefix.metrics.relaxed_accuracy import relaxed_accuracy
from tests.reference_answers import reference_edit_distance

_TEXT = st.one_of(st.text(max_size=10), st.text("abAB ßİ0", max_size=10))


@settings(max_examples=100, deadline=None)
@given(_TEXT, _TEXT)
def test_edit_distance_matches_the_reference(a, b):
    assert edit_distance(a, b) == reference_edit_distance(a, b)


@settings(max_examples=150, deadline=None)
@given(_TEXT, st.lists(_TEXT, min_size=1, max_size=3))
def test_anls_matches_the_reference(prediction, answers):
    similarities = []
    for answer in answers:
        a, b = (" ".join(text.strip().lower().split()) for text in (prediction, answer))
        length = max(len(prediction.upper()), len(answer.upper()))
        similarities.append(1 - reference_edit_distance(a, b) / length if length else 1.0)
    best = max(similarities)
    assert anls(prediction, answers) == pytest.approx(best if best >= 0.5 else 0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("abcd", "abxy", 0.5),  # exactly the threshold counts
        ("abcd", "axyz", 0.0), ("Berlin ", "berlin", 1.0), ("", "", 1.0), ("", "abc", 0.0), ("a  b", "a b", 1.0),
        ("ab    cd", "ab", 0.625), ("ab  ", "ac", 0.75),  # lengths are those of the raw texts
        ("ß", "s", 0.5),  # upper case: two letters
    ],
)  # fmt: skip
def test_anls_by_hand(prediction, answer, score):
    assert anls(prediction, [answer]) == score
    assert anls(prediction, ["zzzzzzzzzzzz", answer]) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("105", "100", True), ("95", "100", True), ("105.1", "100", False), ("-100", "100", False), ("50%", "0.5", True),
        ("0", "0", True), ("0.0", "0", False), ("1,000", "1000", False), ("$5", "5", False), ("Yes", "yes", True),
        ("5 ", "5", True), ("five", "5", False), ("", "", True), ("", "5", False), ("nan", "nan", False),
    ],
)  # fmt: skip
def test_relaxed_accuracy_by_hand(prediction, reference, right):
    assert relaxed_accuracy(prediction, reference) is right


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"), (" B\n", "B"), ("(B)", "B"), ("B.", "B"), ("B) a whale", "B"), ("B. A whale", "B"), ("B: x", "B"),
        ("The answer is B.", "B"), ("The answer is (B). BECAUSE: x", "B"), ("I think. The answer is C", "C"),
        ("A whale", None), ("b", None), ("", None), ("E", None), ("The answer is A. The answer is B.", None), ("BC", None),
    ],
)  # fmt: skip
def test_choices_by_hand(prediction, letter):
    assert chosen_letter(prediction, 4) == letter


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.2, 0.5, 0.51, 1.0])), min_size=1, max_size=30))
def test_answerability_matches_scikit_learn(items):
    labels, scores = np.array([label for label, _ in items]), np.array([score for _, score in items])
    assert f1_score(labels, scores > 0.5) == pytest.approx(sklearn_f1(labels, scores > 0.5, zero_division=0))
    assume(labels.any())
    assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores))


@pytest.mark.parametrize(
    ("labels", "scores", "value"),
    [
        ([1, 0], [0.5, 0.5], 1 / 2), ([0, 1], [0.5, 0.5], 1 / 2),  # equal scores are one threshold, whoever comes first
        ([1, 0, 0, 1], [0.9, 0.4, 0.4, 0.4], 1 / 2 * 1 + 1 / 2 * 2 / 4), ([0, 0, 1, 1], [0.4, 0.4, 0.4, 0.9], 3 / 4),
        ([0, 1, 1], [0.9, 0.9, 0.1], 1 / 2 * 1 / 2 + 1 / 2 * 2 / 3), ([1, 1, 0], [0.1, 0.9, 0.9], 7 / 12),
    ],
)  # fmt: skip
def test_equal_scores_are_one_threshold(labels, scores, value):
    assert average_precision(labels, scores) == pytest.approx(value, abs=1e-12)


def test_no_positive_item_has_no_precision():
    assert average_precision([False, False], [0.1, 0.9]) == 0
    with pytest.raises(InputError, match="as many labels"):
        average_precision([], [])


# The entry ------------------------------------------------------------------------------------------------------------


def references_of(task, answers):
    """One question for each list of answers; VQA's tasks get ten people who agree but for one."""
    several = task in ("vqa", "okvqa", "textvqa", "vizwiz")
    return {
        str(n): AnswerReference((*([answer] * 9), "something else") if several else (answer,), f"image {n // 2}")
        for n, answer in enumerate(answers)
    }


# Predictions that are right in every task: words in normal form, letters for choices, no numbers to Python.
_RIGHT = st.sampled_from(["dog", "red", "犬", "😀", "two dogs", "café"])


def rightly(task, words):
    if task == "scienceqa":
        return ["ABCD"[len(word) % 4] for word in words]
    return [word.replace("two", "2") for word in words]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TASKS), st.lists(_RIGHT, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_scores_of_a_split(task, words, chance):
    answers = rightly(task, words)
    references = references_of(task, answers)
    perfect = score_answers(task, dict(zip(references, answers, strict=True)), references)
    assert perfect.corpus[perfect.metric] == 1
    empty = score_answers(task, dict.fromkeys(references, ""), references)
    assert empty.corpus[empty.metric] == 0
    said = {name: chance.choice([*answers, "wrong", ""]) for name in references}
    some = score_answers(task, said, references)
    assert 0 <= some.corpus[some.metric] <= 1
    names = list(references)
    chance.shuffle(names)
    mixed = score_answers(task, {n: said[n] for n in names}, {n: references[n] for n in reversed(names)})
    assert mixed.items == some.items
    assert mixed.corpus[some.metric] == pytest.approx(some.corpus[some.metric], abs=1e-12)
    assert some.corpus[some.metric] == pytest.approx(np.mean([item[some.metric] for item in some.items.values()]))


@pytest.mark.parametrize("task", TASKS)
def test_hostile_predictions(task):
    references = references_of(task, rightly(task, ["dog"]))
    for said in ("x " * 10_000, "👨‍👩‍👧" * 500, "\x00\u2028\r\v", "\ud800", "." * 5000, "%", "1e999%"):
        score = score_answers(task, {"0": said}, references)
        assert score.corpus[score.metric] == 0


def test_kinds_and_their_means():
    references = {
        "1": AnswerReference(("yes",), "a", (("type", "yes/no"), ("topic", "food"))),
        "2": AnswerReference(("no",), "a", (("type", "yes/no"),)),
        "3": AnswerReference(("4",), "b", (("type", "number"), ("topic", "food"), ("topic", "sport"))),
    }
    scores = score_answers("exact", {"1": "yes", "2": "yes", "3": "4"}, references)
    assert scores.kinds["type"]["yes/no"].value == 0.5
    assert scores.kinds["type"]["number"].count == 1
    assert {name: kind.count for name, kind in scores.kinds["topic"].items()} == {"food": 2, "sport": 1}


def test_letters_beyond_the_choices_are_none():
    """Whether there is an E decides whether these name one letter or two."""
    said = "The answer is E. The answer is B."
    scores = score_answers(
        "scienceqa", {"four": said, "five": said},
        {"four": AnswerReference(("B",), num_choices=4), "five": AnswerReference(("B",), num_choices=5)},
    )  # fmt: skip
    assert [of["accuracy"] for of in scores.items.values()] == [1, 0]
    for choices, score in ((4, 1), (5, 0)):
        metric = AnswerMetric("scienceqa")
        metric.update(said, ("B",), num_choices=choices)
        assert metric.compute() == score


def test_the_variant_is_named():
    references = references_of("vqa", ["dog"])
    assert score_answers("vqa", {"0": "dog"}, references).variant == "vqav2 (VQA v2, official code since 2021)"
    assert score_answers("vqa", {"0": "dog"}, references, variant="vqav2-2016").variant.startswith("vqav2-2016 (")
    assert score_answers("textvqa", {"0": "dog"}, references).variant == "textvqa (TextVQA, MMF)"


def test_vizwiz_answerability_of_answers_and_of_probabilities():
    references = {
        str(n): AnswerReference(("x",) * 10, answerable=label) for n, label in enumerate([True, True, False, False])
    }
    said = {"0": "x", "1": "Unanswerable.", "2": "unanswerable", "3": "x"}
    implied = score_answers("vizwiz", said, references).corpus
    assert implied["answerability_f1"] == 0.5
    told = score_answers("vizwiz", said, references, answerable={"0": 0.9, "1": 0.6, "2": 0.4, "3": 0.1}).corpus
    assert told["answerability_f1"] == told["answerability_average_precision"] == 1
    without = score_answers("vizwiz", {"0": "x"}, {"0": AnswerReference(("x",) * 10)})
    assert list(without.corpus) == ["vqa_accuracy"]
    assert without.unavailable == {"answerability": "1 questions have no label `answerable`"}
    all_can = score_answers("vizwiz", {"0": "x"}, {"0": AnswerReference(("x",) * 10, answerable=True)})
    assert list(all_can.corpus) == ["vqa_accuracy"], "no score is not a score of 0"
    assert "all questions can be answered" in all_can.unavailable["answerability"]


def test_input_errors():
    ten = {"1": AnswerReference(("x",) * 10), "2": AnswerReference(("x",) * 10)}
    both = {"1": "x", "2": "x"}
    for error, call in {
        "got 1 missing .2., 1 unknown .3.": lambda: score_answers("vqa", {"1": "x", "3": "x"}, ten),
        "for each of 2 ids and no others, got 1 missing .2.$": lambda: score_answers("exact", {"1": "x"}, ten),
        "for each of 2 ids and no others, got 1 unknown .3.$": lambda: score_answers("exact", both | {"3": "x"}, ten),
        "99 unknown .0, 2, .* and 89 more.": lambda: score_answers("exact", {str(n): "" for n in range(100)} | both, {"1": ten["1"]}),
        "an empty split": lambda: score_answers("vqa", {}, {}),
        "2: expected an answer that is a string, got int": lambda: score_answers("vqa", {"1": "x", "2": 3}, ten),
        "accepted answers, got none": lambda: score_answers("gqa", {"1": "x"}, {"1": AnswerReference(())}),
        "expected the answers of several people": lambda: score_answers("vqa", {"1": "x"}, {"1": AnswerReference(("x",))}),
        "expected a task of vqa": lambda: score_answers("nlvr", both, ten),
        "variant: expected with vqa, okvqa": lambda: score_answers("gqa", both, ten, variant="vqav2"),
        "variant: expected one of vqav2": lambda: score_answers("vqa", both, ten, variant="2020"),
        "answerable: expected a prediction for each": lambda: score_answers(
            "vizwiz", {"1": "x"}, {"1": AnswerReference(("x",) * 10, answerable=True)}, answerable={"2": 1.0}
        ),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=error):
            call()


# torchmetrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_metric_matches_the_entry_over_ranks(task):
    words = rightly(task, ["dog", "red", "two dogs", "犬", "dog"])
    references = references_of(task, words)
    said = dict(zip(references, [words[0]] * 5, strict=True))
    ranks = [AnswerMetric(task), AnswerMetric(task)]
    for n, (name, reference) in enumerate(references.items()):
        ranks[n % 2].update(said[name], reference.answers)
    whole = pickle.loads(pickle.dumps(ranks[0]))
    # What torchmetrics does to states that reduce by sum.
    whole.score, whole.total = ranks[0].score + ranks[1].score, ranks[0].total + ranks[1].total
    scores = score_answers(task, said, references)
    assert 0 < scores.corpus[scores.metric] < 1
    assert whole.compute().item() == pytest.approx(scores.corpus[scores.metric], abs=1e-12)
    assert {reduction.__name__ for reduction in whole._reductions.values()} == {"dim_zero_sum"}


def test_metric_is_a_mean_over_what_it_counted():
    metric = AnswerMetric("exact")
    for number, (said, total) in enumerate((("a", 1.0), ("b", 1 / 2), ("b", 1 / 3), ("a", 2 / 4)), 1):
        metric.update(said, ("a",))
        assert int(metric.total) == number
        assert metric.compute().item() == pytest.approx(total, abs=1e-12)
    metric.reset()
    assert int(metric.total) == 0


def test_metric_without_predictions_and_with_a_wrong_task():
    assert AnswerMetric("vqa").compute().item() == 0
    with pytest.raises(InputError, match="expected a task"):
        AnswerMetric("nlvr")


def test_pure_metrics_import_no_torch():
    """`mmprefix` itself imports its models when it is imported as a library; as a command it doesn't."""
    program = (
        "import sys; sys.argv = ['-m']; import mmprefix.metrics, mmprefix.metrics.answers, mmprefix.metrics.intervals;"
        "print([name for name in ('torch', 'torchmetrics', 'sklearn') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
