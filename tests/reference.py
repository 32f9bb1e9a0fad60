"""Slow, obvious references. Each fast path of the package has a test ``..._matches_...`` against one of these."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmprefix.masks import PADDING_SEGMENT
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.sequence import PREFIX_BRANCH, PromptLayout, Region, TokenSequence


def may_see(q: dict[str, int], k: dict[str, int], visibility: str) -> bool:
    """The rule in words, for one query and one key."""
    if q["segment"] == PADDING_SEGMENT or q["segment"] != k["segment"]:
        return False
    if k["branch"] != PREFIX_BRANCH:
        return q["branch"] == k["branch"] and k["position"] <= q["position"]
    if visibility == "causal":
        return k["position"] <= q["position"]
    if visibility == "nested" and q["region"] == Region.IMAGE:
        return k["region"] == Region.IMAGE
    return True


def mask_by_loops(tokens: list[dict[str, int]], visibility: str) -> Tensor:
    """bool ``[T, T]``."""
    return torch.tensor([[may_see(q, k, visibility) for k in tokens] for q in tokens])


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
    losses = []
    for target in targets:
        sequence = TokenSequence.build(layout, num_image_tokens, instruction, [target])
        ids = sequence.ids.unsqueeze(0)
        is_target = (sequence.branches != PREFIX_BRANCH).long().unsqueeze(0)
        logits = model(input_ids=ids, pixel_values=pixels.unsqueeze(0), token_type_ids=is_target).logits
        first = len(sequence) - len(target) - 1
        losses.append(F.cross_entropy(logits[0, first - 1 : -1], ids[0, first:], reduction="none"))
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
