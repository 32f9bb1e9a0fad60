"""Slow, obvious references. Each fast path of the package has a test ``..._matches_...`` against one of these."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmprefix.masks import PADDING_SEGMENT
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.sequence import PREFIX_BRANCH, PromptLayout, Region, TokenSequence


def sequence_by_loops(image: int, prefix: list[int], targets: list[list[int]], end: list[int]) -> dict[str, list[int]]:
    """The columns of `TokenSequence.from_ids`, token by token."""
    columns: dict[str, list[int]] = {name: [] for name in TokenSequence.__dataclass_fields__}

    def add(token: int, region: Region, branch: int, position: int) -> None:
        values = {"ids": token, "regions": region, "branches": branch, "questions": 0, "positions": position}
        for name, value in values.items():
            columns[name].append(int(value))

    for position, token in enumerate(prefix):
        add(token, Region.IMAGE if token == image else Region.INSTRUCTION, PREFIX_BRANCH, position)
    for branch, target in enumerate(targets):
        for n, token in enumerate([*target, *end]):
            columns["label_positions"].append(len(columns["ids"]) - 1 if n else len(prefix) - 1)
            columns["labels"].append(token)
            columns["target_lengths"].append(len(target) + len(end))
            add(token, Region.TARGET, branch, len(prefix) + n)
    return columns


def may_see(q: dict[str, int], k: dict[str, int], visibility: str) -> bool:
    """The rule in words, for one query and one key."""
    if q["segment"] == PADDING_SEGMENT or q["segment"] != k["segment"]:
        return False
    if k["branch"] != PREFIX_BRANCH:
        return q["branch"] == k["branch"] and k["position"] <= q["position"]
    if visibility == "causal":
        return k["position"] <= q["position"]
    if visibility == "nested" and k["region"] != Region.IMAGE:
        return q["region"] != Region.IMAGE and q["question"] == k["question"]
    return True


def mask_by_loops(tokens: list[dict[str, int]], visibility: str) -> Tensor:
    """bool ``[T, T]``."""
    return torch.tensor([[may_see(q, k, visibility) for k in tokens] for q in tokens])


def attention_by_loops(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[tuple[int, int]], causal: bool,
    window: int = -1, prefix_in_window: bool = False,
) -> Tensor:  # fmt: skip
    """Attention ``[Q, H, D]`` of packed samples with ``(queries, keys)`` tokens each: a softmax for each query.

    The last query of a sample stands at its last key. In a causal call, keys behind a query are hidden, and those that
    its window has left, unless they stand before all queries (the prefix) and the window is not said to count there.
    """
    groups = query.shape[1] // key.shape[1]
    rows, first_q, first_k = [], 0, 0
    for num_q, num_k in lengths:
        for i in range(num_q):
            at = num_k - num_q + i
            seen = []
            for j in range(num_k):
                in_prefix = j < num_k - num_q
                in_window = window < 0 or at - j < window or (in_prefix and not prefix_in_window)
                if not causal or (j <= at and in_window):
                    seen.append(first_k + j)
            k, v = (x[seen].repeat_interleave(groups, dim=1) for x in (key, value))
            scores = torch.einsum("hd,khd->hk", query[first_q + i], k) * query.shape[-1] ** -0.5
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v))
        first_q, first_k = first_q + num_q, first_k + num_k
    return torch.stack(rows)


def separate_losses(
    model: MMPrefixForConditionalGeneration,
    layout: PromptLayout,
    pixels: Tensor,
    num_image_tokens: int,
    instruction: list[int],
    targets: list[list[int]],
) -> list[Tensor]:
    """Per-token losses of each target of one sample, each as a sequence of its own, alone in its batch, unpadded.

    Full logits, labels shifted by hand, nothing shared, no plan: the mask comes from ``token_type_ids``.
    """
    prefix = TokenSequence.build(layout, num_image_tokens, instruction).ids.tolist()
    return losses_of_ids(model, prefix, pixels.unsqueeze(0), [[*target, layout.eos] for target in targets])


def losses_of_ids(
    model: MMPrefixForConditionalGeneration, prefix: list[int], pixels: Tensor | None, targets: list[list[int]]
) -> list[Tensor]:
    """The same, of a prefix written out, with a placeholder for each token of the images ``[I, 3, H, W]`` in order."""
    losses = []
    for target in targets:
        ids = torch.tensor([[*prefix, *target]])
        is_target = (torch.arange(ids.shape[1]) >= len(prefix)).long().unsqueeze(0)
        logits = model(input_ids=ids, pixel_values=pixels, token_type_ids=is_target).logits
        losses.append(F.cross_entropy(logits[0, len(prefix) - 1 : -1], ids[0, len(prefix) :], reduction="none"))
    return losses


@torch.no_grad()
def greedy_by_recomputation(
    model: MMPrefixForConditionalGeneration, prompt: Tensor, pixels: Tensor, num_tokens: int
) -> list[int]:
    """Greedy tokens of one unpadded prompt ``[T]``, the whole sequence computed again for each, stopping after EOS."""
    ids, generated = prompt.unsqueeze(0), []
    while len(generated) < num_tokens:
        token_types = torch.zeros_like(ids)
        token_types[:, prompt.numel() :] = 1
        logits = model(input_ids=ids, pixel_values=pixels.unsqueeze(0), token_type_ids=token_types).logits
        generated.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, ids.new_tensor([[generated[-1]]])], dim=1)
        if generated[-1] == model.config.eos_token_id:
            break
    return generated
