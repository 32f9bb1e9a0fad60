"""PaliGemma and PaliGemma 2, in and out, bit for bit.

What the three parts are called on both sides:

    PaliGemma (transformers)                        mmprefix
    model.vision_tower      SigLIP                  vision.model       timm `vit_*_siglip_gap_*`, tanh GELU
    model.multi_modal_projector.linear              connector          linear
    model.language_model    Gemma or Gemma 2        decoder.model
    lm_head                 tied                    decoder.lm_head

timm keeps query, key and value in one matrix, in this order. Image features are not scaled: the square root of the
width is part of Gemma's own embedding layer. PaliGemma counts positions from 1 and we from 0, which rotary embeddings
cannot tell apart.

The prompt is PaliGemma's: image tokens, BOS, text, newline.

Where the two differ, on purpose: in windowed layers (Gemma 2: 4096 tokens) our targets see the whole prefix, while
transformers' see what lies in the window. It shows at 896 px only, whose 4096 image tokens fill it; a warning says so.
And before 5.23, transformers' PaliGemma 2 forgets the soft-cap on its logits.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from mmprefix.decoder import load_exactly
from mmprefix.errors import InputError
from mmprefix.modeling import MMPrefixConfig, MMPrefixForConditionalGeneration
from mmprefix.processing import IMAGE_TOKEN, MMPrefixImageProcessor, MMPrefixProcessor, text_vocab_size
from mmprefix.vision import VisionArgs, VisionEncoder, VisionSpec, resolve_vision

SEPARATOR = "\n"
_SO400M = (1152, 27, 16, 4304, 14)
"""Width, depth, heads, inner width and patch of the published checkpoints' encoder."""
_TEXT_ROOM = 64
"""Tokens of text that are expected beside the image."""
_TEXT_MODEL_TYPES = ("gemma", "gemma2")

# Module names of one block: transformers -> timm. Query, key and value are joined apart from these.
_BLOCK = {
    "layer_norm1": "norm1",
    "self_attn.out_proj": "attn.proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def siglip_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' `SiglipVisionModel`, without its pooling head -> those of timm's `VisionTransformer`."""
    embeddings = "vision_model.embeddings."
    renamed = {
        "patch_embed.proj.weight": state[f"{embeddings}patch_embedding.weight"],
        "patch_embed.proj.bias": state[f"{embeddings}patch_embedding.bias"],
        "pos_embed": state[f"{embeddings}position_embedding.weight"].unsqueeze(0),
        "norm.weight": state["vision_model.post_layernorm.weight"],
        "norm.bias": state["vision_model.post_layernorm.bias"],
    }
    for number in range(_depth(state, "vision_model.encoder.layers.")):
        theirs, ours = f"vision_model.encoder.layers.{number}.", f"blocks.{number}."
        for kind in ("weight", "bias"):
            for old, new in _BLOCK.items():
                renamed[f"{ours}{new}.{kind}"] = state[f"{theirs}{old}.{kind}"]
            renamed[f"{ours}attn.qkv.{kind}"] = torch.cat([
                state[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"
            ])  # fmt: skip
    return renamed


def timm_to_siglip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `siglip_to_timm`."""
    embeddings = "vision_model.embeddings."
    renamed = {
        f"{embeddings}patch_embedding.weight": state["patch_embed.proj.weight"],
        f"{embeddings}patch_embedding.bias": state["patch_embed.proj.bias"],
        f"{embeddings}position_embedding.weight": state["pos_embed"].squeeze(0),
        "vision_model.post_layernorm.weight": state["norm.weight"],
        "vision_model.post_layernorm.bias": state["norm.bias"],
    }
    for number in range(_depth(state, "blocks.")):
        theirs, ours = f"vision_model.encoder.layers.{number}.", f"blocks.{number}."
        for kind in ("weight", "bias"):
            for old, new in _BLOCK.items():
                renamed[f"{theirs}{old}.{kind}"] = state[f"{ours}{new}.{kind}"]
            for part, values in zip("qkv", state[f"{ours}attn.qkv.{kind}"].chunk(3), strict=True):
                # Of its own: slices of one matrix could not be saved side by side.
                renamed[f"{theirs}self_attn.{part}_proj.{kind}"] = values.clone()
    return renamed


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


def import_paligemma(
    source: str, image_size: int | None = None
) -> tuple[MMPrefixForConditionalGeneration, MMPrefixProcessor]:
    """A PaliGemma checkpoint as our model and processor, in the checkpoint's dtype.

    Args:
        source: hub name or local folder.
        image_size: side of the input in pixels, by default the checkpoint's; position embeddings are interpolated
            for another one.

    Raises:
        InputError: no PaliGemma, tensors that are missing or left over, an image size that the patches don't divide,
            or a tokenizer that does not fit the vocabulary.
    """
    where = f"--from {source}"
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot read its config: {' '.join(str(error).split())[:300]}") from error
    if config.model_type != "paligemma":
        raise InputError(f"{where}: expected a PaliGemma checkpoint, got model type {config.model_type!r}")
    # What cannot be converted is refused before gigabytes are read.
    _text_config(config)
    _vision_spec(config.vision_config, where)
    theirs = load_exactly(PaliGemmaForConditionalGeneration, source, where, dtype="auto", attn_implementation="eager")
    try:
        their_processor = PaliGemmaProcessor.from_pretrained(source)
    except Exception as error:  # files that are missing or broken, each reader with errors of its own
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{where}: expected a PaliGemma processor, cannot read it: {message}") from error
    model = convert_paligemma(theirs, image_size, where)
    return model, _our_processor(their_processor, config, model.config.vision_spec, where)


def convert_paligemma(
    theirs: PaliGemmaForConditionalGeneration, image_size: int | None = None, where: str = "PaliGemma"
) -> MMPrefixForConditionalGeneration:
    """A PaliGemma in memory as our model, in its dtype and on its device.

    Decoder and connector are taken over as they are, not copied: ``theirs`` is of no use afterwards.

    Args:
        theirs: the model to take apart.
        image_size: as in `import_paligemma`.
        where: begins the message of an error.

    Raises:
        InputError: as `import_paligemma`, where it concerns the model.
    """
    config = theirs.config
    text_config, implementation = _text_config(config)
    spec, vision_kwargs = _vision_spec(config.vision_config, where)
    decoder = _decoder_around(theirs, text_config, implementation)
    vision = siglip_to_timm(_siglip(theirs))
    if image_size is not None and (image_size, image_size) != spec.image_size:
        spec = _resized(spec, vision_kwargs, image_size, where)
        vision["pos_embed"] = timm.layers.resample_abs_pos_embed(
            vision["pos_embed"].float(), list(spec.grid or ()), num_prefix_tokens=0
        ).to(vision["pos_embed"].dtype)
    _warn_of_window(text_config, spec.num_tokens)
    with theirs.device:
        encoder = VisionEncoder(spec).to(theirs.dtype)
    encoder.model.load_state_dict(vision)
    model = MMPrefixForConditionalGeneration.assemble(
        MMPrefixConfig(
            vision_config=spec.to_dict(),
            text_config=copy.deepcopy(text_config),
            connector={"kind": "linear"},
            image_token_id=config.image_token_id,
            decoder_attention=implementation,
            dtype=str(theirs.dtype).removeprefix("torch."),
            **_special_tokens(config),
        ),
        encoder,
        theirs.model.multi_modal_projector.linear,
        decoder,
    )
    if theirs.generation_config is not None:
        model.generation_config = copy.deepcopy(theirs.generation_config)
    return model


def _special_tokens(config: PreTrainedConfig) -> dict[str, Any]:
    """Those that the outer config names; the others are the decoder's."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}


def _siglip(model: PaliGemmaForConditionalGeneration) -> dict[str, Tensor]:
    """Weights of the vision tower under ``vision_model.``, which later transformers leave out of the names."""
    state = model.model.vision_tower.state_dict()
    return {k if k.startswith("vision_model.") else f"vision_model.{k}": v for k, v in state.items()}


def _text_config(config: PaliGemmaConfig) -> tuple[PreTrainedConfig, str]:
    """The decoder's config as that of a causal LM, and its attention implementation."""
    if config.text_config.model_type not in _TEXT_MODEL_TYPES:
        raise InputError(
            f"expected a text model among {', '.join(_TEXT_MODEL_TYPES)}, got {config.text_config.model_type!r}"
        )
    text_config = copy.deepcopy(config.text_config)
    # PaliGemma sets it on its decoder, where it would let every token see every other.
    text_config.use_bidirectional_attention = None
    text_config.tie_word_embeddings = config.tie_word_embeddings
    soft_capped = getattr(text_config, "attn_logit_softcapping", None) is not None
    return text_config, "eager" if soft_capped else "sdpa"


def _warn_of_window(text_config: PreTrainedConfig, num_image_tokens: int) -> None:
    window = getattr(text_config, "sliding_window", None)
    if window is not None and num_image_tokens + _TEXT_ROOM > window:
        warnings.warn(
            f"{num_image_tokens} image tokens and text don't fit the decoder's window of {window}: transformers hides "
            "the first image tokens from targets in windowed layers, mmprefix doesn't",
            stacklevel=3,
        )


def _decoder_around(
    theirs: PaliGemmaForConditionalGeneration, text_config: PreTrainedConfig, implementation: str
) -> PreTrainedModel:
    """The causal LM of transformers that has PaliGemma's modules as its own."""
    text_config._attn_implementation = implementation
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(text_config, attn_implementation=implementation)
    body = theirs.model.language_model
    for module in body.modules():  # the modules keep the config they were built with
        if getattr(module, "config", None) is body.config and module is not body:
            module.config = decoder.config
    body.config = decoder.config
    decoder.model, decoder.lm_head = body, theirs.lm_head
    return decoder


def _vision_spec(vision: SiglipVisionConfig, where: str) -> tuple[VisionSpec, dict[str, Any]]:
    sizes = (
        vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size,
        vision.patch_size,
    )  # fmt: skip
    activations = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    if vision.hidden_act not in activations or vision.layer_norm_eps != 1e-6:
        raise InputError(
            f"{where}: expected a SigLIP with {' or '.join(activations)} and layer_norm_eps 1e-6, "
            f"got {vision.hidden_act} and {vision.layer_norm_eps}"
        )
    name = f"vit_so400m_patch14_siglip_gap_{vision.image_size}"
    kwargs: dict[str, Any] = {"act_layer": activations[vision.hidden_act]}
    if sizes != _SO400M or not timm.is_model(name):
        name = "vit_base_patch16_siglip_gap_224"
        kwargs |= {
            "embed_dim": sizes[0], "depth": sizes[1], "num_heads": sizes[2], "patch_size": sizes[4],
            # timm rounds width x ratio down; half a unit more keeps it on the right side.
            "mlp_ratio": (sizes[3] + 0.5) / sizes[0], "img_size": vision.image_size,
        }  # fmt: skip
    return resolve_vision(VisionArgs(name, kwargs=kwargs)), kwargs


def _resized(spec: VisionSpec, kwargs: dict[str, Any], image_size: int, where: str) -> VisionSpec:
    try:
        resized = resolve_vision(
            VisionArgs(spec.name, image_size=image_size, kwargs={**kwargs, "img_size": image_size})
        )
    except InputError as error:
        raise InputError(f"{where}: --image_size {image_size}: {error}") from error
    return resized


def _our_processor(
    theirs: PaliGemmaProcessor, config: PaliGemmaConfig, spec: VisionSpec, where: str
) -> MMPrefixProcessor:
    tokenizer = copy.deepcopy(theirs.tokenizer)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_id != config.image_token_id:
        raise InputError(
            f"{where}: expected {IMAGE_TOKEN} to be token {config.image_token_id}, the tokenizer has it at {image_id}"
        )
    vocabulary = config.text_config.vocab_size
    if text_vocab_size(tokenizer) > vocabulary:
        raise InputError(
            f"{where}: expected a tokenizer of at most {vocabulary} tokens, the decoder's vocabulary, "
            f"got {text_vocab_size(tokenizer)}"
        )
    images = theirs.image_processor
    resample = Image.Resampling(images.resample).name.lower()
    return MMPrefixProcessor(
        MMPrefixImageProcessor(spec.image_size, images.image_mean, images.image_std, resample),
        tokenizer,
        num_image_tokens=spec.num_tokens,
        separator=SEPARATOR,
        chat_template=theirs.chat_template,
    )


def export_paligemma(
    model: MMPrefixForConditionalGeneration, processor: MMPrefixProcessor
) -> tuple[PaliGemmaForConditionalGeneration, PaliGemmaProcessor]:
    """Our model and processor as transformers' PaliGemma, sharing the weights that need no rearranging.

    Raises:
        InputError: parts that PaliGemma does not have; `transformers` is the format for those.
    """
    refuse = "--format paligemma: expected {}, got {}; --format transformers takes any model"
    config = model.config
    text_config = copy.deepcopy(model.decoder.config)
    if text_config.model_type not in _TEXT_MODEL_TYPES:
        raise InputError(refuse.format("a Gemma or Gemma 2 decoder", text_config.model_type))
    if config.connector["kind"] != "linear":
        raise InputError(refuse.format("a linear connector", config.connector["kind"]))
    if config.prefix_visibility != "full":
        raise InputError(refuse.format("prefix_visibility full", config.prefix_visibility))
    if processor.prompt != "plain":
        raise InputError(refuse.format("the plain prompt", processor.prompt))
    if processor.separator != SEPARATOR:
        raise InputError(refuse.format("a newline as separator", repr(processor.separator)))
    if processor.transform.resize_mode != "squash":
        raise InputError(refuse.format("images that are squashed", processor.transform.resize_mode))
    encoder = model.vision.model
    vision_config = _siglip_config(encoder, config.vision_spec, refuse)
    _warn_of_window(text_config, config.vision_spec.num_tokens)
    text_config.use_bidirectional_attention = None
    theirs_config = PaliGemmaConfig(
        vision_config=vision_config.to_dict() | {"model_type": "siglip_vision_model"},
        text_config=text_config.to_dict(),
        image_token_index=config.image_token_id,
        projection_dim=text_config.hidden_size,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        tie_word_embeddings=text_config.tie_word_embeddings,
        **_special_tokens(config),
    )
    with torch.device("meta"):
        theirs = PaliGemmaForConditionalGeneration(theirs_config)
    unused = set(config.vision_spec.unused)
    siglip = timm_to_siglip({k: v for k, v in encoder.state_dict().items() if k not in unused})
    names_in_tower = theirs.model.vision_tower.state_dict()
    if not any(name.startswith("vision_model.") for name in names_in_tower):
        siglip = {k.removeprefix("vision_model."): v for k, v in siglip.items()}
    state = {f"model.vision_tower.{k}": v for k, v in siglip.items()}
    state |= {f"model.multi_modal_projector.linear.{k}": v for k, v in model.connector.state_dict().items()}
    state |= {f"model.language_model.{k}": v for k, v in model.decoder.model.state_dict().items()}
    state["lm_head.weight"] = model.decoder.lm_head.weight
    theirs.load_state_dict({k: v.detach() for k, v in state.items()}, assign=True)
    theirs.tie_weights()
    theirs.config.dtype = model.dtype
    theirs.generation_config = copy.deepcopy(model.generation_config)
    return theirs, _their_processor(processor, config.vision_spec)


def _siglip_config(encoder: Any, spec: VisionSpec, refuse: str) -> SiglipVisionConfig:
    """The SigLIP config of a timm ViT, if it is one: a plain pre-norm ViT whose every tensor has its place."""
    names = set(encoder.state_dict()) - set(spec.unused)
    blocks: Any = getattr(encoder, "blocks", ())
    expected: set[str] = set()
    if len(blocks):
        expected = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "norm.weight", "norm.bias"} | {
            f"blocks.{number}.{module}.{kind}"
            for number in range(len(blocks))
            for module in (*_BLOCK.values(), "attn.qkv")
            for kind in ("weight", "bias")
        }
    if names != expected or getattr(encoder, "num_prefix_tokens", 1) != 0:
        differing = sorted(names ^ expected)[:3]
        raise InputError(
            refuse.format("a SigLIP encoder (vit_*_siglip_gap_*)", f"{spec.name} ({', '.join(differing)})")
        )
    block = blocks[0]
    activation = {"GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}.get(type(block.mlp.act).__name__)
    if activation is None:
        raise InputError(refuse.format("GELU in the encoder", type(block.mlp.act).__name__))
    if block.norm1.eps != 1e-6 or encoder.norm.eps != 1e-6:
        raise InputError(refuse.format("layer norms with eps 1e-6", block.norm1.eps))
    height, width = spec.image_size
    if height != width:
        raise InputError(refuse.format("square images", f"{height}x{width}"))
    return SiglipVisionConfig(
        hidden_size=spec.width,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=height,
        patch_size=encoder.patch_embed.proj.kernel_size[0],
        hidden_act=activation,
        layer_norm_eps=1e-6,
        vision_use_head=False,
    )


def _their_processor(processor: MMPrefixProcessor, spec: VisionSpec) -> PaliGemmaProcessor:
    ours = processor.image_processor
    images = SiglipImageProcessor(
        size={"height": ours.size[0], "width": ours.size[1]},
        resample=Image.Resampling[ours.interpolation.upper()],
        image_mean=list(ours.image_mean),
        image_std=list(ours.image_std),
        image_seq_length=processor.num_image_tokens,
    )
    images.image_seq_length = processor.num_image_tokens
    return PaliGemmaProcessor(images, copy.deepcopy(processor.tokenizer), chat_template=processor.chat_template)
