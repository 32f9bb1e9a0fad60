"""METEOR and SPICE: the official Java programs, run by ourselves on tokenised captions.

Neither is reimplemented. Both come with the extra ``captions``; SPICE also needs Stanford CoreNLP's models, which
pycocoevalcap's wrapper would download when constructed. Nothing is downloaded here: without them SPICE is unavailable.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Final

import numpy as np

import mmprefix.metrics.java as java
from mmprefix.metrics.ngrams import CaptionCorpus, Floats

METEOR_JAR: Final = "meteor/meteor-1.5.jar"
SPICE_JAR: Final = "spice/spice-1.0.jar"
SPICE_MODELS: Final = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")
TIMEOUT: Final = 4 * 3600.0
"""Seconds; METEOR takes about 44 for 5,000 images."""

# Numbers with points and text in UTF-8, whatever the machine's language.
_LOCALE: Final = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")
_SEPARATOR: Final = "|||"


def meteor(corpus: CaptionCorpus, timeout: float = TIMEOUT) -> tuple[float, Floats]:
    """METEOR 1.5 of the corpus, and of each image (Denkowski and Lavie, 2014).

    The corpus score is computed from summed statistics; it is not the mean of the images' scores.

    Returns:
        a float, and float64 ``[I]``; in [0, 1].

    Raises:
        JavaUnavailableError: it cannot be run, or answered with another number of lines.
    """
    program: list[str | Path] = [
        "-Xmx2G",
        *_LOCALE,
        "-jar",
        java.jar(METEOR_JAR),
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]
    lines = [
        f" {_SEPARATOR} ".join(("SCORE", *map(_one_field, references), _one_field(prediction)))
        for prediction, references in zip(corpus.predictions, corpus.references, strict=True)
    ]
    # It gives a line of statistics for each, and scores when it is handed all of these: one process, which takes
    # seconds to read its tables, and is spoken to line by line.
    with java.conversation(program, timeout) as ask:
        statistics = [ask(line) for line in lines]
        answers = [ask(f" {_SEPARATOR} ".join(("EVAL", *statistics))), *(ask(None) for _ in lines)]
    try:
        *images, total = map(float, answers)
    except ValueError as error:
        raise java.JavaUnavailableError(f"{Path(METEOR_JAR).name} gave no score: {error}") from None
    return total, np.array(images)


def _one_field(caption: str) -> str:
    """A caption that cannot be taken for several: the separator goes from both sides, the wrapper forgets one."""
    return " ".join(caption.replace(_SEPARATOR, " ").split(" "))


def spice(corpus: CaptionCorpus, timeout: float = TIMEOUT) -> tuple[float, Floats]:
    """SPICE's F-score: the mean over images, and of each image (Anderson et al., 2016).

    Returns:
        a float, and float64 ``[I]``; in [0, 1].

    Raises:
        JavaUnavailableError: it cannot be run, its models are missing, or it did not score every image.
    """
    program = java.jar(SPICE_JAR)
    for models in SPICE_MODELS:
        try:
            java.jar(models)
        except java.JavaUnavailableError:
            raise java.JavaUnavailableError(
                f"SPICE needs Stanford CoreNLP 3.6.0, which is not downloaded implicitly: expected {Path(models).name}"
                f" beside pycocoevalcap's {Path(SPICE_JAR).name}, in lib/"
            ) from None
    numbered = enumerate(zip(corpus.predictions, corpus.references, strict=True))
    asked = [{"image_id": n, "test": prediction, "refs": list(references)} for n, (prediction, references) in numbered]
    with tempfile.TemporaryDirectory(prefix="mmprefix-") as name:
        folder = Path(name)
        (folder / "cache").mkdir()
        (folder / "in.json").write_text(json.dumps(asked), encoding="utf-8")
        files: list[str | Path] = [
            folder / "in.json",
            "-cache",
            folder / "cache",
            "-out",
            folder / "out.json",
            "-subset",
            "-silent",
        ]
        java.run(["-Xmx8G", *_LOCALE, "-jar", program, *files], folder, timeout)
        try:
            answers = json.loads((folder / "out.json").read_bytes())
            scores = {answer["image_id"]: float(answer["scores"]["All"]["f"]) for answer in answers}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise java.JavaUnavailableError(f"{program.name} left no scores that can be read: {error!r}") from None
    _expect(len(scores), len(asked), SPICE_JAR)
    values = np.array([scores[n] for n in range(len(asked))])
    return float(values.mean()), values


def _expect(found: int, expected: int, program: str) -> None:
    if found != expected:
        raise java.JavaUnavailableError(f"{Path(program).name} gave {found} answers where {expected} were expected")
