#!/usr/bin/env python3
"""Caption metrics beside the official Python scorers, and the Python tokenizer beside the official one.

    python benchmarks/metrics.py                       5,000 images with 5 references
    python benchmarks/metrics.py --cases scorers --repeats 5
    python benchmarks/metrics.py --smoke               seconds: checks that the benchmark works
    python benchmarks/metrics.py --json rows.json

Cases:
    scorers    seconds of one core (CPU time: the machine may be shared) for BLEU-1 to -4, ROUGE-L and CIDEr, corpus and
               each image, from the same tokens; each by itself, and all three. pycocoevalcap against ours, which counts
               n-grams once for BLEU and CIDEr. Before any time is taken, all scores are equal within 1e-6.
    tokenizer  CIDEr x 100 with the official tokenizer (Java) and with ours, on ordinary and on hostile captions, captions
               that come out differently, and seconds for all of them, Java's start included

Beyond a bound (all three scorers 5 times as fast, CIDEr x 100 equal on ordinary captions and within 0.5 on hostile ones) the
status is 1, except with --smoke.

Captions are made (caption_corpus.py); nothing is loaded. Needs the extra `captions`; the tokenizer case needs Java.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caption_corpus import hostile, make_corpus, ordinary
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from side_by_side import Row, compare, print_header, print_row, take_turns, write_json

from mmprefix.metrics.bleu import bleu
from mmprefix.metrics.captions import score_captions
from mmprefix.metrics.cider import cider
from mmprefix.metrics.ngrams import CaptionCorpus
from mmprefix.metrics.ptb import tokenize
from mmprefix.metrics.rouge import rouge_l
from mmprefix.metrics.treebank import forget

REFERENCES = 5
NOTES: list[str] = []
"""Printed below the table: differences, which have no ratio."""

EQUAL = 1e-6
FASTER = 5.0
"""All three scorers together, against the official ones."""
CIDER_OFF = {"ordinary": 0.0, "hostile": 0.5}
"""Of CIDEr x 100, with our tokenizer."""
PROBLEMS: list[str] = []
"""What lies beyond a bound."""

Measured = tuple[str, str, list[float], list[float]]
"""Peer, metric, its values, ours."""


def seconds(run: Callable[[], Any], clock: Callable[[], float]) -> dict[str, float]:
    """Time of one call."""
    start = clock()
    run()
    return {"seconds": clock() - start}


def scorers(images: int, repeats: int) -> Iterator[Measured]:
    """The official scorers against ours."""
    made = make_corpus(images, num_references=REFERENCES)
    texts = [*made.predictions.values(), *(text for texts in made.references.values() for text in texts)]
    tokens = list(tokenize(texts, "python").captions)
    predictions = tokens[:images]
    references = [tokens[n : n + REFERENCES] for n in range(images, len(tokens), REFERENCES)]
    given, asked = dict(enumerate(references)), {n: [text] for n, text in enumerate(predictions)}

    theirs: dict[str, Callable[[], Any]] = {
        "BLEU": lambda: Bleu(4).compute_score(given, asked, verbose=0),
        "ROUGE-L": lambda: Rouge().compute_score(given, asked),
        "CIDEr": lambda: Cider().compute_score(given, asked),
    }
    # A new corpus each time: it remembers its n-grams.
    ours: dict[str, Callable[[], Any]] = {
        "BLEU": lambda: bleu(CaptionCorpus(predictions, references)),
        "ROUGE-L": lambda: rouge_l(CaptionCorpus(predictions, references)),
        "CIDEr": lambda: cider(CaptionCorpus(predictions, references)),
    }
    for name, run in theirs.items():
        for expected, found in zip(run(), ours[name](), strict=True):
            difference = np.abs(np.asarray(expected) - np.asarray(found)).max()
            assert difference <= EQUAL, f"{name}: differs by {difference}"

    def all_of_ours() -> None:
        corpus = CaptionCorpus(predictions, references)
        bleu(corpus), rouge_l(corpus), cider(corpus)

    theirs["all three"] = lambda: [theirs[name]() for name in ("BLEU", "ROUGE-L", "CIDEr")]
    ours["all three"] = all_of_ours
    for name in theirs:
        values = take_turns(
            {
                "theirs": partial(seconds, theirs[name], time.process_time),
                "ours": partial(seconds, ours[name], time.process_time),
            },
            repeats,
        )
        baseline, value = values["theirs"]["seconds"], values["ours"]["seconds"]
        faster = statistics.median(baseline) / statistics.median(value)
        if name == "all three" and faster < FASTER:
            PROBLEMS.append(f"{name}: expected {FASTER:g} times as fast, got {faster:.2f}")
        yield "pycocoevalcap", f"{name}, seconds of CPU", baseline, value


def tokenizer(images: int, repeats: int) -> Iterator[Measured]:
    """The official tokenizer against ours: what it means for CIDEr, and how long it takes."""
    for caption in (ordinary, hostile):
        made = make_corpus(images, caption, num_references=REFERENCES, seed=1)
        scores = [score_captions(*made, metrics=["cider"], tokenizer=name) for name in ("official", "python")]
        kind = f"{caption.__name__} captions"
        theirs, ours = (100 * result.corpus["CIDEr"] for result in scores)
        if abs(theirs - ours) > CIDER_OFF[caption.__name__]:
            PROBLEMS.append(
                f"{kind}: expected CIDEr x 100 within {CIDER_OFF[caption.__name__]:g}, got {theirs - ours:.6f}"
            )
        yield "official", f"CIDEr x 100, {kind}", [theirs], [ours]
        texts = [*made.predictions.values(), *(text for texts in made.references.values() for text in texts)]
        official, python = (tokenize(texts, name).captions for name in ("official", "python"))
        same = sum(a == b for a, b in zip(official, python, strict=True))
        yield "all", f"{kind} that are equal", [float(len(texts))], [float(same)]

        def run(name: str, texts: list[str] = texts) -> dict[str, float]:
            forget()  # it remembers words
            return seconds(partial(tokenize, texts, name), time.perf_counter)

        values = take_turns({name: partial(run, name) for name in ("official", "python")}, repeats)
        yield "official", f"{kind}, seconds", values["official"]["seconds"], values["python"]["seconds"]
        differing = len(texts) - same
        NOTES.append(
            f"{kind}: CIDEr x 100 differs by {abs(theirs - ours):.6f}, {differing} of {len(texts)} captions do"
        )


CASES: dict[str, Callable[[int, int], Iterator[Measured]]] = {"scorers": scorers, "tokenizer": tokenizer}


def main() -> int:
    """All cases; 1 beyond a bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the rows")
    options = parser.parse_args()
    if options.smoke:
        options.images, options.repeats = 50, 1
    print_header(torch.device("cpu"))
    rows: list[Row] = []
    for case in options.cases:
        if case == "tokenizer" and tokenize(["a"]).reason:
            print(f"tokenizer: left out: {tokenize(['a']).reason}")
            continue
        for peer, metric, baseline, value in CASES[case](options.images, options.repeats):
            rows.append(compare(
                baseline, value, metric=metric, peer=peer, case=case, size=f"{options.images} images", device="cpu",
                dtype="text", vocab=0,
            ))  # fmt: skip
            print_row(rows[-1])
            write_json(options.json, rows)
    print("", *NOTES, *PROBLEMS, sep="\n")
    return int(bool(PROBLEMS) and not options.smoke)


if __name__ == "__main__":
    sys.exit(main())
