"""Answers to many prompts: rows that are done make room for prompts that wait, so that no step is spent on what has ended.

`generate` of transformers decodes a batch until its longest answer is done, and pads its prompts to the longest. Here,
prompts of like length are prefilled together, and as soon as enough rows have ended, others take their places in the
same cache. Every row is padded on its left, so that all end in the same column, as `generate` has it:

    . . p p p t t t      p prefix, t generated, . padding
    p p p p p p t t      columns that are padding for all are cut off

Where attention can do without masks, prompts are prefilled as training sees them, in one row without padding, and the last
layer computes what their last tokens need; their keys and values are then spread over the rows. On a GPU, such decoders
keep their rows in places of fixed size, and a step is one CUDA graph (`places`).

What this module leaves to transformers' `generate`, batch by batch: beams, decoders whose cache isn't keys and values
alone, and generation configs that change logits (a repetition penalty).

Sampling takes one random number for each token, drawn from (seed, sample), and the token at that place of the
distribution's cumulative sum: a text depends neither on its neighbours nor on ranks or order, up to rounding.

Shapes: R rows, L columns, V vocabulary, S prompts, G key-value heads, D head size.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mmprefix.decoder import windows_of
from mmprefix.errors import InputError
from mmprefix.generation import keep_everything
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.onednn import linears_by_onednn
from mmprefix.packing import PrefixPlan, map_tensors, pack_prompts
from mmprefix.places import Places

_PLAIN_SETTINGS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "max_length",
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "num_return_sequences", "use_cache",
    "output_attentions", "output_hidden_states", "return_dict_in_generate", "_from_model_config",
}  # fmt: skip
"""Of a generation config, what doesn't change logits, or is set by our own settings. All else is the library's business."""


@dataclass(frozen=True)
class SamplingArgs:
    """How answers are drawn. The order is transformers': temperature, then `top_k`, then `top_p`.

    Attributes:
        temperature: what logits are divided by; below 1 sharpens.
        top_p: only the likeliest tokens that together have this probability, in (0, 1]; 1 for all.
        top_k: only so many of the likeliest tokens; null for all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    def check(self, num_beams: int = 1) -> None:
        """Raises InputError for values that nothing can be drawn with, or beams beside them."""
        if not 0 < self.temperature < float("inf"):
            greedy = "; for greedy answers leave model.sampling out" if self.temperature == 0 else ""
            raise InputError(f"model.sampling.temperature: expected more than 0, got {self.temperature:g}{greedy}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"model.sampling.top_p: expected more than 0 and at most 1, got {self.top_p:g}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"model.sampling.top_k: expected at least 1, or null for all, got {self.top_k}")
        if num_beams > 1:
            raise InputError(f"model.sampling: expected model.num_beams: 1 beside it, got {num_beams}")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prefix that waits for its answer.

    Attributes:
        ids: int64 ``[T]``.
        images: float ``[N, W]`` each, tokens of its images in the order of their placeholders.
        sample: what its random numbers are drawn from, beside the seed.
        expected: length of its target where that is known, 0 elsewhere: of prompts of equal length, what may take long
            begins first.
    """

    ids: Tensor
    images: tuple[Tensor, ...] = ()
    sample: str = ""
    expected: int = 0


def uniform_numbers(seed: int, sample: str, count: int) -> Tensor:
    """The random numbers of a sample's tokens, float32 ``[count]`` in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, generator=generator)


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingArgs) -> Tensor:
    """Tokens by the inverse of the cumulative distribution, likeliest first.

    Args:
        logits: float ``[R, V]``.
        uniform: float ``[R]`` in [0, 1).
        sampling: of the distribution.

    Returns:
        int64 ``[R]``.
    """
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        values, tokens = logits.topk(sampling.top_k, dim=1)
    else:
        values, tokens = logits.sort(dim=1, descending=True, stable=True)
    below = values.softmax(1).cumsum(1)
    # Tokens up to the first at which `top_p` is reached; the draw is rescaled to what they have together.
    number = (below < sampling.top_p).sum(1, keepdim=True).clamp(max=values.shape[1] - 1)
    place = (below <= uniform.unsqueeze(1) * below.gather(1, number)).sum(1, keepdim=True)
    return tokens.gather(1, torch.minimum(place, number)).squeeze(1)


def answers(
    model: MMPrefixForConditionalGeneration,
    prompts: Sequence[Prompt],
    *,
    rows: int,
    max_new_tokens: int,
    num_beams: int = 1,
    sampling: SamplingArgs | None = None,
    seed: int = 0,
    packed: bool = False,
    in_places: bool | None = None,
) -> list[list[int]]:
    """Generated ids of each prompt, in the order of ``prompts``, EOS left out.

    Args:
        model: in eval mode; all of it on this process.
        prompts: the whole window.
        rows: how many are answered at a time.
        max_new_tokens: of an answer, EOS included.
        num_beams: 1 for greedy answers, or those of ``sampling``.
        sampling: how to draw; None for greedy and beams.
        seed: of ``sampling``.
        packed: whether decoder, device and precision attend to packed rows without a mask.
        in_places: whether rows have places of fixed size; by default where that pays, on a GPU.
    """
    if not prompts:
        return []
    # Long ones first: the padding of a row that comes later is then cut off, and what may take long isn't left for the end.
    order = sorted(range(len(prompts)), key=lambda n: (-prompts[n].ids.numel(), -prompts[n].expected))
    uniform = None
    if sampling is not None:
        numbers = [uniform_numbers(seed, prompt.sample, max_new_tokens) for prompt in prompts]
        uniform = torch.stack(numbers).to(prompts[0].ids.device)
    how = _Decoding(model, prompts, rows, max_new_tokens, sampling, uniform, packed)
    cache = _fresh_cache(model) if num_beams == 1 else None
    generated: list[list[int]] = [[] for _ in prompts]
    if in_places is None:
        in_places = prompts[0].ids.is_cuda
    if cache is None:
        found = how.by_batches(order, num_beams)
    else:
        found = how.in_places(order) if in_places and model.config.mask_free else how.with_refills(order)
    with linears_by_onednn(model):
        for number, ids in found:
            generated[number] = ids
    return generated


def _fresh_cache(model: MMPrefixForConditionalGeneration) -> DynamicCache | None:
    """An empty cache of keys and values whose rows can be taken out and put in; None where this model has none such."""
    changed = {name for name, value in model.generation_config.to_diff_dict().items() if value is not None}
    if changed - _PLAIN_SETTINGS or "dynamic" in model.config.refused_caches:
        return None
    if not model.decoder._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.text_config)
    keep_everything(cache)
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


@dataclass
class _Rows:
    """Rows that are being answered.

    Attributes:
        cache: keys and values of all columns but the last.
        mask: int64 ``[R, L]``, 0 on padding.
        is_target: bool ``[R, L]``, what was generated.
        last: int64 ``[R]``, the token of the last column.
        numbers: of the prompt in each row.
        ids: what each row has generated.
        done: rows that have ended, and wait to be taken out.
    """

    cache: Cache
    mask: Tensor
    is_target: Tensor
    last: Tensor
    numbers: list[int]
    ids: list[list[int]]
    done: list[bool] = field(default_factory=list)

    @property
    def num_going(self) -> int:
        return len(self.done) - sum(self.done)

    def without_done(self) -> _Rows | None:
        """The rows that go on; None where there are none."""
        going = [row for row, done in enumerate(self.done) if not done]
        if not going:
            return None
        if len(going) == len(self.done):
            return self
        index = torch.tensor(going, device=self.mask.device)
        self.cache.batch_select_indices(index)  # type: ignore[no-untyped-call]
        rows = _Rows(
            self.cache, self.mask[index], self.is_target[index], self.last[index], [self.numbers[row] for row in going],
            [self.ids[row] for row in going], [False] * len(going),
        )  # fmt: skip
        rows._cut_padding()
        return rows

    def _cut_padding(self) -> None:
        """Cuts off the columns that are padding for all."""
        columns = int(self.mask.any(0).int().argmax())
        if columns:
            self.mask, self.is_target = self.mask[:, columns:], self.is_target[:, columns:]
            for layer in _filled(self.cache):
                layer.keys, layer.values = layer.keys[:, :, columns:], layer.values[:, :, columns:]

    def joined(self, other: _Rows) -> _Rows:
        """These rows and others below them, the shorter ones padded on the left."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        for part in (self, other):
            more = length - part.mask.shape[1]
            part.mask, part.is_target = F.pad(part.mask, (more, 0)), F.pad(part.is_target, (more, 0))
            for layer in _filled(part.cache):
                layer.keys, layer.values = (F.pad(x, (0, 0, more, 0)) for x in (layer.keys, layer.values))
        for own, others in zip(_filled(self.cache), _filled(other.cache), strict=True):
            own.keys = torch.cat([own.keys, others.keys])
            own.values = torch.cat([own.values, others.values])
        return _Rows(
            self.cache, torch.cat([self.mask, other.mask]), torch.cat([self.is_target, other.is_target]),
            torch.cat([self.last, other.last]), self.numbers + other.numbers, self.ids + other.ids,
            self.done + other.done,
        )  # fmt: skip


def _filled(cache: Cache) -> list[Any]:
    """Layers with keys of their own; some decoders' later layers share those of earlier ones."""
    return [layer for layer in cache.layers if layer.is_initialized]


def _spread(packed: Tensor, places: Tensor, rows: int, length: int) -> Tensor:
    """Keys or values of a packed row, ``[1, G, L, D]``, to ``[rows, G, length, D]``, zero on padding.

    Args:
        packed: of L tokens.
        places: int64 ``[L]``, row times ``length`` plus column of each.
        rows, length: of the result.
    """
    _, heads, _, size = packed.shape
    flat = packed.new_zeros(heads, rows * length, size).index_copy_(1, places, packed[0])
    return flat.view(heads, rows, length, size).transpose(0, 1)


@dataclass
class _Decoding:
    model: MMPrefixForConditionalGeneration
    prompts: Sequence[Prompt]
    rows: int
    max_new_tokens: int
    sampling: SamplingArgs | None
    uniform: Tensor | None
    """Float ``[S, max_new_tokens]``."""
    packed: bool

    def __post_init__(self) -> None:
        config = self.model.generation_config
        ends = config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        # Prompts are masked where they are padded: any id will do.
        self.pad = config.pad_token_id or 0
        self.has_windows = bool(windows_of(self.model.config.text_config))
        if self.packed:  # rows are laid out on the CPU: one copy for all waits for the device once
            lengths = [prompt.ids.numel() for prompt in self.prompts]
            self.ids: tuple[Tensor, ...] = torch.cat([prompt.ids for prompt in self.prompts]).cpu().split(lengths)

    def padded(self, numbers: Sequence[int]) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask`` ``[R, T]``, padded on the left, and the images of all rows."""
        prompts = [self.prompts[number] for number in numbers]
        length = max(prompt.ids.numel() for prompt in prompts)
        ids = torch.stack([F.pad(p.ids, (length - p.ids.numel(), 0), value=self.pad) for p in prompts])
        missing = torch.tensor([length - p.ids.numel() for p in prompts], device=ids.device)
        mask = (torch.arange(length, device=ids.device) >= missing.unsqueeze(1)).long()
        images = [image for prompt in prompts for image in prompt.images]
        image_tokens = torch.cat(images).unsqueeze(0) if images else None
        return {"input_ids": ids, "attention_mask": mask, "image_tokens": image_tokens}

    def by_batches(self, order: Sequence[int], num_beams: int) -> Iterator[tuple[int, list[int]]]:
        """transformers' `generate` over prompts of like length."""
        for start in range(0, len(order), self.rows):
            numbers = list(order[start : start + self.rows])
            inputs = self.padded(numbers)
            width = inputs["input_ids"].shape[1]
            drawing = []
            if self.sampling is not None:
                assert self.uniform is not None
                drawing = [_Drawing(self.uniform[numbers], width, self.sampling)]
            generated = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, num_beams=num_beams, do_sample=False,
                logits_processor=LogitsProcessorList(drawing),
                synced_gpus=False,  # each process has the whole model: one with fewer batches would be waited for
            )  # fmt: skip
            for number, ids in zip(numbers, generated[:, width:].tolist(), strict=True):
                yield number, ids[: next((n for n, token in enumerate(ids) if token in self.ends), len(ids))]

    def with_refills(self, order: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Own decoding: prompts take the places of what has ended."""
        waiting = deque(order)
        going: _Rows | None = None
        # A prefill of a few rows costs as much for each as one of many, but on a GPU a single row leaves it idle.
        enough = max(1, self.rows // 8)
        while waiting or going is not None:
            free = self.rows - (0 if going is None else going.num_going)
            if waiting and (going is None or free >= enough):
                going = None if going is None else going.without_done()
                fresh = self._prefilled([waiting.popleft() for _ in range(min(free, len(waiting)))])
                yield from self._ended(fresh)
                going = fresh if going is None else going.joined(fresh)
            else:
                assert going is not None
                self._step(going)
                yield from self._ended(going)
            if not going.num_going or sum(going.done) >= enough:
                going = going.without_done()

    def in_places(self, order: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """As `with_refills`; a row stays in its place from its first token to its last."""
        waiting = deque(order)
        number_of = min(self.rows, len(order))
        enough = max(1, number_of // 8)
        places: Places | None = None
        in_place: list[int | None] = [None] * number_of
        ids: dict[int, list[int]] = {}
        while waiting or ids:
            free = [place for place, number in enumerate(in_place) if number is None]
            if waiting and (not ids or len(free) >= enough):
                fresh = self._prefilled([waiting.popleft() for _ in range(min(len(free), len(waiting)))])
                yield from self._ended(fresh)
                going = [row for row, done in enumerate(fresh.done) if not done]
                if going:
                    assert isinstance(fresh.cache, DynamicCache)
                    if places is None:
                        longest = max(prompt.ids.numel() for prompt in self.prompts)
                        columns = longest + self.max_new_tokens
                        places = Places(self.model, number_of, columns, fresh.cache, fresh.last.is_cuda)
                    places.put(free[: len(going)], fresh.cache, going, fresh.mask[:, :-1], fresh.last)
                    for place, row in zip(free, going, strict=False):
                        in_place[place] = fresh.numbers[row]
                        ids[fresh.numbers[row]] = fresh.ids[row]
                del fresh  # its cache is as large as that of the places it went to
                continue
            assert places is not None
            # What places say that nobody is in, nobody reads.
            steps = [0 if number is None else len(ids[number]) for number in in_place]
            tokens = self._chosen(places.step(), [number or 0 for number in in_place], steps)
            done: list[tuple[int, int, bool]] = []
            for place, token in enumerate(tokens.tolist()):
                number = in_place[place]
                if number is not None:
                    ids[number].append(token)
                    if token in self.ends or len(ids[number]) >= self.max_new_tokens:
                        done.append((place, number, token in self.ends))
            places.push(tokens, [place for place, _, _ in done])
            for place, number, ends in done:
                in_place[place] = None
                answer = ids.pop(number)
                yield number, answer[:-1] if ends else answer

    def _prefilled(self, numbers: list[int]) -> _Rows:
        """Rows of these prompts, each with its first token."""
        cache = _fresh_cache(self.model)
        assert cache is not None
        mask, logits = self._prefill_packed(numbers, cache) if self.packed else self._prefill_padded(numbers, cache)
        is_target = torch.zeros_like(mask, dtype=torch.bool)
        rows = _Rows(cache, mask, is_target, mask[:, -1], numbers, [[] for _ in numbers], [False] * len(numbers))
        self._choose(rows, logits)
        return rows

    def _prefill_padded(self, numbers: list[int], cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Fills the cache. Returns the mask, int64 ``[R, L]``, and logits ``[R, V]`` of what comes next."""
        inputs = self.padded(numbers)
        unpadded = self.model.config.mask_free and bool(inputs["attention_mask"].all())
        output = self.model(
            **inputs, past_key_values=cache, use_cache=True, prefix_length=inputs["input_ids"].shape[1], unpadded=unpadded,
            logits_to_keep=1,
        )  # fmt: skip
        return inputs["attention_mask"], output.logits[:, -1]

    def _prefill_packed(self, numbers: list[int], cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """As `_prefill_padded`."""
        config, prompts = self.model.config, [self.prompts[number] for number in numbers]
        device = prompts[0].ids.device
        ids = [self.ids[number] for number in numbers]
        for one, prompt in zip(ids, prompts, strict=True):
            wanted, given = int((one == config.image_token_id).sum()), sum(len(image) for image in prompt.images)
            if wanted != given:  # its neighbours would get what is left over
                name = prompt.sample.replace("\0", " ").strip()
                raise ValueError(f"sample {name}: expected {wanted} image tokens, one a placeholder, got {given}")
        batch = pack_prompts(ids, config.image_token_id, pad_id=self.pad, visibility=config.prefix_visibility)
        batch = map_tensors(batch, lambda tensor: tensor.to(device))
        images = [image for prompt in prompts for image in prompt.images]
        output = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
            plan=batch.plan, image_tokens=torch.cat(images).unsqueeze(0) if images else None, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        lengths = torch.tensor([len(one) for one in ids], device=device)
        length = max(len(one) for one in ids)
        segment, position = batch.plan.segment[0], batch.plan.position[0]
        places = segment * length + (length - lengths[segment]) + position
        for layer in _filled(cache):
            layer.keys, layer.values = (_spread(x, places, len(ids), length) for x in (layer.keys, layer.values))
        return (torch.arange(length, device=device) >= (length - lengths).unsqueeze(1)).long(), output.logits

    def _step(self, rows: _Rows) -> None:
        plan = None
        if self.has_windows:  # whose rule has to know where each row's prefix ends
            no_images = torch.zeros_like(rows.is_target)
            plan = PrefixPlan.from_prompt(rows.mask, no_images, rows.is_target, self.model.config.prefix_visibility)
        output = self.model(
            input_ids=rows.last.unsqueeze(1), attention_mask=rows.mask, past_key_values=rows.cache, plan=plan,
            use_cache=True,
        )  # fmt: skip
        self._choose(rows, output.logits[:, -1])

    def _choose(self, rows: _Rows, logits: Tensor) -> None:
        """Puts the next token, by logits ``[R, V]``, into each row's new last column."""
        # Rows that have ended go on until they are taken out; nobody reads what they draw.
        steps = [min(len(ids), self.max_new_tokens - 1) for ids in rows.ids]
        rows.last = self._chosen(logits, rows.numbers, steps)
        rows.mask = F.pad(rows.mask, (0, 1), value=1)
        rows.is_target = F.pad(rows.is_target, (0, 1), value=True)
        for row, token in enumerate(rows.last.tolist()):
            rows.ids[row].append(token)

    def _chosen(self, logits: Tensor, numbers: Sequence[int], steps: Sequence[int]) -> Tensor:
        """Tokens, int64 ``[R]``, by logits ``[R, V]``.

        Args:
            logits: of the next token.
            numbers: of the prompt in each row.
            steps: how many tokens its answer has.
        """
        logits = logits.float()
        if self.sampling is None:
            return logits.argmax(1)
        assert self.uniform is not None
        return draw(logits, self.uniform[list(numbers), list(steps)], self.sampling)

    def _ended(self, rows: _Rows) -> Iterator[tuple[int, list[int]]]:
        """Answers that the last token has completed."""
        for row, ids in enumerate(rows.ids):
            if rows.done[row]:
                continue
            ends = ids[-1] in self.ends
            if ends or len(ids) >= self.max_new_tokens:
                rows.done[row] = True
                yield rows.numbers[row], ids[:-1] if ends else list(ids)


class _Drawing(LogitsProcessor):
    """Leaves the library's greedy search nothing but the token that was drawn.

    Args:
        uniform: float ``[R, max_new_tokens]``.
        width: columns of the prompts.
        sampling: of the distribution.
    """

    def __init__(self, uniform: Tensor, width: int, sampling: SamplingArgs) -> None:
        self.uniform, self.width, self.sampling = uniform, width, sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores ``[R, V]`` -> 0 at the drawn token, -inf elsewhere."""
        tokens = draw(scores, self.uniform[:, input_ids.shape[1] - self.width], self.sampling)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)
