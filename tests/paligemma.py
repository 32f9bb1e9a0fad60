"""A tiny random PaliGemma, saved as transformers saves it, with a tokenizer made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4, "patch_size": 14, "image_size": 56, "hidden_act": "gelu_pytorch_tanh",
    "vision_use_head": False,
}  # fmt: skip
CORPUS = [
    "caption en",
    "describe the picture",
    "what is this?",
    "a red flower in the sun",
    "a temple by a lake",
    "yes",
    "no",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Gemma's special tokens, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def save_paligemma(
    folder: Path, text_type: str = "gemma", dtype: torch.dtype = torch.float32, **vision: object
) -> None:
    """Writes a checkpoint whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    vision = {**VISION, **vision}
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    images = SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_seq_length=tokens)
    images.image_seq_length = tokens
    processor = PaliGemmaProcessor(images, make_tokenizer())
    text = {**TEXT, "model_type": text_type, "vocab_size": len(processor.tokenizer) + 7}
    if text_type == "gemma2":
        text |= {
            "sliding_window": 128,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 15.0,
        }
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, projection_dim=64,
        hidden_size=64, vocab_size=text["vocab_size"], pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                # Tied: larger ones would make every token predict itself.
                parameter.normal_(std=0.02)
            elif parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    model.generation_config.max_new_tokens = 20
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
