"""Text and images -> what the model takes: the one place where text becomes token ids.

`MMPrefixProcessor` is a transformers processor (`save_pretrained`, `from_pretrained`, ``processor(images, text)``).
Its `encode` turns one sample into a `TokenSequence`; truncation happens there and only on request. Image tokens are
never truncated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    BatchFeature,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from mmprefix.errors import InputError
from mmprefix.instructions import IMAGE_MARK
from mmprefix.masks import PrefixVisibility
from mmprefix.modeling import MMPrefixConfig
from mmprefix.packing import collate_prompts
from mmprefix.prompts import Piece, PromptFormat, PromptKind
from mmprefix.sequence import IGNORE_INDEX, PREFIX_BRANCH, PromptLayout, TokenSequence
from mmprefix.vision import ImageTransform, ResizeMode, VisionSpec

Truncate = Literal["none", "instruction", "target", "both"]

IMAGE_TOKEN = IMAGE_MARK


@dataclass
class TokenizerArgs:
    """The tokenizer.

    Attributes:
        name: hub name or local folder; `byte` for UTF-8 bytes, which needs no download; by default the decoder's.
        pad_token: token to pad with, for tokenizers that name none.
        eos_token: token that ends a target, for tokenizers that name none.
        prompt: how a prefix is written: `plain`, the instruction as it stands; `question_answer`, in "Question: ...
            Answer:"; `chat`, in the tokenizer's own chat template.
        separator: text between instruction and target; tokenized on its own. A chat template has its own.
        trust_remote_code: run the Python code that comes with `name`, if it needs any. Read it before.
    """

    name: str | None = None
    pad_token: str | None = None
    eos_token: str | None = None
    prompt: PromptKind = "plain"
    separator: str = "\n"
    trust_remote_code: bool = False


def load_tokenizer(args: TokenizerArgs, default: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with the image placeholder added.

    Args:
        args: which one.
        default: hub name or folder of the decoder, None for a decoder from an inline config.

    Raises:
        InputError: none to be found, or one without EOS or PAD.
    """
    name = args.name or default
    if name is None:
        raise InputError(
            "model.tokenizer.name: expected a name, a folder or `byte` for a decoder from an inline config"
        )
    names = {k: v for k, v in (("pad_token", args.pad_token), ("eos_token", args.eos_token)) if v is not None}
    if name == "byte":
        tokenizer = ByT5Tokenizer(extra_ids=0, bos_token="<s>", **names)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code, **names)
        except (OSError, ValueError) as error:
            message = " ".join(str(error).split())[:300]
            if "trust_remote_code" in message:
                message = "it needs Python code that comes with it; read it, then set model.tokenizer.trust_remote_code"
            raise InputError(f"model.tokenizer.name: cannot load {name!r}: {message}") from error
    for token in ("eos_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise InputError(
                f"model.tokenizer: expected a tokenizer with EOS and PAD, {name!r} has no {token}; "
                f"name one of its tokens with --model.tokenizer.{token}"
            )
    # As an added token it gets an id of its own, beyond the vocabulary if need be: it is never embedded.
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def text_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """1 + the largest id that text or framing can yield; the image placeholder, never embedded, is left out."""
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return 1 + max(i for i in tokenizer.get_vocab().values() if i != image_id)


class MMPrefixImageProcessor(BaseImageProcessor):
    """The encoder's image transform as a transformers image processor."""

    model_input_names = ["pixel_values"]  # noqa: RUF012  (transformers reads it from the class)

    def __init__(
        self,
        size: Sequence[int] = (224, 224),
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        interpolation: str = "bicubic",
        resize_mode: ResizeMode = "squash",
        max_tiles: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = list(size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.interpolation = interpolation
        self.resize_mode: ResizeMode = resize_mode
        self.max_tiles = max_tiles

    @classmethod
    def from_spec(cls, spec: VisionSpec) -> MMPrefixImageProcessor:
        """The processor of an encoder."""
        return cls(spec.image_size, spec.mean, spec.std, spec.interpolation, spec.resize, spec.max_tiles)

    @property
    def transform(self) -> ImageTransform:
        """The transform behind it."""
        height, width = self.size
        return ImageTransform(
            (height, width), tuple(self.image_mean), tuple(self.image_std), self.interpolation, self.resize_mode,
            self.max_tiles,
        )  # fmt: skip

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """One RGB image or a list of them -> ``pixel_values``, float32 ``[I, 3, H, W]``, of all views."""
        images = [images] if isinstance(images, Image.Image) else images
        return BatchFeature(
            {"pixel_values": torch.cat([self.transform.normalise(self.transform.views(image)) for image in images])}
        )


class MMPrefixProcessor(ProcessorMixin):
    """Image processor, tokenizer and the layout of a sequence.

    Args:
        image_processor: the encoder's transform.
        tokenizer: with the image placeholder added.
        num_image_tokens: image tokens of one image, after the connector.
        separator: text between instruction and target.
        prompt: how a prefix is written, see `prompts`.
        prefix_visibility: how prefix tokens see each other, for the plans of collated batches.
        shared_prefix: whether several targets may branch off one prefix.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 0,
        separator: str = "\n",
        prefix_visibility: PrefixVisibility = "full",
        shared_prefix: bool = True,
        chat_template: str | None = None,
        prompt: PromptKind = "plain",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.prompt: PromptKind = prompt
        self.num_image_tokens = num_image_tokens
        self.separator = separator
        self.prefix_visibility: PrefixVisibility = prefix_visibility
        self.shared_prefix = shared_prefix

    @cached_property
    def format(self) -> PromptFormat:
        """How prefixes are written.

        Raises:
            InputError: a chat template that is missing or can't be used.
        """
        return PromptFormat(self.tokenizer, self.prompt, self.separator, self.num_image_tokens)

    @cached_property
    def layout(self) -> PromptLayout:
        """Framing token ids of the plain format; the ids of image and end are those of all formats."""
        return PromptLayout(
            image=self.format.image_id,
            bos=self.tokenizer.bos_token_id,
            separator=self.format.text_ids(self.separator),
            eos=self.format.end[-1],
        )

    @property
    def pad_id(self) -> int:
        """Id that fills rows."""
        return int(self.tokenizer.pad_token_id)

    @cached_property
    def transform(self) -> ImageTransform:
        """The encoder's image transform."""
        transform: ImageTransform = self.image_processor.transform
        return transform

    def encode(
        self,
        instruction: str | Sequence[str],
        targets: Sequence[str] = (),
        *,
        views: Sequence[int] = (1,),
        max_instruction_tokens: int | None = None,
        max_target_tokens: int | None = None,
        truncate: Truncate = "none",
    ) -> TokenSequence:
        """One sample's sequence.

        Args:
            instruction: text of the prefix, in which `<image>` may say where images stand; or what user and assistant
                have said so far, by turns.
            targets: texts to learn, empty for generation.
            views: for each image how many views of it the encoder gets; empty without an image.
            max_instruction_tokens, max_target_tokens: limits, without framing tokens (EOS is not counted).
            truncate: which of the two may be cut at its limit, at the end.

        Raises:
            InputError: text beyond its limit where cutting was not asked for, or an empty target, or another number of
                `<image>` than of images.
        """
        pieces = self.prefix(instruction, views, max_instruction_tokens, truncate in ("instruction", "both"))
        target_ids = [self._limited(target, max_target_tokens, truncate in ("target", "both")) for target in targets]
        prefix = [i for piece in pieces for i in piece.ids]
        return TokenSequence.from_ids(self.format.image_id, prefix, target_ids, self.format.end)

    def prefix(
        self, instruction: str | Sequence[str], views: Sequence[int], limit: int | None, may_cut: bool
    ) -> list[Piece]:
        """The prefix of a sample by its parts; see `encode`."""
        if limit is not None and not may_cut and (length := self.format.length(instruction)) > limit:
            raise _too_long("instruction", limit, length, str(instruction))
        return self.format.prefix(instruction, views, limit)

    def _limited(self, text: str, limit: int | None, may_cut: bool) -> tuple[int, ...]:
        ids = self.format.text_ids(text)
        if limit is not None and len(ids) > limit and not may_cut:
            raise _too_long("target", limit, len(ids), text)
        return ids[:limit]

    def decode_generated(self, generated: Tensor) -> list[str]:
        """Generated ids ``[S, K]``, without the prompt -> texts, cut at EOS."""
        return self.decode_ids(generated.tolist())

    def decode_ids(self, generated: Sequence[Sequence[int]]) -> list[str]:
        """Generated ids of each row -> texts, cut at EOS."""
        texts = []
        for row in map(list, generated):
            end = row.index(self.layout.eos) if self.layout.eos in row else len(row)
            texts.append(self.tokenizer.decode(row[:end], skip_special_tokens=True).strip())
        return texts

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        suffix: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for transformers users.

        Args:
            images: RGB images: one for each text, a list for each text, all those of a single text, or None.
            text: the instruction(s); images stand in front, or where they say `<image>`.
            suffix: the target(s), for training: adds ``token_type_ids`` (0 prefix, 1 target) and ``labels``.
            return_tensors: only ``pt``.

        Returns:
            ``input_ids``, ``attention_mask`` int64 ``[B, T]`` (prompts padded on the left, training rows on the
            right), ``pixel_values`` float32 ``[I, 3, H, W]``; with a suffix ``token_type_ids`` and ``labels``.
        """
        if text is None:
            raise ValueError("expected text, got None")
        texts = [text] if isinstance(text, str) else list(text)
        of_texts = _images_of_texts(images, len(texts))
        suffixes = [suffix] if isinstance(suffix, str) else suffix
        views, all_views = [], []
        for of_text in of_texts:
            tensors = [self.transform.normalise(self.transform.views(image)) for image in of_text]
            views.append([len(tensor) for tensor in tensors])
            all_views += tensors
        pixels = {"pixel_values": torch.cat(all_views)} if all_views else {}
        if suffixes is None:
            sequences = [self.encode(t, views=v) for t, v in zip(texts, views, strict=True)]
            prompts = collate_prompts(sequences, [()] * len(texts), None, pad_id=self.pad_id)
            return BatchFeature({"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, **pixels})
        if len(suffixes) != len(texts):
            raise ValueError(f"expected one suffix for each text, got {len(suffixes)} for {len(texts)} texts")
        sequences = [self.encode(t, [s], views=v) for t, s, v in zip(texts, suffixes, views, strict=True)]
        shape = (len(sequences), max(map(len, sequences)))
        input_ids = torch.full(shape, self.pad_id, dtype=torch.long)
        attention_mask, token_type_ids = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for row, sequence in enumerate(sequences):
            n = len(sequence)
            is_target = sequence.branches != PREFIX_BRANCH
            input_ids[row, :n] = sequence.ids
            attention_mask[row, :n] = 1
            token_type_ids[row, :n] = is_target.long()
            labels[row, :n] = torch.where(is_target, sequence.ids, IGNORE_INDEX)
        return BatchFeature({
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "labels": labels, **pixels,
        })  # fmt: skip

    def to_files(self) -> dict[str, Tensor]:
        """All files of `save_pretrained` as uint8 tensors: a checkpoint carries its tokenizer, without pickles."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return {
                str(path.relative_to(folder)): torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
                for path in sorted(Path(folder).rglob("*"))
                if path.is_file() and path.stat().st_size > 0
            }

    @classmethod
    def from_files(cls, files: dict[str, Tensor]) -> MMPrefixProcessor:
        """The inverse of `to_files`."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.numpy().tobytes())
            processor: MMPrefixProcessor = cls.from_pretrained(folder)
            return processor


def _too_long(name: str, limit: int, length: int, text: str) -> InputError:
    return InputError(
        f"{name}: expected at most {limit} tokens (data.max_{name}_tokens), got {length}: {text[:60]!r}; "
        f"raise the limit or allow cutting with data.truncate={name}"
    )


def _images_of_texts(images: Any, num_texts: int) -> list[list[Image.Image]]:
    """The images of each text.

    Raises:
        ValueError: another number of images than of texts.
    """
    if images is None:
        return [[] for _ in range(num_texts)]
    given: list[Any] = [images] if isinstance(images, Image.Image) else list(images)
    if any(not isinstance(entry, Image.Image) for entry in given):  # a list for each text
        given = [[entry] if isinstance(entry, Image.Image) else list(entry or ()) for entry in given]
    elif num_texts == 1:
        given = [given]
    else:
        given = [[image] for image in given]
    if len(given) != num_texts:
        raise ValueError(f"expected the images of each text, got those of {len(given)} for {num_texts} texts")
    return given


AutoImageProcessor.register(MMPrefixConfig, image_processor_classes={"pil": MMPrefixImageProcessor})
AutoProcessor.register(MMPrefixConfig, MMPrefixProcessor)
