"""Bootstrap intervals and the paired test: against loops, against known coverage, whatever the order of items."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmprefix.errors import InputError
from mmprefix.metrics.bleu import bleu, bleu_counts, bleu_of
from mmprefix.metrics.intervals import mean_interval, paired_test, statistic_interval, sums_intervals
from mmprefix.metrics.ngrams import CaptionCorpus

_SCORES = st.lists(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), min_size=1, max_size=30)


def exact_interval(groups, level=0.95):
    """All n^n equally probable draws of images, for few images."""
    means = [
        sum(sum(group) for group in drawn) / sum(len(group) for group in drawn)
        for drawn in itertools.product(groups, repeat=len(groups))
    ]
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2])


def test_interval_matches_all_possible_draws():
    groups = [[0.0, 0.3], [1.0], [0.6, 0.6, 0.9], [0.0], [0.3]]
    scores = [score for group in groups for score in group]
    images = [number for number, group in enumerate(groups) for _ in group]
    low, high = mean_interval(scores, images, level=0.8, resamples=20_000)
    expected = exact_interval(groups, 0.8)
    assert (low, high) == pytest.approx(tuple(expected), abs=0.02)


def test_items_of_one_image_are_drawn_together():
    scores, images = np.repeat([0.0, 1.0] * 10, 50), np.repeat(np.arange(20), 50)
    low, high = mean_interval(scores, images)
    together = high - low
    low, high = mean_interval(scores)
    assert together > 5 * (high - low) > 0


def test_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = mean_interval((generator.random(60) < 0.7).astype(float), resamples=400)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.98


@settings(max_examples=40, deadline=None)
@given(_SCORES, st.randoms(use_true_random=False))
def test_interval_holds_the_mean_in_any_order(scores, chance):
    images = [chance.randrange(6) for _ in scores]
    low, high = mean_interval(scores, images, resamples=200)
    assert min(scores) - 1e-12 <= low <= high <= max(scores) + 1e-12
    pairs = list(zip(scores, images, strict=True))
    chance.shuffle(pairs)
    names = {image: f"image {image}" for image in images}
    mixed = mean_interval([s for s, _ in pairs], [names[i] for _, i in pairs], resamples=200)
    assert mixed == pytest.approx((low, high), abs=1e-12)


def test_the_seed_decides():
    scores = np.random.default_rng(0).random(50)
    assert mean_interval(scores, seed=3) == mean_interval(scores, seed=3)
    assert mean_interval(scores, seed=3) != mean_interval(scores, seed=4)


def test_a_statistic_that_is_the_mean_gets_its_interval():
    scores = np.sort(np.random.default_rng(0).random(80))
    assert statistic_interval(lambda drawn: scores[drawn].mean(), 80) == pytest.approx(mean_interval(scores))


def test_bleus_interval_matches_scoring_corpora_that_were_drawn():
    """Each draw scored as a corpus of its own: images with all of their captions, in the order of the draw."""
    generator = np.random.default_rng(0)
    words = "a dog sits on the red sofa near two old cats".split()

    def caption():
        return " ".join(generator.choice(words, generator.integers(3, 9)))

    captions, references, images = [caption() for _ in range(12)], [[caption(), caption()] for _ in range(12)], []
    for n in range(12):
        images.append(n // 2 if n < 4 else n)
    counts = bleu_counts(CaptionCorpus(captions, references))
    found = sums_intervals(counts, bleu_of, images, resamples=300, seed=1)
    totals = []
    groups = [[n for n in range(12) if images[n] == image] for image in sorted(set(images))]
    for _ in range(3000):
        drawn = [n for g in generator.integers(0, len(groups), len(groups)) for n in groups[g]]
        totals.append(bleu(CaptionCorpus([captions[n] for n in drawn], [references[n] for n in drawn]))[0])
    expected = np.quantile(totals, [0.025, 0.975], axis=0).T
    assert np.asarray(found) == pytest.approx(expected, abs=0.03)
    for n, (low, high) in enumerate(found):
        assert 0 <= low < bleu(CaptionCorpus(captions, references))[0][n] < high <= 1


def exact_p_value(a, b, images):
    """Of all 2^n ways to swap the two models, image by image."""
    sums = {}
    for x, y, image in zip(a, b, images, strict=True):
        sums[image] = sums.get(image, 0) + y - x
    observed = abs(sum(sums.values()))
    swaps = list(itertools.product([1, -1], repeat=len(sums)))
    return sum(
        abs(sum(s * d for s, d in zip(signs, sums.values(), strict=True))) >= observed - 1e-9 for signs in swaps
    ) / len(swaps)


@pytest.mark.parametrize("shift", [0.0, 0.2, 0.5])
def test_p_value_matches_all_possible_swaps(shift):
    generator = np.random.default_rng(5)
    a = generator.random(24)
    b, images = a + shift * generator.random(24) + 0.1 * generator.normal(size=24), np.arange(24) // 2
    found = paired_test(a, b, images, permutations=40_000)
    assert found.p_value == pytest.approx(exact_p_value(a, b, images), abs=0.012)
    assert found.difference == pytest.approx((b - a).mean())
    assert found.low <= found.difference <= found.high


def test_equal_models_and_clearly_different_ones():
    scores = np.random.default_rng(0).random(100)
    same = paired_test(scores, scores)
    assert (same.difference, same.p_value) == (0, 1)
    better = paired_test(scores, scores + 0.1)
    assert better.p_value == 1 / 10_001
    assert better.low == pytest.approx(0.1)
    swapped = paired_test(scores + 0.1, scores)
    assert (swapped.difference, swapped.p_value) == (pytest.approx(-better.difference), better.p_value)


def test_large_splits_are_drawn_in_parts(monkeypatch):
    scores = np.random.default_rng(0).random(64)
    whole = mean_interval(scores, resamples=100)
    monkeypatch.setattr("mmprefix.metrics.intervals._AT_ONCE", 640)
    assert mean_interval(scores, resamples=100) == whole


def test_input_errors():
    for call in (
        lambda: mean_interval([]),
        lambda: mean_interval([1.0, 0.0], ["one"]),
        lambda: mean_interval([1.0], level=1.0),
        lambda: mean_interval([1.0], resamples=0),
        lambda: statistic_interval(np.mean, 0),
        lambda: paired_test([1.0], [1.0, 0.0]),
    ):
        with pytest.raises(InputError, match="expected"):
            call()
    assert mean_interval([0.3]) == (0.3, 0.3)
