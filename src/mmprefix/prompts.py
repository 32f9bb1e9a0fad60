"""Instruction and images -> the ids of a prefix, in one of three formats; and what ends a target.

    plain              [images][BOS] instruction [separator]                               (as PaliGemma writes it)
    question_answer    [images][BOS] Question: instruction Answer: [separator]
    chat               the decoder's own chat template, images in front of the first user turn

Images stand in front, or where the instruction says ``<image>``. The boundary between prefix and target is never looked for
in text: a chat template is rendered with its generation prompt, which is the prefix; what it puts between that and the
answer, and what it ends an answer with, is found once, by rendering two answers and comparing.

Text is data: ``</s>`` or ``<|im_end|>`` in it are characters, not tokens that end or place something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import cached_property
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from mmprefix.errors import InputError
from mmprefix.instructions import IMAGE_MARK, as_turns, check_marks

PromptKind = Literal["plain", "question_answer", "chat"]
QUESTION, ANSWER = "Question: ", " Answer:"

_MAX_CACHED_TEXTS = 100_000
_SENTINEL = 0xE000
"""First of the private-use characters that stand for turns while a template's own text is looked at."""


class Part(Enum):
    """What a piece of a prefix is."""

    IMAGE = "image"
    INSTRUCTION = "instruction"
    FRAME = "frame"


class Piece(NamedTuple):
    """Neighbouring tokens of one part."""

    part: Part
    ids: Sequence[int]


class PromptFormat:
    """How a tokenizer's prefixes are written.

    Attributes:
        kind: `plain`, `question_answer` or `chat`.
        end: ids that follow a target and are learnt with it; generation ends at the last of them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, kind: PromptKind, separator: str, num_image_tokens: int
    ) -> None:
        """Settings.

        Args:
            tokenizer: with the image placeholder added.
            kind: see above.
            separator: text between instruction and target, tokenized on its own; a chat template has its own.
            num_image_tokens: image tokens of one view of an image.

        Raises:
            InputError: a chat template that is missing, or does not continue its own generation prompt.
        """
        if kind not in ("plain", "question_answer", "chat"):
            raise InputError(f"model.tokenizer.prompt: expected plain, question_answer or chat, got {kind!r}")
        self.tokenizer, self.kind, self.num_image_tokens = tokenizer, kind, num_image_tokens
        self.separator = separator
        self.image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_MARK))
        self._ids_of_text: dict[str, tuple[int, ...]] = {}
        self._answer_head = ""
        self.end: tuple[int, ...] = (tokenizer.eos_token_id,)
        if kind == "chat":
            self._answer_head, self.end = self._frame_of_answers()

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of text that is data."""
        # Instructions repeat ("caption en"), and each epoch asks again: a tokenizer call costs 0.1 ms and more.
        ids = self._ids_of_text.get(text)
        if ids is None:
            ids = tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
            if len(self._ids_of_text) < _MAX_CACHED_TEXTS:
                self._ids_of_text[text] = ids
        return ids

    def _template_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a template's own text, special tokens in it."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prefix(
        self, instruction: str | Sequence[str], views: Sequence[int] = (1,), max_tokens: int | None = None
    ) -> list[Piece]:
        """The prefix of one sample.

        Args:
            instruction: the text; or the turns of a conversation so far, user and assistant by turns.
            views: how many views the encoder gets of each image: 1, or more where it is cut into tiles.
            max_tokens: what the instruction's text is cut at, at the end; images never are.

        Raises:
            InputError: another number of `<image>` than of images, or turns that the assistant ends.
        """
        turns = as_turns(instruction)
        check_marks(turns, len(views))
        images = [[self.image_id] * (self.num_image_tokens * number) for number in views]
        return self._chat(turns, images, max_tokens) if self.kind == "chat" else self._plain(turns, images, max_tokens)

    def length(self, instruction: str | Sequence[str]) -> int:
        """Tokens of the instruction's own text."""
        return sum(len(self.text_ids(text)) for turn in as_turns(instruction) for text in turn.split(IMAGE_MARK))

    # Plain

    def _plain(self, turns: Sequence[str], images: list[list[int]], max_tokens: int | None) -> list[Piece]:
        text = "\n".join(turns)
        parts = text.split(IMAGE_MARK) if IMAGE_MARK in text else [*[""] * len(images), text]
        # Marks in front of all text are the same as none.
        leading = next((n for n, part in enumerate(parts) if part), len(images))
        bos = self.tokenizer.bos_token_id
        pieces = [Piece(Part.IMAGE, image) for image in images[:leading]]
        pieces.append(Piece(Part.FRAME, () if bos is None else (bos,)))
        if self.kind == "question_answer":
            pieces.append(Piece(Part.FRAME, self.text_ids(QUESTION)))
        pieces += self._content(parts[leading:], images[leading:], max_tokens)
        if self.kind == "question_answer":
            pieces.append(Piece(Part.FRAME, self.text_ids(ANSWER)))
        pieces.append(Piece(Part.FRAME, self.text_ids(self.separator)))
        return [piece for piece in pieces if piece.ids]

    def _content(self, parts: Sequence[str], images: list[list[int]], max_tokens: int | None) -> list[Piece]:
        """Texts with an image between each two, the texts cut after so many tokens in all."""
        pieces, room = [], max_tokens
        for number, part in enumerate(parts):
            if number:
                pieces.append(Piece(Part.IMAGE, images[number - 1]))
            ids = self.text_ids(part)[:room]
            room = None if room is None else room - len(ids)
            pieces.append(Piece(Part.INSTRUCTION, ids))
        return pieces

    # Chat

    def _render(self, turns: Sequence[str], answer: str | None = None) -> str:
        said = [*turns, *([] if answer is None else [answer])]
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
            )
        except Exception as error:  # a template is a program, which raises what it likes
            message = " ".join(str(error).split())[:300]
            raise InputError(f"model.tokenizer.prompt: the tokenizer's chat template fails: {message}") from error

    def _frame_of_answers(self) -> tuple[str, tuple[int, ...]]:
        """What the template puts in front of an answer, behind its generation prompt; and the ids that end one."""
        if not self.tokenizer.chat_template:
            raise InputError(
                "model.tokenizer.prompt: chat: expected a tokenizer with a chat template, this one has none; "
                "take that of the instruction-tuned model, or prompt: plain"
            )
        prompt = self._render(["?"])
        answers = [self._render(["?"], answer) for answer in ("0", "1")]
        if not all(answer.startswith(prompt) for answer in answers):
            raise InputError(
                "model.tokenizer.prompt: chat: expected a chat template whose answers continue its generation prompt, got "
                f"{answers[0]!r} after {prompt!r}"
            )
        zero, one = (answer[len(prompt) :] for answer in answers)
        head = zero[: next((n for n, (a, b) in enumerate(zip(zero, one, strict=False)) if a != b), 0)]
        tail = zero[len(head) + 1 :]
        if (zero, one) != (f"{head}0{tail}", f"{head}1{tail}"):
            raise InputError(
                f"model.tokenizer.prompt: chat: expected a chat template that writes answers as they are, got {zero!r} for '0'"
            )
        ids = self._template_ids(tail)
        stop = next((n for n, i in enumerate(ids) if i in self._special_ids), None)
        return head, (self.tokenizer.eos_token_id,) if stop is None else ids[: stop + 1]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids) | frozenset(self.tokenizer.added_tokens_decoder)

    @cached_property
    def _special_texts(self) -> tuple[str, ...]:
        own = {str(token) for token in self.tokenizer.added_tokens_decoder.values()} | {
            *self.tokenizer.all_special_tokens
        }
        return tuple(own - {IMAGE_MARK})

    def _chat(self, turns: Sequence[str], images: list[list[int]], max_tokens: int | None) -> list[Piece]:
        if images and IMAGE_MARK not in "".join(turns):
            turns = (IMAGE_MARK * len(images) + turns[0], *turns[1:])
        is_long = max_tokens is not None and self.length(turns) > max_tokens
        if is_long or any(special in turn for turn in turns for special in self._special_texts):
            return self._chat_by_parts(turns, images, max_tokens)
        text = self._render(turns) + self._answer_head
        # As a whole, so that tokens at the seams are those that the decoder was trained on.
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast)
        is_own = self._is_own(text, turns)
        offsets = encoded.get("offset_mapping") or [(0, 0)] * len(encoded["input_ids"])
        pieces: list[Piece] = []
        remaining = iter(images)
        for id_, (start, stop) in zip(encoded["input_ids"], offsets, strict=True):
            if id_ == self.image_id:
                pieces.append(Piece(Part.IMAGE, next(remaining, ())))
                continue
            part = Part.FRAME if is_own(start, stop) else Part.INSTRUCTION
            if pieces and pieces[-1].part is part:
                pieces[-1].ids.append(id_)  # type: ignore[attr-defined]
            else:
                pieces.append(Piece(part, [id_]))
        placed = sum(piece.part is Part.IMAGE for piece in pieces)
        if placed != len(images):
            raise InputError(
                f"model.tokenizer.prompt: chat: expected the chat template to keep all of {len(images)} {IMAGE_MARK}, it "
                f"kept {placed}"
            )
        return pieces

    def _own_texts(self, turns: Sequence[str]) -> list[str]:
        """What the template writes before, between and behind so many turns."""
        marks = [chr(_SENTINEL + number) for number in range(len(turns))]
        rest, own = self._render(marks) + self._answer_head, []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise InputError("model.tokenizer.prompt: chat: expected a chat template that writes every turn once")
            own.append(before)
        return [*own, rest]

    def _is_own(self, text: str, turns: Sequence[str]) -> Callable[[int, int], bool]:
        """Whether characters ``[start, stop)`` of a rendered text are the template's; none are, where that can't be told."""
        own = self._own_texts(turns)
        spans, at = [], 0
        for before, turn in zip(own, turns, strict=False):
            at += len(before)
            spans.append((at, at + len(turn)))
            at += len(turn)
        if at + len(own[-1]) != len(text):  # it trims what it is given, for example
            return lambda start, stop: False
        return lambda start, stop: all(stop <= first or start >= last for first, last in spans)

    def _chat_by_parts(self, turns: Sequence[str], images: list[list[int]], max_tokens: int | None) -> list[Piece]:
        """The template's own text and the turns apart: special tokens in turns are text, and turns can be cut."""
        pieces, room, placed = [], max_tokens, 0
        own = self._own_texts(turns)
        for before, turn in zip(own, turns, strict=False):
            parts = turn.split(IMAGE_MARK)
            content = self._content(parts, images[placed : placed + len(parts) - 1], room)
            placed += len(parts) - 1
            if room is not None:
                room -= sum(len(piece.ids) for piece in content if piece.part is Part.INSTRUCTION)
            pieces += [Piece(Part.FRAME, self._template_ids(before)), *content]
        pieces.append(Piece(Part.FRAME, self._template_ids(own[-1])))
        return [piece for piece in pieces if piece.ids]


def prompt_end(tokenizer: Any, kind: PromptKind) -> int:
    """Id that ends generation under a format."""
    return PromptFormat(tokenizer, kind, "", 0).end[-1]
