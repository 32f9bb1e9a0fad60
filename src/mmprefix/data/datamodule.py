"""`ShardDataModule`: train, validation and test splits over webdataset shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch.utils.data import DataLoader

from mmprefix.data import digits, storage
from mmprefix.data.features import FeatureCache, FeatureKey
from mmprefix.data.images import RandomAffine, decode_image, decode_levels
from mmprefix.data.loading import (
    BatchLoader,
    Collator,
    EpochBatchSampler,
    EvaluationBatchSampler,
    Parcelled,
    RecordDataset,
    SampleProcessor,
    TextLimits,
    TokenBudgetSampler,
    outlast_signals,
)
from mmprefix.data.mixture import EpochOrder, MixtureArgs, SetArgs, check_metric, parse_sets, quotas
from mmprefix.data.shard_cache import ShardCache
from mmprefix.data.shards import ShardCollection, check_complete, expand_shards
from mmprefix.errors import InputError
from mmprefix.metrics.answers import VARIANT_TASKS
from mmprefix.metrics.captions import CAPTION, DEFAULT_METRICS, CaptionMetric
from mmprefix.metrics.ptb import Tokenizer
from mmprefix.metrics.rules import ScoringRules
from mmprefix.metrics.vqa import VqaVariant
from mmprefix.packing import EvaluationBatch, PackedBatch, PromptBatch, map_tensors
from mmprefix.vision import as_picture

_NEEDED = {"fit": ("train", "val", "test"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
"""Splits that a stage reads, if they are there; `fit` scores the test split at its end."""

Shards = str | list[str] | dict[str, Any] | None


@dataclass(frozen=True)
class _Position:
    """Where a resumed run began.

    Attributes:
        epoch: the epoch that it began in the middle of; -1 for none.
        seen: records of the epoch that were seen before, on all ranks.
        batches: what the trainer counted as done by then.
        earlier: with a budget of tokens: for each run before, its number of ranks and its batches of each.
    """

    epoch: int = -1
    seen: int = 0
    batches: int = 0
    earlier: tuple[tuple[int, int], ...] = ()


def _set_done(progress: dict[str, int], batches: int) -> None:
    """The trainer's count of an epoch's batches, which tells stages by differences: all of it moves alike."""
    more = batches - progress["processed"]
    progress.update({name: count + more for name, count in progress.items()})


def _finish_epoch(loops: dict[str, Any]) -> None:
    """A checkpoint of an epoch's last batch -> one between that epoch and the next.

    Lightning begins the next epoch from such a checkpoint, but goes on counting epochs as if it were in the middle of
    one: whoever resumes from a later checkpoint of that run begins its epoch anew.

    Args:
        loops: state of the fit loop, changed in place.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    in_epoch = epochs["current"]["processed"] == epochs["current"]["ready"] - 1
    behind_batch = batches["total"]["completed"] == batches["total"]["processed"] - 1
    if not (batches["is_last_batch"] and in_epoch and behind_batch):
        return
    for progress in (epochs["total"], epochs["current"], batches["total"]):
        progress.update(dict.fromkeys(progress, progress["ready"]))
    batches["current"].update(dict.fromkeys(batches["current"], 0))
    batches["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # as for every checkpoint behind a batch


class ShardDataModule(pl.LightningDataModule):
    """Image-text samples from webdataset shards.

    Batches are `PackedBatch` for training and `EvaluationBatch` elsewhere.
    """

    def __init__(
        self,
        processor: Any = None,
        train: Shards = None,
        val: Shards = None,
        test: Shards = None,
        predict: Shards = None,
        dataset: Literal["digits"] | None = None,
        dataset_folder: str = "runs/data/digits",
        batch_size: int = 32,
        max_tokens: int | None = None,
        eval_batch_size: int = 128,
        eval_window: int = 4,
        metric: str = "exact",
        caption_metrics: Sequence[CaptionMetric] | None = None,
        caption_tokenizer: Tokenizer | None = None,
        vqa_variant: VqaVariant | None = None,
        num_workers: int = 0,
        max_instruction_tokens: int | None = 1024,
        max_target_tokens: int | None = 64,
        truncate: Literal["none", "instruction", "target", "both"] = "none",
        augmentation: RandomAffine | None = None,
        mixture: MixtureArgs = MixtureArgs(),  # noqa: B008  (never mutated; jsonargparse shows it as default)
        resampled: bool = False,
        on_bad_sample: Literal["skip", "error"] = "skip",
        shard_cache: str | None = None,
        feature_cache: str | None = None,
        feature_key: Any = None,
        seed: int = 0,
    ) -> None:
        """Settings of the data.

        Args:
            processor: a `SampleProcessor`, which turns text into tokens and images into pixels; the command line
                passes the model's.
            train: training shards: a path, glob, brace range, folder, or a list of them; or several sets by name, each
                with shards, or with the fields of `mixture.SetArgs`. So for the other splits.
            val: validation shards.
            test: test shards, scored once at the end of `fit`.
            predict: shards for `predict`, which need no targets; by default those of `test`, else of `val`.
            dataset: a set that comes with the package, used where `train` is not given. With `train` given it is
                left out altogether: `val` and `test` are then yours, too.
            dataset_folder: where the shards of `dataset` are written.
            batch_size: records (an image with everything asked about it) per step and device.
            max_tokens: budget per step and device, image tokens and padding included: as many records as fit go into
                a batch, `batch_size` at most. Steps then take the same memory, however ragged the texts. The texts
                are tokenized once at the start.
            eval_batch_size: the same, for evaluation.
            eval_window: so many batches of evaluation wait for each other and are answered together, sorted by length, as
                many rows at a time as the largest of them has. The tokens of their images wait in the device's memory.
            metric: what evaluation reports, a task of `score`: `exact`, `caption` (CIDEr, BLEU, ROUGE-L), `vqa`, `okvqa`,
                `textvqa`, `vizwiz`, `gqa`, `docvqa`, `chartqa` or `scienceqa`. A set of a mixture may have its own.
            caption_metrics: of captions: `cider`, and any of `bleu`, `rouge_l`, `meteor` and `spice`; by default the first
                three. The last two are Java programs, which take seconds to start and minutes for a large split, while
                fitting at each validation.
            caption_tokenizer: of caption metrics: `official` needs Java and its extra, `python` neither, `auto` takes the
                official one where it is. By default `python` while fitting, since Java takes seconds to start, and
                `auto` at its end and in `validate` and `test`.
            vqa_variant: rules of VQA accuracy, for all sets that are scored by it; by default each task's own.
            num_workers: loader processes per device.
            max_instruction_tokens: longest instruction, without framing tokens. Attention grows with its square: one
                runaway text must not take all memory.
            max_target_tokens: longest target, without EOS; also how much is generated at most.
            truncate: which text may be cut at its limit; `none` makes a longer one an error. Image tokens never are.
            augmentation: random affine transform of training images; none by default.
            mixture: how much of each training set an epoch takes, where there are several.
            resampled: training draws with replacement: an epoch is as many records as there are, some of them several
                times and some not at all. By default each comes once.
            on_bad_sample: what happens to an image that cannot be decoded: `skip` counts and reports it.
            shard_cache: folder on a disk of this machine: each node copies the shards there before the first epoch, and
                reads the copies. For object storage, slow network folders and ``pipe:COMMAND``.
            feature_cache: folder written by `cache-features`: a frozen encoder's features are read from it, and no
                image is decoded.
            feature_key: a function without arguments that gives the key those features must have; the command line
                passes the model's.
            seed: of order and augmentation; the command line passes `seed_everything`.
        """
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("eval_window", eval_window, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise InputError(f"data.{name}: expected at least {least}, got {value}")
        if max_target_tokens is not None and max_target_tokens < 1:
            raise InputError(f"data.max_target_tokens: expected at least 1, or null, got {max_target_tokens}")
        if augmentation is not None:
            augmentation.check()
        mixture.check()
        self.processor: SampleProcessor | None = processor  # Any above: the command line checks types of its own
        self.patterns: dict[str, Shards] = {"train": train, "val": val, "test": test, "predict": predict}
        self.builtin = dataset if train is None else None
        self.dataset_folder = Path(dataset_folder)
        if self.builtin is not None:
            for split in ("train", "val", "test"):
                self.patterns[split] = self.patterns[split] or str(self.dataset_folder / f"{split}-*.tar")
        self.patterns["predict"] = predict or self.patterns["test"] or self.patterns["val"]
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"data.max_tokens: expected at least 1, got {max_tokens}")
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.eval_batch_size, self.eval_window = eval_batch_size, eval_window
        self.num_workers = num_workers
        self.limits = TextLimits(max_instruction_tokens, max_target_tokens, truncate)
        self.augmentation = augmentation
        self.feature_cache = feature_cache
        self.feature_key: Callable[[], FeatureKey] | None = feature_key
        self._features: FeatureCache | None = None
        self._checked: set[str] = set()
        self.mixture = mixture
        self._sets: dict[str, tuple[SetArgs, ...]] = {
            split: parse_sets(value, f"data.{split}", trains=split == "train")
            for split, value in self.patterns.items()
            if value is not None
        }
        check_metric(metric, "data.metric")
        self.metric, self.caption_tokenizer = metric, caption_tokenizer
        self.caption_metrics = None if caption_metrics is None else tuple(caption_metrics)
        self.vqa_variant = vqa_variant
        self._check_scoring()
        self.resampled = resampled
        if resampled and max_tokens is not None:
            raise InputError(
                "data.resampled: expected data.max_tokens: null, got a budget, whose batches hold each record once"
            )
        self.shard_cache = None if shard_cache is None else ShardCache(shard_cache)
        self.undecodable_is_fatal = on_bad_sample == "error"
        self.seed = seed
        self.packed = False
        """Whether batches are packed into one row; the module says, when it knows how it attends."""
        self.bucket = 1
        """What the lengths of a packed row's parts are rounded up to."""
        self.finished: frozenset[int] = frozenset()
        """Records that an evaluation which goes on after a kill has behind it; the module says."""
        self._shards: dict[str, ShardCollection] = {}
        self._position = _Position()
        self._budget: tuple[Any, tuple[list[list[int]], list[tuple[int, ...]]]] | None = None

    @property
    def max_new_tokens(self) -> int:
        """How much evaluation generates at most: the longest allowed target and its EOS."""
        return (self.limits.max_target_tokens or 255) + 1

    @property
    def longest_target(self) -> int | None:
        """The most tokens that a target may have, EOS included; None without a limit."""
        limit = self.limits.max_target_tokens
        return None if limit is None else limit + 1

    def has(self, split: str) -> bool:
        """Whether the split is configured."""
        return self.patterns[split] is not None

    def baseline(self, split: str) -> tuple[str, dict[str, float]]:
        """Name and accuracy per kind of the baseline of a built-in set; ``("", {})`` for others."""
        if self.builtin is None:
            return "", {}
        return digits.BASELINE_NAME, digits.baseline(split)

    def prepare_data(self) -> None:
        """Writes the shards of a built-in set and copies shards to this machine, on one process of each node.

        Raises:
            InputError: what can't be copied.
        """
        if self.builtin is not None:
            digits.write_digits(self.dataset_folder)
        if self.trainer is not None and self.trainer.state.fn is not None:
            for split in _NEEDED[self.trainer.state.fn.value]:
                if self.has(split):
                    self._fetch(split)

    def setup(self, stage: str) -> None:
        """Indexes the shards that the stage needs.

        Raises:
            InputError: missing, broken or incomplete shards, or a feature cache that is not theirs or the encoder's.
        """
        needed = tuple(split for split in _NEEDED[stage] if stage != "fit" or split != "test")
        if self.feature_cache is not None:
            if stage == "fit" and self.has("test"):  # scored at the end: what is missing must not show only then
                needed = (*needed, "test")
            self._check_features(self.feature_cache, needed)
        for split in needed:
            self.shards(split)

    def check_tiles(self, setting: str) -> None:
        """Raises InputError where images are cut into tiles, so many that each image has to be looked at to know."""
        if self.processor is not None and self.processor.transform.resize_mode == "tiles":
            raise InputError(f"{setting}: expected model.vision.resize squash, crop or pad, got tiles")

    def _check_features(self, folder: str, splits: tuple[str, ...]) -> None:
        self.check_tiles("data.feature_cache")
        if self.augmentation is not None:
            raise InputError(
                "data.feature_cache: expected data.augmentation: null, got augmentation: "
                "features of augmented images cannot be cached"
            )
        if self._features is None:  # once: a trainer may turn the weights into half precision later
            assert self.feature_key is not None, "the data module needs the encoder's key to check the cache"
            key = self.feature_key()
            cache = FeatureCache(folder)
            cache.check_key(key)
            rank_zero_info(cache.describe())
            self._features = cache
        for split in splits:
            if split not in self._checked:
                self._features.check_images(split, self.shards(split))
                self._checked.add(split)

    def shards(self, split: str) -> ShardCollection:
        """The shards of a split, indexed on the first call.

        Raises:
            InputError: missing, broken or incomplete shards.
        """
        if split not in self._shards:
            self._shards[split] = self._open(split)
        return self._shards[split]

    def pictures(self, split: str, record: int, at_most: int) -> list[Image.Image]:
        """The first images of a record of ``split`` as the encoder takes them (of tiles, the whole image), RGB."""
        assert self.processor is not None
        shards, resize = self.shards(split), self.processor.transform.resize
        contents = (shards.image_bytes(record, n) for n in range(min(at_most, shards.num_images(record))))
        return [as_picture(resize(decode_levels(content))) for content in contents]

    def originals(self, split: str, record: int) -> list[Image.Image]:
        """The images of a record of ``split`` as they are stored, RGB and upright; none for a record without."""
        shards = self.shards(split)
        return [decode_image(shards.image_bytes(record, number)) for number in range(shards.num_images(record))]

    def _open(self, split: str) -> ShardCollection:
        pattern = self.patterns[split]
        if pattern is None:
            raise InputError(
                f"data.{split}: expected shards, for example --data.{split} 'mine/{split}-*.tar', got none"
            )
        collections = []
        if self.trainer is None:  # else `prepare_data` has, on one process of this machine
            self._fetch(split)
        for where, one in self._named_sets(split):
            shards: str | Sequence[str] = one.shards
            if self.shard_cache is not None:
                paths = expand_shards(shards, where, pipes=True)
                check_complete(shards, where)
                shards = self.shard_cache.paths(paths, where)
            collections.append(ShardCollection(shards, where, needs_target=split != "predict"))
            of_set = f" {one.name}" if one.name else ""
            rank_zero_info(f"{split}{of_set}: {collections[-1].describe()}")
        return ShardCollection.joined(collections)

    def _named_sets(self, split: str) -> Iterator[tuple[str, SetArgs]]:
        """The split's sets, each with the setting that it came from."""
        for one in self._sets[split]:
            yield f"data.{split}.{one.name}" if one.name else f"data.{split}", one

    def identity(self, split: str) -> str:
        """Hexadecimal SHA-256 of the split's shards, with the state of each file, and of how texts are made of them."""
        shards = self.shards(split)
        states = [storage.state_of(path) for path in shards.paths]
        sets = [(one.name, one.instructions) for one in self._sets[split]]
        content = [split, shards.fingerprint(), states, sets, asdict(self.limits), self.undecodable_is_fatal]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _fetch(self, split: str) -> None:
        """Copies the split's shards to this machine, if asked to."""
        if self.shard_cache is not None:
            for where, one in self._named_sets(split):
                self.shard_cache.fetch(expand_shards(one.shards, where, pipes=True), where)

    def set_names(self, split: str) -> tuple[str, ...]:
        """Names of a split's sets; none where it is a single one without a name."""
        return tuple(one.name for one in self._sets.get(split, ()) if one.name)

    def tasks(self, split: str) -> dict[str, str]:
        """Set -> what it is scored by; "" for a split that is a single set without a name."""
        return {one.name: one.metric or self.metric for one in self._sets.get(split, ())}

    def scoring_rules(self, tokenizer: Tokenizer) -> ScoringRules:
        """What scores follow, with the tokenizer that captions get where `caption_tokenizer` is None."""
        return ScoringRules(
            DEFAULT_METRICS if self.caption_metrics is None else self.caption_metrics,
            self.caption_tokenizer or tokenizer,
            self.vqa_variant,
        )

    def _check_scoring(self) -> None:
        """Raises InputError for settings of metrics by which no split is scored."""
        used = {task for split in ("val", "test", "predict") for task in self.tasks(split).values()}
        for name, tasks in (("caption_metrics", (CAPTION,)), ("vqa_variant", VARIANT_TASKS)):
            if getattr(self, name) is not None and used and not used.intersection(tasks):
                raise InputError(
                    f"data.{name}: expected data.metric, or that of a set, to be {' or '.join(tasks)}, got "
                    f"{', '.join(sorted(used))}"
                )
        self.scoring_rules("auto")  # which has rules of its own

    @property
    def epoch_order(self) -> EpochOrder:
        """Which training records an epoch takes.

        Raises:
            InputError: weights, sizes and temperature that don't go together, or don't go with a budget of tokens.
        """
        shards, sets = self._shards["train"], self._sets["train"]
        sizes = getattr(shards, "set_sizes", (len(shards),))
        order = EpochOrder(sizes, quotas(sets, sizes, self.mixture), self.seed, self.resampled)
        if self.max_tokens is not None and not order.is_plain:
            raise InputError(
                "data.max_tokens: expected an epoch of every record once, whose batches are made beforehand, got sets of "
                f"{', '.join(map(str, sizes))} records of which an epoch takes {', '.join(map(str, order.quotas))}"
            )
        return order

    def _dataset(self, split: str) -> RecordDataset:
        assert self.processor is not None, "the data module needs a processor before it loads anything"
        return RecordDataset(
            self._shards[split],
            self.processor,
            self.limits,
            augment=self.augmentation if split == "train" else None,
            seed=self.seed,
            undecodable_is_fatal=self.undecodable_is_fatal,
            features=self._features,
            sets=self._sets[split],
            trains=split == "train",
        )

    def _loader(self, split: str, sampler: Any, collate: Callable[..., Any]) -> DataLoader[Any]:
        return BatchLoader(
            self._dataset(split),
            batch_sampler=sampler,
            collate_fn=Parcelled(collate),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=outlast_signals,
            # A loader makes a base seed from torch's global generator; with one of its own, it leaves that alone.
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),  # so that the copy to the device overlaps
        )

    def _collator(self, split: str) -> Collator:
        assert self.processor is not None
        processor = self.processor
        return Collator(
            processor.pad_id, processor.prefix_visibility, processor.shared_prefix, self.packed, self.bucket,
            self.set_names(split),
        )  # fmt: skip

    def _ranks(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "num_ranks": 1}
        return {"rank": self.trainer.global_rank, "num_ranks": self.trainer.world_size}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the data: with the trainer's own count of batches, it says what was seen."""
        position = (
            self._position if self.trainer and self._position.epoch == self.trainer.current_epoch else _Position()
        )
        return {
            "num_ranks": self._ranks()["num_ranks"], "batch_size": self.batch_size, "max_tokens": self.max_tokens,
            "num_records": len(self.epoch_order) if "train" in self._shards else None,
            "sets": self._described_sets() if "train" in self._shards else None, **asdict(position),
        }  # fmt: skip

    def _described_sets(self) -> list[list[Any]]:
        """Name, records and quota of each training set."""
        order, names = self.epoch_order, [one.name for one in self._sets["train"]]
        return [[name, size, quota] for name, size, quota in zip(names, order.sizes, order.quotas, strict=True)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: `resume` needs the trainer's count as well."""

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Finds out what a checkpoint's run had seen of its epoch, and goes on behind it.

        With other ranks or another batch size, an epoch has another number of batches: the trainer's count of those
        that are done is set to what leaves as many as the rest of the records make.

        Args:
            checkpoint: the whole of it, changed in place before the trainer reads its own part.

        Raises:
            InputError: other training data, or another budget of tokens.
        """
        before, loops = checkpoint.get(type(self).__qualname__), checkpoint.get("loops", {}).get("fit_loop")
        if not before or not loops or "train" not in self._shards:
            return
        _finish_epoch(loops)
        epoch = int(loops["epoch_progress"]["current"]["processed"])
        progress = loops["epoch_loop.batch_progress"]["current"]
        done = int(progress["processed"])
        if not done:
            return
        num_records, num_ranks = len(self.epoch_order), self._ranks()["num_ranks"]
        step = self.batch_size * num_ranks
        if epoch == loops["epoch_progress"]["current"]["ready"]:  # behind the epoch: nothing of it is left to fit
            if self.max_tokens is None:
                _set_done(progress, -(-num_records // step))
            return
        if before["num_records"] != num_records:
            raise InputError(
                f"data.train: expected the {before['num_records']} records that the checkpoint's epoch was begun with, "
                f"got {num_records}; go on from a checkpoint of an epoch's end"
            )
        sets = self._described_sets()
        if before.get("sets", sets) != sets:
            raise InputError(
                f"data.train: expected the sets (name, records, records of an epoch) {before['sets']} that the checkpoint's "
                f"epoch was begun with, got {sets}; go on from a checkpoint of an epoch's end"
            )
        if self.max_tokens is not None or before["max_tokens"] is not None:
            for name, now in (("batch_size", self.batch_size), ("max_tokens", self.max_tokens)):
                if before[name] != now:
                    raise InputError(
                        f"data.max_tokens: expected {name} {before[name]} as in the checkpoint, got {now}: batches of a "
                        "budget are made for it; go on from a checkpoint of an epoch's end"
                    )
            self._resume_budget(before, epoch, progress)
            return
        seen = before["seen"] + (done - before["batches"]) * before["batch_size"] * before["num_ranks"]
        seen = min(seen, num_records)
        batches = -(-num_records // step) - -(-(num_records - seen) // step)
        if seen < num_records:  # else the epoch was complete, and the trainer is about to begin the next
            self._position = _Position(epoch, seen, batches)
        _set_done(progress, batches)

    def _resume_budget(self, before: dict[str, Any], epoch: int, progress: dict[str, int]) -> None:
        """What was left of an epoch goes on, among as many ranks as there are now."""
        begun, earlier = before["batches"], tuple((n, done) for n, done in before.get("earlier", ()))
        num_ranks = self._ranks()["num_ranks"]
        if num_ranks != before["num_ranks"]:
            earlier = (*earlier, (before["num_ranks"], progress["processed"] - begun))
            sampler = self._budget_sampler()
            rest = len(sampler.dealt(epoch, earlier)) // num_ranks
            begun = sampler.num_batches - rest
            _set_done(progress, begun)
            if not rest:  # the epoch was complete, and the trainer is about to begin the next
                return
        self._position = _Position(epoch, batches=begun, earlier=earlier)

    def _earlier(self, epoch: int) -> tuple[tuple[int, int], ...]:
        return self._position.earlier if epoch == self._position.epoch else ()

    def _seen(self, epoch: int) -> int:
        return self._position.seen if epoch == self._position.epoch else 0

    def _batches_done(self) -> int:
        """Batches of the current epoch, of those dealt among as many ranks, that a run resumed in its middle has behind it."""
        if self.trainer is None:
            return 0
        done = int(self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        return done - self._position.batches if self.trainer.current_epoch == self._position.epoch else done

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of one epoch, shuffled by (seed, epoch)."""
        for setting, value in (("data.augmentation", self.augmentation), ("data.max_tokens", self.max_tokens)):
            if value is not None:
                self.check_tiles(setting)
        order = self.epoch_order
        names = self.set_names("train")
        if len(names) > 1:
            shares = (f"{n} {q:,} of {s:,}" for n, q, s in zip(names, order.quotas, order.sizes, strict=True))
            rank_zero_info(f"train: an epoch is {len(order):,} records: {', '.join(shares)}")
        if self.max_tokens is None:
            sampler: Any = EpochBatchSampler(order, self.batch_size, **self._ranks(), seen=self._seen)
        else:
            sampler = self._budget_sampler()
        return self._loader("train", sampler, self._collator("train").train)

    def _budget_sampler(self) -> TokenBudgetSampler:
        assert self.max_tokens is not None
        made_for = self.max_tokens, self.batch_size, self.packed, self.bucket
        if self._budget is None or self._budget[0] != made_for:  # tokenizes everything
            self._budget = made_for, self._make_budget(self.max_tokens)
        bins, shapes = self._budget[1]
        return TokenBudgetSampler(
            bins, shapes, self.seed, **self._ranks(), batches_done=self._batches_done, earlier=self._earlier
        )

    def _make_budget(self, max_tokens: int) -> tuple[list[list[int]], list[tuple[int, ...]]]:
        """The training records by batches of at most so many tokens, and their shapes."""
        shards, dataset = self._shards["train"], self._dataset("train")
        records = []
        for index in range(len(shards)):
            try:
                records.append(dataset.longest(index))
            except InputError as error:
                raise InputError(f"{shards.path_of(index)}: {shards.key(index)}: {error}") from error
        try:
            bins, shapes = self._collator("train").budget(records, max_tokens, self.batch_size)
        except ValueError as error:
            raise InputError(f"data.max_tokens: {error}") from error
        tokens = sum(len(sequence) for record in records for sequence in record)
        rank_zero_info(
            f"train: {len(bins)} batches of at most {max_tokens} tokens, of {tokens / len(bins):.0f} on average"
        )
        return bins, shapes

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        sampler = EvaluationBatchSampler(
            len(self._shards[split]), self.eval_batch_size, **self._ranks(), finished=self.finished
        )
        return self._loader(split, sampler, self._collator(split).evaluate)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split in order, each sample once."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test split in order, each sample once."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The samples to predict, in order, each once."""
        return self._evaluation_loader("predict")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Stops the run on a sample that must not be skipped.

        Raises:
            InputError: naming shard, key and reason.
        """
        for bad in batch.bad:
            if bad.fatal:
                raise InputError(str(bad) if bad.shard not in bad.reason else bad.reason)
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves every tensor of the batch."""
        assert isinstance(batch, PackedBatch | PromptBatch | EvaluationBatch)
        return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
