"""Several sets as one split: what a config says of them, how much of each an epoch takes, and in which order.

An epoch takes a fixed number of records of each set (its quota), spread over the epoch at random. Each set is gone through
in permutations of its own, one pass after the other, across epochs: whatever the quotas, no record of a set comes a second
time before all of them came once. What an epoch is follows from seed and epoch alone, so that it is resumed in O(1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from mmprefix.data.samples import Sample
from mmprefix.errors import InputError
from mmprefix.metrics.captions import ALL_TASKS

StoppingStrategy = Literal["first_exhausted", "all_exhausted"]


@dataclass(frozen=True)
class SetArgs:
    """One set of a split.

    Attributes:
        name: in logs and reports; empty for the only set of a split.
        shards: path, glob, brace range, folder, or a list of them.
        weight: its share of an epoch, relative to the weights of the others.
        size: how many of its records an epoch takes, fewer or more than it has.
        instructions: templates in which ``{instruction}`` stands for the sample's own. Training draws one for each sample
            each time it comes; evaluation takes the first. Without any, the sample's own stands alone.
        metric: what it is scored by in evaluation, as `data.metric`, which stands for it where it has none.
    """

    name: str
    shards: str | tuple[str, ...]
    weight: float | None = None
    size: int | None = None
    instructions: tuple[str, ...] = ()
    metric: str | None = None


@dataclass
class MixtureArgs:
    """How much of each training set an epoch takes, where sets have no `size`.

    Attributes:
        temperature: T in shares proportional to records^(1/T): 1 takes sets as large as they are, more evens them out.
        stopping_strategy: with weights or a temperature, when an epoch ends: `first_exhausted`, when the first set was gone
            through; `all_exhausted`, when the last was, while the others start over.
    """

    temperature: float | None = None
    stopping_strategy: StoppingStrategy = "first_exhausted"

    def check(self) -> None:
        """Refuses what gives no shares.

        Raises:
            InputError: a temperature that isn't above 0.
        """
        if self.temperature is not None and not 0 < self.temperature < np.inf:
            raise InputError(f"data.mixture.temperature: expected a number above 0, got {self.temperature}")


def parse_sets(value: Any, what: str, *, trains: bool) -> tuple[SetArgs, ...]:
    """A split's setting -> its sets.

    Args:
        value: shards, or a mapping of names to shards or to the fields of `SetArgs`.
        what: the setting, for messages.
        trains: whether weights and sizes make sense.

    Raises:
        InputError: naming the set, what was expected and what came.
    """
    if not isinstance(value, Mapping):
        return (SetArgs("", value if isinstance(value, str) else tuple(value)),)
    if not value:
        raise InputError(f"{what}: expected shards, or sets by name, got {{}}")
    sets = tuple(_parse_set(str(name), entry, f"{what}.{name}", trains) for name, entry in value.items())
    weighted = [one.name for one in sets if one.weight is not None]
    if weighted and len(weighted) < len(sets):
        missing = next(one.name for one in sets if one.weight is None)
        raise InputError(f"{what}.{missing}: expected a weight, as {weighted[0]} has one, got none")
    return sets


def _parse_set(name: str, entry: Any, where: str, trains: bool) -> SetArgs:
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{where}: expected a name of letters, digits, '-', '_' and '.', got {name!r}")
    given = dict(entry) if isinstance(entry, Mapping) else {"shards": entry}
    known = [f.name for f in fields(SetArgs) if f.name != "name"]
    for key in given:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"{where}: expected {', '.join(known)}, got {key!r}{hint}")
    shards, weight, size = given.get("shards"), given.get("weight"), given.get("size")
    if not isinstance(shards, Sequence) or not shards or not all(isinstance(entry, str) for entry in shards):
        raise InputError(f"{where}.shards: expected a path, glob or folder, or a list of them, got {shards!r}")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < np.inf
    ):
        raise InputError(f"{where}.weight: expected a number above 0, got {weight!r}")
    if size is not None and (type(size) is not int or size < 1):
        raise InputError(f"{where}.size: expected a number of records above 0, got {size!r}")
    if weight is not None and size is not None:
        raise InputError(f"{where}: expected a weight or a size, got both")
    if not trains and (weight is not None or size is not None):
        raise InputError(f"{where}: expected no weight and no size: each record is evaluated once")
    metric = given.get("metric")
    if metric is not None and trains:
        raise InputError(f"{where}.metric: expected none: training is not scored")
    if metric is not None:
        check_metric(metric, f"{where}.metric")
    return SetArgs(
        name, shards if isinstance(shards, str) else tuple(shards), weight, size, _templates(given, where), metric
    )


def check_metric(value: Any, where: str) -> None:
    """Raises InputError where a setting names nothing that a split can be scored by."""
    if value not in ALL_TASKS:
        close = get_close_matches(str(value), ALL_TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"{where}: expected one of {', '.join(ALL_TASKS)}, got {value!r}{hint}")


def _templates(given: Mapping[str, Any], where: str) -> tuple[str, ...]:
    value = given.get("instructions") or ()
    templates = (value,) if isinstance(value, str) else value
    if not isinstance(templates, Sequence) or not all(isinstance(template, str) for template in templates):
        raise InputError(f"{where}.instructions: expected a text or a list of texts, got {value!r}")
    for template in templates:
        for name in re.findall(r"\{(\w*)\}", template):
            if name != "instruction":
                raise InputError(f"{where}.instructions: expected no placeholder but {{instruction}}, got {template!r}")
    return tuple(templates)


def instructed(sample: Sample, template: str) -> Sample:
    """The sample with its last turn in a template."""
    *before, last = sample.turns
    turns = (*before, template.replace("{instruction}", last))
    return Sample(sample.id, sample.image_id, sample.kind, turns, sample.targets, sample.answers, sample.images)


def quotas(sets: Sequence[SetArgs], sizes: Sequence[int], mixture: MixtureArgs) -> tuple[int, ...]:
    """How many records of each set an epoch takes.

    Args:
        sets: of the training split.
        sizes: their numbers of records.
        mixture: see there.

    Raises:
        InputError: more than one of weights, sizes and a temperature.
    """
    weighted, sized = any(s.weight is not None for s in sets), any(s.size is not None for s in sets)
    temperature = mixture.temperature
    if weighted + sized + (temperature is not None) > 1:
        raise InputError("data.mixture: expected one of weights, sizes and data.mixture.temperature, got several")
    if temperature is not None:
        largest = max(sizes)  # ratios to it: powers of large numbers would overflow for small temperatures
        shares = [(size / largest) ** (1 / temperature) for size in sizes]
    elif weighted:
        shares = [float(one.weight or 0) for one in sets]
    else:
        return tuple(size if one.size is None else one.size for one, size in zip(sets, sizes, strict=True))
    lengths = [size / share if share else np.inf for size, share in zip(sizes, shares, strict=True)]
    length = min(lengths) if mixture.stopping_strategy == "first_exhausted" else max(lengths)
    taken = [max(1, round(length * share)) for share in shares]
    if sum(taken) > 2**40:
        raise InputError(
            f"data.mixture: expected an epoch of at most 2^40 records, got {sum(taken):.3g}; even out the shares"
        )
    return tuple(taken)


@dataclass(frozen=True)
class EpochOrder:
    """Which records an epoch takes, in which order.

    Attributes:
        sizes: records of each set, whose numbers follow each other.
        quotas: how many of each an epoch takes.
        seed: of all permutations.
        replacement: whether each draw is from all records of its set.
    """

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    seed: int = 0
    replacement: bool = False

    @classmethod
    def of(cls, num_records: int, seed: int = 0, replacement: bool = False) -> EpochOrder:
        """Of one set."""
        return cls((num_records,), (num_records,), seed, replacement)

    def __len__(self) -> int:
        return sum(self.quotas)

    @property
    def is_plain(self) -> bool:
        """Whether an epoch is every record once."""
        return self.sizes == self.quotas and not self.replacement

    def __call__(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 ``[len]`` each: how many times a record came before (of an epoch that is every record once: the epoch), and
        the record."""
        passes, records, first = [], [], 0
        for number, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            done, most = epoch * quota, (epoch + 1) * quota
            if self.replacement:
                drawn = self._generator(epoch, number).integers(0, size, quota)
                passes.append(np.full(quota, epoch))
                records.append(drawn + first)
            else:
                for one in range(done // size, -(-most // size)):
                    order = np.arange(size)
                    self._generator(one, number).shuffle(order)
                    part = order[max(done - one * size, 0) : most - one * size]
                    passes.append(np.full(len(part), one))
                    records.append(part + first)
            first += size
        all_passes, all_records = np.concatenate(passes), np.concatenate(records)
        if len(self.sizes) > 1:
            order = np.random.default_rng((self.seed, epoch, 0, 1)).permutation(len(self))
            all_passes, all_records = all_passes[order], all_records[order]
        return all_passes, all_records

    def _generator(self, number: int, of_set: int) -> np.random.Generator:
        # numpy fills seeds up with zeros: the first set's are those of a split that is one set.
        return np.random.default_rng((self.seed, number, of_set) if of_set else (self.seed, number))
