"""Records -> batches: the dataset, the order of an epoch, and the collators that run in the workers.

The order of an epoch is a permutation by (seed, epoch). All ranks compute the same one; global batch g is a run of
``batch_size * ranks`` records of it, and each rank takes its part. Augmentation is seeded by (seed, epoch, record), so
neither the number of workers nor a restart changes what a record looks like.

`batch_size` counts records: an image with everything asked about it. With a budget of tokens (`TokenBudgetSampler`), a
batch holds as many records as fit into it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmprefix.data.features import FeatureCache, image_digest
from mmprefix.data.images import RandomAffine, UndecodableImageError, decode_levels
from mmprefix.data.mixture import EpochOrder, SetArgs, instructed
from mmprefix.data.parcel import Parcel
from mmprefix.data.samples import Sample
from mmprefix.data.shards import ShardCollection
from mmprefix.errors import InputError
from mmprefix.masks import PrefixVisibility
from mmprefix.packing import (
    BadSample,
    EvaluationBatch,
    PackedBatch,
    Reference,
    collate,
    collate_prompts,
    first_fit,
    group_by_length,
)
from mmprefix.sequence import TokenSequence
from mmprefix.vision import ImageTransform, as_levels, as_picture

Group = TypeVar("Group", bound=Hashable)
EpochIndex = tuple[int, int]
"""``(pass, record)``: what a sampler hands to the dataset, the pass being how many times the record came before: the epoch,
where an epoch is every record once. Workers outlive epochs and would not hear of a new one."""


class SampleProcessor(Protocol):
    """What the data needs of a processor."""

    prefix_visibility: PrefixVisibility
    shared_prefix: bool

    @property
    def transform(self) -> ImageTransform:
        """The encoder's image transform."""

    @property
    def pad_id(self) -> int:
        """Id that fills rows."""

    def encode(
        self,
        instruction: str | Sequence[str],
        targets: Sequence[str],
        *,
        views: Sequence[int],
        max_instruction_tokens: int | None,
        max_target_tokens: int | None,
        truncate: str,
    ) -> TokenSequence:
        """Text -> token sequence."""


@dataclass(frozen=True)
class TextLimits:
    """Limits in tokens, and which text may be cut at its limit: `none`, `instruction`, `target` or `both`."""

    max_instruction_tokens: int | None
    max_target_tokens: int | None
    truncate: str


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image, ready for the encoder.

    Attributes:
        digest: SHA-256 of the encoded image, in hex; augmented images have one for each record. Records of a batch
            that share it share the image.
        pixels: uint8 ``[V, 3, H, W]``, the views that the encoder gets of it; None where ``features`` stand for them.
        features: bfloat16 ``[1, N, D]``, the encoder's output from a cache.
    """

    digest: str
    pixels: Tensor | None = None
    features: Tensor | None = None

    @property
    def num_views(self) -> int:
        """V."""
        return 1 if self.pixels is None else self.pixels.shape[0]


@dataclass(frozen=True, eq=False)
class EncodedRecord:
    """One record, ready for collation, with a sequence for each sample.

    Attributes:
        images: of the record; several, one or none.
        sequences: one for each sample.
        references: one for each sample.
    """

    images: tuple[EncodedImage, ...]
    sequences: tuple[TokenSequence, ...]
    references: tuple[Reference, ...]

    @property
    def dataset(self) -> str:
        """Name of the set that it is of."""
        return self.references[0].dataset if self.references else ""


_ONLY_SET = SetArgs("", "")


@dataclass
class RecordDataset(Dataset[EncodedRecord | BadSample]):
    """Records by ``(epoch, index)``. What cannot be used comes back as a `BadSample`, never as an exception.

    An exception from a worker process would arrive as a wall of text; the main process raises the fatal ones itself.
    """

    shards: ShardCollection
    processor: SampleProcessor
    limits: TextLimits
    augment: RandomAffine | None = None
    seed: int = 0
    undecodable_is_fatal: bool = False
    features: FeatureCache | None = None
    """Where given, images are not decoded: their features are read."""
    sets: tuple[SetArgs, ...] = ()
    """Of the shards, one after the other; by default one without a name or templates."""
    trains: bool = False
    """Whether templates are drawn; else a set's first is taken."""

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, epoch_index: EpochIndex) -> EncodedRecord | BadSample:
        epoch, index = epoch_index
        try:
            images = tuple(self._image(epoch, index, number) for number in range(self.shards.num_images(index)))
        except UndecodableImageError as error:
            return self._bad(index, error, fatal=self.undecodable_is_fatal)
        except (InputError, OSError) as error:
            return self._bad(index, error)
        try:
            samples = self.samples(index, epoch)
            sequences = self.encode(samples, [image.num_views for image in images])
        except (InputError, OSError) as error:
            return self._bad(index, error)
        references = tuple(
            Reference(s.id, s.image_id, s.kind, s.instruction, s.answers, (index, n), self._set_of(index).name)
            for n, s in enumerate(samples)
        )
        return EncodedRecord(images, sequences, references)

    def _set_of(self, index: int) -> SetArgs:
        return self.sets[self.shards.set_of(index)] if self.sets else _ONLY_SET

    def samples(self, index: int, epoch: int = 0) -> tuple[Sample, ...]:
        """The samples of a record, their instructions in a template of its set."""
        samples, templates = self.shards.samples(index), self._set_of(index).instructions
        if not templates:
            return samples
        drawn = [
            _mix(self.seed, epoch, index, n + 1) % len(templates) if self.trains and len(templates) > 1 else 0
            for n in range(len(samples))
        ]
        return tuple(instructed(sample, templates[n]) for sample, n in zip(samples, drawn, strict=True))

    def longest(self, index: int) -> tuple[TokenSequence, ...]:
        """The sequences of a record, each with the template that makes it longest, without looking at its images."""
        views, samples = [1] * self.shards.num_images(index), self.shards.samples(index)
        templates = self._set_of(index).instructions or ("{instruction}",)
        choices = zip(*(self.encode([instructed(s, t) for s in samples], views) for t in templates), strict=True)
        return tuple(max(of_sample, key=len) for of_sample in choices)

    def _bad(self, index: int, error: Exception, fatal: bool = True) -> BadSample:
        try:
            key = self.shards.key(index)
        except OSError:  # the file is gone
            key = f"record {index}"
        return BadSample(self.shards.path_of(index), key, str(error), fatal)

    def _image(self, epoch: int, index: int, number: int) -> EncodedImage:
        content = self.shards.image_bytes(index, number)
        digest, transform = image_digest(content), self.processor.transform
        if self.features is not None:
            return EncodedImage(digest, features=self._features(self.features, digest).unsqueeze(0))
        if self.augment is None:
            return EncodedImage(digest, transform.views(decode_levels(content)))
        picture = as_picture(transform.resize(decode_levels(content)))
        # The first image of a record draws as a record's only one does.
        seed = _mix(self.seed, epoch, index, *([number] if number else []))
        moved = as_levels(self.augment(picture, torch.Generator().manual_seed(seed)))
        return EncodedImage(f"{digest}-{index}-{number}", moved.unsqueeze(0))

    @staticmethod
    def _features(cache: FeatureCache, digest: str) -> Tensor:
        if digest in cache.undecodable:
            raise UndecodableImageError(cache.undecodable[digest])
        if digest not in cache:  # it was when the run began
            raise InputError(f"the image changed: {cache.folder} has no features of SHA-256 {digest}")
        return cache[digest]

    def encode(self, samples: Sequence[Sample], views: Sequence[int]) -> tuple[TokenSequence, ...]:
        """The token sequences of a record's samples.

        Args:
            samples: of the record.
            views: for each of its images how many the encoder gets of it.

        Raises:
            InputError: text beyond a limit.
        """
        return tuple(
            self.processor.encode(
                sample.turns,
                sample.targets,
                views=views,
                max_instruction_tokens=self.limits.max_instruction_tokens,
                max_target_tokens=self.limits.max_target_tokens,
                truncate=self.limits.truncate,
            )
            for sample in samples
        )


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbours give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass
class EpochBatchSampler(Sampler[list[EpochIndex]]):
    """Batches of one rank, in an order that depends on seed and epoch only.

    The last global batch may be smaller; it is spread over the ranks as evenly as it goes. Every rank gets the same number
    of batches, since they step together: where records don't suffice, an empty one.
    """

    order: EpochOrder
    batch_size: int
    rank: int = 0
    num_ranks: int = 1
    seen: Callable[[int], int] = lambda epoch: 0
    """How many records of an epoch a resumed run has behind it, on all ranks; asked when the epoch begins."""
    epoch: int = field(default=0, init=False)

    @property
    def sampler(self) -> EpochBatchSampler:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.order) // (self.batch_size * self.num_ranks))

    def _spans(self, seen: int) -> Iterator[tuple[int, int]]:
        """This rank's part ``[start, stop)`` of each global batch, from the first record that was not seen."""
        for start in range(seen, len(self.order), self.batch_size * self.num_ranks):
            share, more = divmod(min(self.batch_size * self.num_ranks, len(self.order) - start), self.num_ranks)
            first = start + self.rank * share + min(self.rank, more)
            yield first, first + share + (self.rank < more)

    def __iter__(self) -> Iterator[list[EpochIndex]]:
        passes, records = self.order(self.epoch)
        for start, stop in self._spans(self.seen(self.epoch)):
            yield list(zip(passes[start:stop].tolist(), records[start:stop].tolist(), strict=True))


class TokenBudgetSampler(Sampler[list[EpochIndex]]):
    """Batches of one rank that hold as many records as fit into a budget of tokens, each record once an epoch.

    Records are packed once, by their lengths. An epoch then deals records of equal length anew among the places that
    such records have, and the batches among steps and ranks: batches fit and steps are as many in every epoch, while
    what meets what is drawn anew. Both depend on seed and epoch only.

    A run that goes on with another number of ranks in the middle of an epoch deals the batches that are left among those.

    Attributes:
        num_batches: of the epoch, of this rank.
    """

    def __init__(
        self,
        bins: Sequence[Sequence[int]],
        shapes: Sequence[Any],
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        batches_done: Callable[[], int] = lambda: 0,
        earlier: Callable[[int], Sequence[tuple[int, int]]] = lambda epoch: (),
    ) -> None:
        """Makes the pattern of all epochs.

        Args:
            bins: records of each batch, as `packing` has put them together.
            shapes: of each record; those with equal ones may take each other's place.
            seed: of the order.
            rank, num_ranks: every rank gets the same number of batches: the fullest are halved until they do. Where all
                hold a single record, some ranks get an empty one.
            batches_done: how many batches of the epoch a resumed run has behind it, asked when the epoch begins.
            earlier: what runs with other numbers of ranks did of an epoch before that: for each, one after the other, its
                number of ranks and its batches of each.
        """
        self._bins = bins
        self._of_shape: dict[Any, list[int]] = {}
        for record in range(len(shapes)):
            self._of_shape.setdefault(shapes[record], []).append(record)
        self.seed, self.rank, self.num_ranks = seed, rank, num_ranks
        self.batches_done, self.earlier = batches_done, earlier
        self.num_batches = len(_for_ranks(bins, num_ranks)) // num_ranks
        self.epoch = 0

    @property
    def sampler(self) -> TokenBudgetSampler:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[EpochIndex]]:
        for batch in self.dealt(self.epoch, self.earlier(self.epoch))[self.rank :: self.num_ranks][
            self.batches_done() :
        ]:
            yield [(self.epoch, record) for record in batch]

    def dealt(self, epoch: int, earlier: Sequence[tuple[int, int]] = ()) -> list[list[int]]:
        """The batches of all ranks, step by step, that earlier runs with other numbers of ranks have left of an epoch."""
        generator = np.random.default_rng((self.seed, epoch))
        stands_for: dict[int, int] = {}
        for records in self._of_shape.values():
            stands_for.update(zip(records, generator.permutation(records).tolist(), strict=True))
        ranks = [*(num_ranks for num_ranks, _ in earlier), self.num_ranks]
        pattern = _for_ranks(self._bins, ranks[0])
        batches = [[stands_for[record] for record in pattern[n]] for n in generator.permutation(len(pattern))]
        for (num_ranks, done), following in zip(earlier, ranks[1:], strict=True):
            batches = _for_ranks(batches[done * num_ranks :], following)
        return batches


def _for_ranks(batches: Sequence[Sequence[int]], num_ranks: int) -> list[list[int]]:
    """So many batches that each rank gets as many: the fullest are halved until they are."""
    pattern = [list(one) for one in batches]
    while len(pattern) % num_ranks:
        fullest = max(pattern, key=len)
        pattern.append([fullest.pop() for _ in range(len(fullest) // 2)])
    return pattern


@dataclass
class EvaluationBatchSampler(Sampler[list[EpochIndex]]):
    """Every record once, none twice: ranks may get a different number of batches."""

    num_records: int
    batch_size: int
    rank: int = 0
    num_ranks: int = 1
    finished: frozenset[int] = frozenset()
    """Records that an evaluation which goes on has behind it: they are left out, and the others dealt among the ranks."""

    def _mine(self) -> Sequence[int]:
        return [index for index in range(self.num_records) if index not in self.finished][self.rank :: self.num_ranks]

    def __len__(self) -> int:
        return -(-len(self._mine()) // self.batch_size)

    def __iter__(self) -> Iterator[list[EpochIndex]]:
        mine = self._mine()
        for start in range(0, len(mine), self.batch_size):
            yield [(0, index) for index in mine[start : start + self.batch_size]]


@dataclass(frozen=True)
class Parcelled:
    """A collator whose batches travel in one piece."""

    collate: Callable[[Any], Any]

    def __call__(self, items: Any) -> Parcel[Any]:
        return Parcel.of(self.collate(items))


class BatchLoader(DataLoader[Any]):
    """A DataLoader that opens what comes from its workers (`Parcelled`), and asks its sampler for nothing too early.

    With workers, the stock loader prefetches as soon as it is iterated. Lightning iterates a loader before it has restored
    the epoch of a resumed run and told the sampler: the first batches would be those of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for item in super().__iter__():
            yield item.opened() if isinstance(item, Parcel) else item


def outlast_signals(worker: int) -> None:
    """For a loader process: a signal to end the run is the rank's business.

    SLURM and torchrun send it to all processes of a rank. Who saves before it ends has to finish its step first, and to save
    without a loader process is an error: PyTorch ends the rank as soon as one dies. SIGTERM from the rank itself is obeyed:
    Python sends it at its exit and then waits, without end, for whoever doesn't.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS: nothing there tells who sent a signal
        return
    signals = {signal.SIGTERM, signal.SIGUSR1}
    rank = os.getppid()
    # Threads started from here on inherit this, so that the one below is the only one to get them.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(signals)
            if received.si_signo == signal.SIGTERM and received.si_pid == rank:
                os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


@dataclass(frozen=True)
class Collator:
    """Encoded records -> a batch. Picklable, so that it runs in workers.

    An image that stands in several records of a batch is in the batch once. Under `nested` visibility, all questions
    on one image share its tokens, too.

    Attributes:
        pad_id: id that fills rows.
        visibility: how prefix tokens see each other.
        shared_prefix: whether several targets of a sample branch off one prefix; else each is a sequence of its own.
        packed: whether all sequences share one row, for attention without a mask.
        bucket: what the lengths of a packed row's parts are rounded up to, for compiled models.
        datasets: names of the split's sets, where there are several: batches then say which each label is of.
    """

    pad_id: int
    visibility: PrefixVisibility
    shared_prefix: bool = True
    packed: bool = False
    bucket: int = 1
    datasets: tuple[str, ...] = ()

    def budget(
        self, records: Sequence[Sequence[TokenSequence]], max_tokens: int, max_records: int
    ) -> tuple[list[list[int]], list[tuple[int, ...]]]:
        """Puts records into batches of at most so many tokens, padding included, as they will be laid out.

        Args:
            records: the samples of each.
            max_tokens: of a batch.
            max_records: of a batch.

        Returns:
            The records of each batch, and the shape of each record: those of equal shape may change places.

        Raises:
            ValueError: a record that doesn't fit into a batch.
        """
        lengths = [[len(s) for s in self.rows(samples, [()] * len(samples))[0]] for samples in records]
        if self.packed:
            totals = [sum(rows) for rows in lengths]
            levels = 3 if self.visibility == "nested" else 2
            room = max_tokens - levels * (self.bucket - 1)  # each part of the row is rounded up
            return first_fit(totals, room, max_records), [(total,) for total in totals]
        shapes = [(max(rows), len(rows)) for rows in lengths]
        longest, rows = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
        return group_by_length(longest, rows, max_tokens, max_records), list(shapes)

    def train(self, items: Sequence[EncodedRecord | BadSample]) -> PackedBatch:
        """A batch to learn from."""
        records = [item for item in items if isinstance(item, EncodedRecord)]
        return self._targets(records, [item for item in items if isinstance(item, BadSample)])

    def evaluate(self, items: Sequence[EncodedRecord | BadSample]) -> EvaluationBatch:
        """Prefixes to generate from, and targets for the loss where every sample has them."""
        records = [item for item in items if isinstance(item, EncodedRecord)]
        sequences, image_of, images = _flatten(records)
        prompts = collate_prompts(sequences, image_of, _joined(i.pixels for i in images), pad_id=self.pad_id)
        targets = self._targets(records, ())
        has_targets = bool(sequences) and all(sequence.num_targets for sequence in sequences)
        return EvaluationBatch(
            prompts=replace(prompts, image_features=targets.image_features),
            targets=replace(targets, pixel_values=None, image_features=None) if has_targets else None,
            references=tuple(reference for record in records for reference in record.references),
            bad=tuple(item for item in items if isinstance(item, BadSample)),
        )

    def rows(
        self, sequences: Sequence[TokenSequence], image_of: Sequence[Group]
    ) -> tuple[list[TokenSequence], list[Group]]:
        """Samples -> what is laid out: joined where they share their images' tokens, split where they can't branch.

        Args:
            sequences: one for each sample.
            image_of: the images of each, or whatever those that may share tokens have in common.

        Returns:
            The sequences of the batch, and what was given for each.
        """
        if not self.shared_prefix:
            parts = [(part, image) for s, image in zip(sequences, image_of, strict=True) for part in s.split()]
            return [part for part, _ in parts], [image for _, image in parts]
        if self.visibility != "nested":
            return list(sequences), list(image_of)
        on_images: dict[Any, tuple[Group, list[TokenSequence]]] = {}
        for number, (sequence, image) in enumerate(zip(sequences, image_of, strict=True)):
            # Tokens can be shared where they stand at the same positions; without any there is nothing to share.
            places = sequence.image_positions or number
            on_images.setdefault((image, places), (image, []))[1].append(sequence)
        groups = list(on_images.values())
        return [TokenSequence.on_one_image(group) for _, group in groups], [image for image, _ in groups]

    def _targets(self, records: Sequence[EncodedRecord], bad: Sequence[BadSample]) -> PackedBatch:
        samples, views_of_sample, images = _flatten(records)
        references = [reference for record in records for reference in record.references]
        # Under `nested`, what shares an image is joined: within a record only where each has a row, since a longer row
        # would lengthen all others, and within a set, whose loss is known apart.
        of_record = [number for number, record in enumerate(records) for _ in record.sequences]
        groups: list[Hashable] = [
            (records[number].dataset, views if self.packed else number)
            for number, views in zip(of_record, views_of_sample, strict=True)
        ]
        views_of_group = dict(zip(groups, views_of_sample, strict=True))
        sequences, groups = self.rows(samples, groups)
        batch = collate(
            sequences, [views_of_group[group] for group in groups], _joined(i.pixels for i in images),
            pad_id=self.pad_id, visibility=self.visibility, references=references, bad=bad, packed=self.packed,
            bucket=self.bucket,
            dataset_of=[self.datasets.index(group[0]) for group in groups] if self.datasets else (),  # type: ignore[index]
        )  # fmt: skip
        return replace(batch, image_features=_joined(i.features for i in images))


def _flatten(
    records: Sequence[EncodedRecord],
) -> tuple[list[TokenSequence], list[tuple[int, ...]], list[EncodedImage]]:
    """Sequences of all records, the views that each places, and the images they are of, each once."""
    first: dict[str, tuple[int, ...]] = {}  # digest -> numbers of the image's views in the batch
    images: list[EncodedImage] = []
    sequences: list[TokenSequence] = []
    views_of: list[tuple[int, ...]] = []
    num_views = 0
    for record in records:
        for image in record.images:
            if image.digest not in first:
                first[image.digest] = tuple(range(num_views, num_views + image.num_views))
                num_views += image.num_views
                images.append(image)
        views = tuple(view for image in record.images for view in first[image.digest])
        sequences.extend(record.sequences)
        views_of.extend([views] * len(record.sequences))
    return sequences, views_of, images


def _joined(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """``[I, ...]`` of all views; None where there are none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
