"""Records -> batches: the dataset, the order of an epoch, and the collators that run in the workers.

The order of an epoch is a permutation by (seed, epoch). All ranks compute the same one; global batch g is a run of
``batch_size * ranks`` records of it, and each rank takes its part. Augmentation is seeded by (seed, epoch, record), so
neither the number of workers nor a restart changes what a record looks like.

`batch_size` counts records: an image with everything asked about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmprefix.data.features import FeatureCache, image_digest
from mmprefix.data.images import RandomAffine, UndecodableImageError, decode_image
from mmprefix.data.samples import Sample
from mmprefix.data.shards import ShardCollection
from mmprefix.errors import InputError
from mmprefix.masks import PrefixVisibility
from mmprefix.packing import BadSample, EvaluationBatch, PackedBatch, Reference, collate, collate_prompts
from mmprefix.sequence import TokenSequence
from mmprefix.vision import ImageTransform

EpochIndex = tuple[int, int]
"""``(epoch, record)``: what a sampler hands to the dataset; workers outlive epochs and would not hear of a new one."""


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
        instruction: str,
        targets: Sequence[str],
        *,
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
class EncodedRecord:
    """One record, ready for collation, with a sequence for each sample.

    Attributes:
        pixels: float32 ``[3, H, W]``; None where ``features`` stand for them.
        sequences: one for each sample.
        references: one for each sample.
        image_digest: SHA-256 of the encoded image, in hex; pixels also depend on augmentation.
        features: bfloat16 ``[N, D]``, the encoder's output from a cache.
    """

    pixels: Tensor | None
    sequences: tuple[TokenSequence, ...]
    references: tuple[Reference, ...]
    image_digest: str
    features: Tensor | None = None


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

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, epoch_index: EpochIndex) -> EncodedRecord | BadSample:
        epoch, index = epoch_index
        record = self.shards.records[index]
        shard = self.shards.paths[record.shard]
        try:
            content = self.shards.image_bytes(index)
            digest = image_digest(content)
            pixels = None if self.features is not None else self._pixels(content, epoch, index)
            features = None if self.features is None else self._features(self.features, digest)
        except UndecodableImageError as error:
            return BadSample(shard, record.key, str(error), fatal=self.undecodable_is_fatal)
        except (InputError, OSError) as error:
            return BadSample(shard, record.key, str(error), fatal=True)
        try:
            samples = self.shards.samples(index)
            sequences = tuple(self._encode(sample) for sample in samples)
        except InputError as error:
            return BadSample(shard, record.key, str(error), fatal=True)
        references = tuple(
            Reference(s.id, s.image_id, s.kind, s.instruction, s.answers, (index, n)) for n, s in enumerate(samples)
        )
        return EncodedRecord(pixels, sequences, references, digest, features)

    def _pixels(self, content: bytes, epoch: int, index: int) -> Tensor:
        image = self.processor.transform.resize(decode_image(content))
        if self.augment is not None:
            image = self.augment(image, torch.Generator().manual_seed(_mix(self.seed, epoch, index)))
        return self.processor.transform.to_tensor(image)

    @staticmethod
    def _features(cache: FeatureCache, digest: str) -> Tensor:
        if digest in cache.undecodable:
            raise UndecodableImageError(cache.undecodable[digest])
        if digest not in cache:  # it was when the run began
            raise InputError(f"the image changed: {cache.folder} has no features of SHA-256 {digest}")
        return cache[digest]

    def _encode(self, sample: Sample) -> TokenSequence:
        return self.processor.encode(
            sample.instruction,
            sample.targets,
            max_instruction_tokens=self.limits.max_instruction_tokens,
            max_target_tokens=self.limits.max_target_tokens,
            truncate=self.limits.truncate,
        )


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbours give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass
class EpochBatchSampler(Sampler[list[EpochIndex]]):
    """Batches of one rank, in an order that depends on seed and epoch only.

    The last global batch may be smaller; it is spread over the ranks. Training needs the same number of batches on
    every rank, so up to ``ranks - 1`` records that cannot be spread are left to the next epochs' permutations.
    """

    num_records: int
    batch_size: int
    shuffle: bool
    seed: int = 0
    rank: int = 0
    num_ranks: int = 1
    batches_done: Callable[[], int] = lambda: 0
    """How many batches of the epoch a resumed run has behind it, asked when an epoch begins."""
    epoch: int = field(default=0, init=False)

    @property
    def sampler(self) -> EpochBatchSampler:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(1 for _ in self._spans())

    def _spans(self) -> Iterator[tuple[int, int]]:
        """This rank's part ``[start, stop)`` of each global batch."""
        for start in range(0, self.num_records, self.batch_size * self.num_ranks):
            share = min(self.batch_size, (self.num_records - start) // self.num_ranks)
            if share:
                yield start + self.rank * share, start + (self.rank + 1) * share

    def __iter__(self) -> Iterator[list[EpochIndex]]:
        order = np.arange(self.num_records)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        for start, stop in islice(self._spans(), self.batches_done(), None):
            yield [(self.epoch, int(index)) for index in order[start:stop]]


@dataclass
class EvaluationBatchSampler(Sampler[list[EpochIndex]]):
    """Every record once, none twice: ranks may get a different number of batches."""

    num_records: int
    batch_size: int
    rank: int = 0
    num_ranks: int = 1

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.num_records, self.num_ranks)) // self.batch_size)

    def __iter__(self) -> Iterator[list[EpochIndex]]:
        mine = range(self.rank, self.num_records, self.num_ranks)
        for start in range(0, len(mine), self.batch_size):
            yield [(0, index) for index in mine[start : start + self.batch_size]]


class LazyDataLoader(DataLoader[Any]):
    """A DataLoader that asks its sampler for nothing before the first batch is wanted.

    With workers, the stock loader prefetches as soon as it is iterated. Lightning iterates a loader before it has
    restored the epoch of a resumed run and told the sampler: the first batches would be those of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


@dataclass(frozen=True)
class Collator:
    """Encoded records -> a batch. Picklable, so that it runs in workers.

    Attributes:
        pad_id: id that fills rows.
        visibility: how prefix tokens see each other.
        shared_prefix: whether several targets of a sample branch off one prefix; else each is a sequence of its own.
    """

    pad_id: int
    visibility: PrefixVisibility
    shared_prefix: bool = True

    def train(self, items: Sequence[EncodedRecord | BadSample]) -> PackedBatch:
        """A batch to learn from."""
        records = [item for item in items if isinstance(item, EncodedRecord)]
        batch = self._targets(records, [item for item in items if isinstance(item, BadSample)])
        return replace(batch, image_features=_stacked_features(records))

    def evaluate(self, items: Sequence[EncodedRecord | BadSample]) -> EvaluationBatch:
        """Prefixes to generate from, and targets for the loss where every sample has them."""
        records = [item for item in items if isinstance(item, EncodedRecord)]
        sequences, image_of, pixels = _flatten(records)
        prompts = collate_prompts(sequences, image_of, pixels, pad_id=self.pad_id)
        has_targets = bool(sequences) and all(sequence.num_targets for sequence in sequences)
        return EvaluationBatch(
            prompts=replace(prompts, image_features=_stacked_features(records)),
            targets=replace(self._targets(records, ()), pixel_values=None) if has_targets else None,
            references=tuple(reference for record in records for reference in record.references),
            bad=tuple(item for item in items if isinstance(item, BadSample)),
        )

    def _targets(self, records: Sequence[EncodedRecord], bad: Sequence[BadSample]) -> PackedBatch:
        sequences, image_of, pixels = _flatten(records)
        references = [reference for record in records for reference in record.references]
        if not self.shared_prefix:
            parts = [sequence.split() for sequence in sequences]
            image_of = [image for image, part in zip(image_of, parts, strict=True) for _ in part]
            references = [reference for reference, part in zip(references, parts, strict=True) for _ in part]
            sequences = [sequence for part in parts for sequence in part]
        return collate(
            sequences, image_of, pixels, pad_id=self.pad_id, visibility=self.visibility, references=references, bad=bad
        )


def _flatten(records: Sequence[EncodedRecord]) -> tuple[list[TokenSequence], list[int], Tensor | None]:
    """Sequences of all records, the image of each, and the images, each once."""
    sequences = [sequence for record in records for sequence in record.sequences]
    image_of = [number for number, record in enumerate(records) for _ in record.sequences]
    pixels = [record.pixels for record in records if record.pixels is not None]
    return sequences, image_of, torch.stack(pixels) if pixels else None


def _stacked_features(records: Sequence[EncodedRecord]) -> Tensor | None:
    """The cached features of the images that `_flatten` numbers, bfloat16 ``[I, N, D]``."""
    features = [record.features for record in records if record.features is not None]
    return torch.stack(features) if features else None
