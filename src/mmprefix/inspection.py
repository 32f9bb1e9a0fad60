"""`inspect`: what is in a folder of shards, what is wrong with it, and what the model will see of it.

Every picture is decoded and every text is tokenized, in loader processes. Out come a table, `inspect.html` with a gallery
(the image after the transform, the tokens by their part in the sequence, what was cut) and `inspect.png` with the
distributions. Status 1 says that something in there is unusable.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os
import random
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mmprefix.arguments import CommandParser, available_cores
from mmprefix.data.features import image_digest
from mmprefix.data.images import UndecodableImageError, decode_levels
from mmprefix.data.index import read_index
from mmprefix.data.loading import TextLimits
from mmprefix.data.samples import Sample
from mmprefix.data.shards import ShardCollection, expand_shards
from mmprefix.data.writing import quantiles
from mmprefix.errors import InputError, printable
from mmprefix.evaluation.pictures import side_by_side, to_image
from mmprefix.files import replacing
from mmprefix.instructions import IMAGE_MARK
from mmprefix.processing import MMPrefixImageProcessor, MMPrefixProcessor, TokenizerArgs, load_tokenizer
from mmprefix.prompts import Part
from mmprefix.vision import ConnectorArgs, VisionArgs, build_connector, resolve_vision

_SHOWN = 12
_BINS = 24
_BYTES = 4
"""Of a character in UTF-8, at most: tokens that may be one together."""
_NAMED = 3
"""Examples in a remark."""
_LISTED = 200
"""Problems of a split that the page lists; all are counted."""


@dataclass
class Finding:
    """What was found out about one record, in a loader process."""

    index: int
    shard: str
    key: str
    sizes: list[tuple[int, int]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    without_target: int = 0
    instruction_tokens: list[int] = field(default_factory=list)
    target_tokens: list[int] = field(default_factory=list)
    unknown_tokens: int = 0
    tokens_used: set[int] = field(default_factory=set)
    cut: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class _Records(Dataset[Finding]):
    """The records of a split, looked at one by one."""

    shards: ShardCollection
    processor: MMPrefixProcessor
    limits: TextLimits

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Finding:
        found = Finding(index, os.path.basename(self.shards.path_of(index)), f"record {index}")
        try:
            found.key = self.shards.key(index)
            for number in range(self.shards.num_images(index)):
                content = self.shards.image_bytes(index, number)
                found.digests.append(image_digest(content))
                _, height, width = decode_levels(content).shape
                found.sizes.append((width, height))
        except (UndecodableImageError, InputError, OSError) as error:
            found.problems.append(str(error))
        try:
            samples = self.shards.samples(index)
        except (InputError, OSError) as error:
            found.problems.append(str(error))
            return found
        for sample in samples:
            self._look(sample, found)
        return found

    @staticmethod
    def _parts(what: str, text: str) -> list[str]:
        return text.split(IMAGE_MARK) if what == "instruction" else [text]

    def _look(self, sample: Sample, found: Finding) -> None:
        found.ids.append(sample.id)
        found.kinds.append(sample.kind)
        found.answers += sample.targets
        found.without_target += not sample.targets
        for what, texts, lengths, limit in (
            ("instruction", (sample.instruction,), found.instruction_tokens, self.limits.max_instruction_tokens),
            ("target", sample.targets, found.target_tokens, self.limits.max_target_tokens),
        ):
            for text in texts:
                # Marks of images are no text.
                ids = [i for part in self._parts(what, text) for i in self.processor.format.text_ids(part)]
                lengths.append(len(ids))
                found.tokens_used.update(ids)
                found.unknown_tokens += sum(i == self.processor.tokenizer.unk_token_id for i in ids)
                if limit is None or len(ids) <= limit:
                    continue
                if self.limits.truncate in (what, "both"):
                    found.cut += 1
                else:
                    found.problems.append(f"{sample.id}: {what} of {len(ids)} tokens, at most {limit}: {text[:60]!r}")


@dataclass
class Split:
    """A split and everything found out about it.

    Attributes:
        repeated: some records whose image stood in an earlier one.
        problems: what can't be used, with shard and key.
        remarks: what can be used, but is worth knowing.
    """

    name: str
    shards: ShardCollection | None = None
    num_samples: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    digests: Counter[str] = field(default_factory=Counter)
    ids: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    instruction_tokens: Counter[int] = field(default_factory=Counter)
    target_tokens: Counter[int] = field(default_factory=Counter)
    tokens_used: set[int] = field(default_factory=set)
    unknown_tokens: int = 0
    cut: int = 0
    without_target: int = 0
    repeated: list[str] = field(default_factory=list)
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        """Counts one, and keeps it if there are few."""
        self.num_problems += 1
        if len(self.problems) < _LISTED:
            self.problems.append(text)

    def add(self, found: Finding) -> None:
        """Takes in a record."""
        self.num_samples += len(found.ids)
        self.sizes.update(found.sizes)
        if len(self.repeated) < _NAMED and any(digest in self.digests for digest in found.digests):
            self.repeated.append(f"{found.shard}: {found.key}")
        self.digests.update(found.digests)
        self.ids.update(found.ids)
        self.kinds.update(found.kinds)
        self.answers.update(found.answers)
        self.instruction_tokens.update(found.instruction_tokens)
        self.target_tokens.update(found.target_tokens)
        self.tokens_used |= found.tokens_used
        self.unknown_tokens += found.unknown_tokens
        self.cut += found.cut
        self.without_target += found.without_target
        for text in found.problems:
            self.problem(f"{found.shard}: {found.key}: {text}")

    @property
    def num_tokens(self) -> int:
        """Of all texts, without framing."""
        return sum(length * n for c in (self.instruction_tokens, self.target_tokens) for length, n in c.items())


def parse(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The command's own options, and the others, which are those of ``fit``."""
    parser = CommandParser(
        "inspect", "Looks at every record of a folder of shards.", "With --config, every setting of `fit` can follow."
    )
    parser.add_argument("folder", type=Path, help="folder of shards, SPLIT-*.tar")
    parser.add_argument(
        "--config", action="append", help="config of `fit`: its tokenizer, image size and limits; else bytes"
    )
    parser.add_argument("--splits", nargs="+", help="by default all of the folder")
    parser.add_argument("--out", type=Path, help="where inspect.html and inspect.png go; by default the folder")
    parser.add_argument("--samples", type=int, default=48, help="records in the gallery, of each split")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    parser.add_argument("--num_workers", type=int, default=available_cores(), help="loader processes")
    parser.add_argument("--checksums", action="store_true", help="compare shards with the SHA-256 in index.json")
    options, others = parser.parse_with_settings(arguments)
    for name in ("samples", "num_workers"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name}: expected at least 0, got {getattr(options, name)}")
    if others and not options.config:
        raise InputError(f"inspect: expected --config with settings of fit, got {others[0]} alone")
    if not options.folder.is_dir():
        found = f"got the file {options.folder}" if options.folder.exists() else f"found none at {options.folder}"
        raise InputError(f"inspect: expected a folder of shards, {found}")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out: expected a folder, got the file {options.out}")
    return options, others


def inspect(options: Namespace, settings: Mapping[str, Any] | None) -> int:
    """Prints the table, writes page and picture, and returns 0, or 1 where something is unusable.

    Args:
        options: from `parse`.
        settings: of ``fit`` (`model`, `data`); None takes bytes for tokens, and no limits.

    Raises:
        InputError: a folder without shards, or settings that don't make a processor.
    """
    processor, limits = _processor(settings)
    found = _splits_of(options.folder)
    names = options.splits or list(found)
    for name in names:
        if name not in found:
            raise InputError(f"--splits: expected some of {', '.join(found)}, got {name!r}")
    splits = [_look_at(name, found[name], processor, limits, options) for name in names]
    _compare(splits)
    for split in splits:
        print("\n".join(map(printable, _lines(split, processor))))
    folder = options.out or options.folder
    with replacing(folder / "inspect.png") as temporary:
        picture = draw_distributions(splits, settings is not None)
        picture.save(temporary, "PNG")
    with replacing(folder / "inspect.html") as temporary:
        page = _page(splits, picture, processor, limits, options)
        temporary.write_text(page, encoding="utf-8")
    print(f"{folder / 'inspect.html'}, {folder / 'inspect.png'}")
    return 1 if any(split.num_problems for split in splits) else 0


def _processor(settings: Mapping[str, Any] | None) -> tuple[MMPrefixProcessor, TextLimits]:
    """What turns text into tokens and images into pixels, without building a model."""
    if settings is None:
        tokenizer = load_tokenizer(TokenizerArgs(name="byte"), None)
        return MMPrefixProcessor(MMPrefixImageProcessor(), tokenizer), TextLimits(None, None, "none")
    model, data = settings["model"], settings["data"]
    limits = TextLimits(data["max_instruction_tokens"], data["max_target_tokens"], data["truncate"])
    if model["pretrained"] is not None:
        try:
            return MMPrefixProcessor.from_pretrained(model["pretrained"]), limits
        except Exception as error:  # each reader has errors of its own
            message = " ".join(str(error).split())[:200]
            raise InputError(
                f"model.pretrained: {model['pretrained']}: cannot read its processor: {message}"
            ) from error
    args = TokenizerArgs(**model["tokenizer"])
    spec = resolve_vision(VisionArgs(**model["vision"]))
    _, num_image_tokens = build_connector(ConnectorArgs(**model["connector"]), spec, 1)
    processor = MMPrefixProcessor(
        MMPrefixImageProcessor.from_spec(spec),
        load_tokenizer(args, model["decoder"]["name"]),
        num_image_tokens=num_image_tokens,
        separator=args.separator,
        prompt=args.prompt,
    )
    _ = processor.format  # a chat template that can't be used is bad input, not a bad record
    return processor, limits


def _splits_of(folder: Path) -> dict[str, list[str]]:
    """Shards by split: by the index, else by the name in front of the number."""
    splits: dict[str, list[str]] = {}
    index = read_index(folder)
    of_shard = {shard["name"]: name for name, entry in index.items() for shard in entry["shards"]}
    for path in expand_shards(str(folder), "inspect"):
        name = os.path.basename(path)
        in_front = name.removesuffix(".tar").rstrip("0123456789").rstrip("-_.")
        splits.setdefault(of_shard.get(name) or in_front or "all", []).append(path)
    for name, entry in index.items():
        if entry["shards"]:  # all of which may be missing
            splits.setdefault(name, [])
    return splits


def _look_at(
    name: str, paths: list[str], processor: MMPrefixProcessor, limits: TextLimits, options: Namespace
) -> Split:  # fmt: skip
    split = Split(name)
    usable = []
    for path in paths:  # one by one: each broken shard is named
        problems: list[str] = []
        try:
            if len(ShardCollection(path, name, needs_target=False, problems=problems)):
                usable.append(path)
        except (InputError, OSError) as error:
            problems.append(str(error))
        for problem in problems:
            split.problem(problem)
    if options.checksums:
        _check_sums(options.folder, split)
    _check_complete(options.folder, paths, split)
    if not usable:
        return split
    split.shards = shards = ShardCollection(usable, name, needs_target=False, problems=[])
    loader: DataLoader[Finding] = DataLoader(
        _Records(shards, processor, limits), batch_size=16, collate_fn=list, num_workers=options.num_workers
    )
    refresh = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(desc=name, total=len(shards), mininterval=refresh, unit="image", leave=False, delay=0.5) as bar:
        for batch in loader:
            for found in batch:
                split.add(found)
            bar.update(len(batch))
    repeated = sum(n > 1 for n in split.digests.values())
    if repeated:
        split.remarks.append(f"images in more than one record: {repeated:,} ({_and_more(split.repeated, repeated)})")
    for id_, n in split.ids.items():
        if n > 1:
            split.problem(f"sample id {id_!r} comes {n} times: ids name predictions")
    if split.cut:
        split.remarks.append(f"texts cut at their limit: {split.cut:,}")
    if split.without_target:
        split.remarks.append(f"samples without a target, which only `predict` takes: {split.without_target:,}")
    if split.unknown_tokens:
        split.remarks.append(f"tokens unknown to the tokenizer: {split.unknown_tokens:,} of {split.num_tokens:,}")
    return split


def _check_sums(folder: Path, split: Split) -> None:
    for shard in (read_index(folder).get(split.name) or {"shards": []})["shards"]:
        path = folder / shard["name"]
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.get("sha256"):
                split.problem(f"{path}: expected SHA-256 {shard.get('sha256')}, got {digest}")


def _and_more(names: Sequence[str], number: int) -> str:
    """Some of them, of so many."""
    shown = ", ".join(names[:_NAMED])
    return f"{shown} and {number - _NAMED:,} more" if number > _NAMED else shown


def _check_complete(folder: Path, paths: Sequence[str], split: Split) -> None:
    known = [shard["name"] for shard in (read_index(folder).get(split.name) or {"shards": []})["shards"]]
    strangers = [name for name in map(os.path.basename, paths) if known and name not in known]
    if strangers:
        split.remarks.append(f"shards that index.json doesn't list: {_and_more(strangers, len(strangers))}")
    for name in known:
        if not (folder / name).is_file():
            split.problem(f"{folder / name}: expected a shard, as index.json says, found none")


def _compare(splits: Sequence[Split]) -> None:
    for n, one in enumerate(splits):
        for other in splits[n + 1 :]:
            shared = len(one.digests.keys() & other.digests.keys())
            if shared:
                one.remarks.append(f"images that stand in {other.name}, too: {shared:,}")


def _lines(split: Split, processor: MMPrefixProcessor) -> list[str]:
    """What the terminal shows of a split."""
    shards = split.shards
    lines = [f"{split.name}: {shards.describe() if shards else 'no usable shard'}"]
    if len(split.kinds) > 1:
        lines.append("  kinds: " + ", ".join(f"{kind} {n:,}" for kind, n in split.kinds.most_common(_SHOWN)))
    for what, counts in (
        ("width", _sides(split, 0)), ("height", _sides(split, 1)),
        ("instruction tokens", split.instruction_tokens), ("target tokens", split.target_tokens),
    ):  # fmt: skip
        if counts:
            lines.append(f"  {what}: " + ", ".join(f"{name} {value}" for name, value in quantiles(counts).items()))
    if split.answers:
        shown = [f"{_shortened(text, 30)!r} {n:,}" for text, n in split.answers.most_common(_SHOWN)]
        lines.append(f"  {len(split.answers):,} different targets: {', '.join(shown)}")
        text_vocabulary = len(processor.tokenizer)
        lines.append(f"  {len(split.tokens_used):,} of the tokenizer's {text_vocabulary:,} tokens are used")
    lines += [f"  remark: {remark}" for remark in split.remarks]
    lines += [f"  unusable: {problem}" for problem in split.problems[:_SHOWN]]
    if split.num_problems > _SHOWN:
        lines.append(f"  and {split.num_problems - _SHOWN:,} more")
    return lines


def _sides(split: Split, side: int) -> Counter[int]:
    counts: Counter[int] = Counter()
    for size, n in split.sizes.items():
        counts[size[side]] += n
    return counts


# Pictures -------------------------------------------------------------------------------------------------------------

_INK, _BAR, _GRID = (30, 30, 30), (70, 110, 180), (225, 225, 225)
_WIDTH, _HEIGHT = 360, 200


def draw_distributions(splits: Sequence[Split], real_tokens: bool) -> Image.Image:
    """Histograms of image sides and text lengths, a row for each split, RGB."""
    unit = "tokens" if real_tokens else "bytes"
    picture = Image.new("RGB", (4 * _WIDTH, max(1, len(splits)) * _HEIGHT), "white")
    for row, split in enumerate(splits):
        for column, (what, counts) in enumerate((
            ("image width (pixels)", _sides(split, 0)), ("image height (pixels)", _sides(split, 1)),
            (f"instruction ({unit})", split.instruction_tokens), (f"target ({unit})", split.target_tokens),
        )):  # fmt: skip
            _draw_histogram(picture, (column * _WIDTH, row * _HEIGHT), f"{split.name}: {what}", counts)
    return picture


def _draw_histogram(picture: Image.Image, corner: tuple[int, int], title: str, counts: Counter[int]) -> None:
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    left, top, right, bottom = corner[0] + 48, corner[1] + 34, corner[0] + _WIDTH - 16, corner[1] + _HEIGHT - 30
    draw.text((corner[0] + 12, corner[1] + 8), title, _INK, font)
    if not counts:
        draw.text((left, (top + bottom) // 2), "none", _INK, font)
        return
    low, high = min(counts), max(counts)
    step = -(-(high - low + 1) // _BINS)
    bins = [0] * (-(-(high - low + 1) // step))
    for value, n in counts.items():
        bins[(value - low) // step] += n
    most = max(bins)
    for share in (0.5, 1.0):
        y = bottom - share * (bottom - top)
        draw.line((left, y, right, y), _GRID)
        draw.text((left - 6, y), f"{share * most:,g}", _INK, font, anchor="rm")
    if len(bins) == 1:  # all are equal: a bar in the middle
        bins = [0] * 5 + bins + [0] * 5
    width = (right - left) / len(bins)
    for n, height in enumerate(bins):
        box = (left + n * width, bottom - height / most * (bottom - top), left + (n + 1) * width - 1, bottom)
        draw.rectangle((box[0], box[1], max(box[0], box[2]), box[3]), _BAR)
    draw.line((left, bottom, right, bottom), _INK)
    draw.text((left, bottom + 6), f"{low:,}", _INK, font)
    draw.text((right, bottom + 6), f"{high:,}", _INK, font, anchor="ra")


def _embedded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# The page -------------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c1c1c; }
h2 { margin-top: 2.5rem; } img.wide { max-width: 100%; border: 1px solid #ddd; }
table { border-collapse: collapse; }
td { overflow-wrap: anywhere; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
.bad { color: #a11212; } .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
article { border: 1px solid #ccc; border-radius: 6px; padding: .8rem; overflow: hidden; }
article img { max-width: 100%; image-rendering: auto; display: block; margin-bottom: .5rem; }
.tokens { max-height: 14rem; overflow-y: auto; }
.tokens span { white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 3px; padding: 1px 0; margin-right: 1px; }
.image { background: #e4d8f2; } .frame { background: #e3e3e3; } .instruction { background: #cfe2f8; }
.target { background: #cdeccf; } .cut { background: #f6cccc; text-decoration: line-through; }
.meta { color: #555; font-size: 13px; overflow-wrap: anywhere; }
"""
_LEGEND = (
    '<p class="tokens"><span class="image">image tokens</span> <span class="instruction">instruction</span> '
    '<span class="frame">framing</span> (these are the prefix, each sees all of it) <span class="target">target</span> '
    '<span class="cut">cut</span></p>'
)


def _page(
    splits: Sequence[Split], picture: Image.Image, processor: MMPrefixProcessor, limits: TextLimits, options: Namespace
) -> str:
    """The whole page; text from the data is always escaped."""
    title = html.escape(f"{options.folder}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main><h1>{title}</h1>",
        _table(
            ("split", "shards", "records", "images", "samples", "targets", "kinds", "unusable"),
            [
                (split.name, *_sizes(split), split.num_samples, sum(split.answers.values()), len(split.kinds),
                 split.num_problems)
                for split in splits
            ],
        ),
        f'<p><img class="wide" alt="histograms of image sides and text lengths" src="{_embedded(picture)}"></p>',
    ]  # fmt: skip
    for split in splits:
        parts.append(f"<h2>{html.escape(split.name)}</h2>")
        if split.problems:
            more = f" (the first {len(split.problems)})" if split.num_problems > len(split.problems) else ""
            parts.append(f'<h3 class="bad">{split.num_problems:,} unusable{more}</h3><ul>')
            parts += [f"<li>{html.escape(problem)}</li>" for problem in split.problems]
            parts.append("</ul>")
        parts += [f"<p>{html.escape(remark)}</p>" for remark in split.remarks]
        parts.append("<h3>Most frequent targets</h3>")
        frequent = [(_shortened(text, 200), n) for text, n in split.answers.most_common(20)]
        parts.append(_table(("target", "times"), frequent))
        if len(split.kinds) > 1:
            parts += ["<h3>Kinds</h3>", _table(("kind", "samples"), split.kinds.most_common(40))]
        if split.shards is not None and options.samples:
            parts += ["<h3>Samples, as the model sees them</h3>", _LEGEND, '<div class="cards">']
            parts += _cards(split.shards, processor, limits, options)
            parts.append("</div>")
    parts.append("</main></body></html>\n")
    return "\n".join(parts)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _sizes(split: Split) -> tuple[int, int, int]:
    """Shards, records and images."""
    shards = split.shards
    return (0, 0, 0) if shards is None else (len(shards.paths), len(shards), shards.num_all_images)


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def cells(tag: str, values: Iterable[Any]) -> str:
        return "".join(f"<{tag}>{html.escape(f'{v:,}' if isinstance(v, int) else str(v))}</{tag}>" for v in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _cards(shards: ShardCollection, processor: MMPrefixProcessor, limits: TextLimits, options: Namespace) -> list[str]:
    chosen = random.Random(options.seed).sample(range(len(shards)), min(options.samples, len(shards)))
    cards = []
    for index in sorted(chosen):
        where = f"{os.path.basename(shards.path_of(index))}: {shards.key(index)}"
        try:
            pictures, sizes, views = [], [], []
            for number in range(shards.num_images(index)):
                original = decode_levels(shards.image_bytes(index, number))
                tensors = processor.transform.views(original)
                views.append(len(tensors))
                seen = side_by_side([to_image(tensor, processor.transform) for tensor in tensors])
                alt = html.escape(f"image {shards.key(index)}")
                pictures.append(f'<img loading="lazy" alt="{alt}" src="{_embedded(seen)}">')
                sizes.append(f"{original.shape[2]} x {original.shape[1]}, seen as {_seen_as(tensors)}")
            picture, size = "".join(pictures), "; ".join(sizes) or "no image"
        except (UndecodableImageError, InputError, OSError) as error:
            picture, size = f'<p class="bad">{html.escape(str(error))}</p>', ""
        try:
            texts = [_sample(sample, views, processor, limits) for sample in shards.samples(index)]
        except (InputError, OSError) as error:
            texts = [f'<p class="bad">{html.escape(str(error))}</p>']
        cards.append(f'<article>{picture}<p class="meta">{html.escape(where)} · {size}</p>{"".join(texts)}</article>')
    return cards


def _seen_as(views: Tensor) -> str:
    count = f"{len(views)} views of " if len(views) > 1 else ""
    return f"{count}{views.shape[3]} x {views.shape[2]}"


def _sample(sample: Sample, views: Sequence[int], processor: MMPrefixProcessor, limits: TextLimits) -> str:
    """A sample's tokens, coloured by the sequence that the model is given, and what was cut off it."""
    if len(views) != sample.images:  # an image could not be decoded, which is said above
        views = [1] * sample.images
    pieces = processor.prefix(sample.turns, views, limits.max_instruction_tokens, may_cut=True)
    last = max((n for n, piece in enumerate(pieces) if piece.part is Part.INSTRUCTION), default=-1)
    spans = []
    for place, piece in enumerate(pieces):
        if piece.part is Part.IMAGE:
            spans.append(_span("image", f"{len(piece.ids)} image tokens"))
            continue
        spans += _spans(piece.part.value, piece.ids, processor)
        if place == last:
            spans.append(_span("cut", _beyond(processor, sample.instruction, limits.max_instruction_tokens)))
    lines = [
        f'<p class="meta">{html.escape(sample.id)} · {html.escape(sample.kind)}</p><p class="tokens">{"".join(spans)}</p>'
    ]
    for target in sample.targets:
        ids = processor.format.text_ids(target)[: limits.max_target_tokens]
        spans = _spans("target", ids, processor)
        spans.append(_span("cut", _beyond(processor, target, limits.max_target_tokens)))
        spans += _spans("frame", processor.format.end, processor)
        lines.append(f'<p class="tokens">{"".join(spans)}</p>')
    return "".join(lines)


def _beyond(processor: MMPrefixProcessor, text: str, limit: int | None) -> str:
    """What lies beyond the limit; nothing by default."""
    ids = [i for part in text.split(IMAGE_MARK) for i in processor.format.text_ids(part)]
    return "" if limit is None or len(ids) <= limit else str(processor.tokenizer.decode(ids[limit:]))


def _spans(kind: str, ids: Sequence[int], processor: MMPrefixProcessor) -> list[str]:
    """A span for each token; for several together, where only together they are a character."""
    spans: list[str] = []
    waiting: list[int] = []
    for id_ in ids:
        waiting.append(id_)
        text = str(processor.tokenizer.decode(waiting))
        is_special = id_ in processor.tokenizer.all_special_ids
        if not is_special and len(waiting) < _BYTES and (not text or "\N{REPLACEMENT CHARACTER}" in text):
            continue
        spans.append(_span(kind, text.replace("\n", "↵") or "·"))
        waiting = []
    return [*spans, *(_span(kind, "·") for _ in waiting)]


def _span(kind: str, text: str) -> str:
    return f'<span class="{kind}">{html.escape(text)}</span>' if text else ""


def inspect_command(arguments: list[str], read_settings: Callable[[list[str]], Mapping[str, Any]]) -> int:
    """`inspect`, with settings read as ``fit`` would read them."""
    options, others = parse(arguments)
    settings = None
    if options.config:
        settings = read_settings([*(word for path in options.config for word in ("--config", path)), *others])
    return inspect(options, settings)
