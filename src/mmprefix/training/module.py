"""`MMPrefixModule`: trains and evaluates a multimodal prefix LM with Lightning.

The loss is normalised once per optimizer step, by the number of target tokens (or targets) over all accumulated
micro-batches and all ranks: `training_step` returns a sum, and gradients are divided before they are clipped. So the
gradient does not depend on how samples are grouped.

Randomness inside a step (dropout, stochastic depth) is seeded by (seed, epoch, batch, rank): a run that was killed and
resumed draws what it would have drawn, and no generator state has to be saved.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmprefix import adapters
from mmprefix.accounting import PARTS
from mmprefix.attention import MASK_FREE_IMPLEMENTATION
from mmprefix.data.datamodule import ShardDataModule
from mmprefix.data.features import FeatureKey
from mmprefix.decoder import DecoderArgs, windows_of
from mmprefix.decoding import Prompt, SamplingArgs, answers
from mmprefix.errors import InputError
from mmprefix.evaluation import runner
from mmprefix.evaluation.progress import Part, Progress, checkpoint_identity
from mmprefix.evaluation.runner import DEFAULT_TASK, Evaluation, Prediction
from mmprefix.evaluation.scores import Scored
from mmprefix.loss import LossNormalization, label_weights
from mmprefix.masks import PrefixVisibility
from mmprefix.metrics.ptb import Tokenizer
from mmprefix.metrics.rules import ScoringRules
from mmprefix.modeling import MMPrefixForConditionalGeneration
from mmprefix.packing import EvaluationBatch, PackedBatch, Reference, bound_of, collate, map_tensors
from mmprefix.probe import mask_free_refusal, probe
from mmprefix.processing import (
    IMAGE_TOKEN,
    MMPrefixImageProcessor,
    MMPrefixProcessor,
    TokenizerArgs,
    load_tokenizer,
    text_vocab_size,
)
from mmprefix.prompts import prompt_end
from mmprefix.sequence import TokenSequence
from mmprefix.stored_weights import parameters_on_meta, take_buffers
from mmprefix.training.agreement import together
from mmprefix.training.checkpoints import CONTENT_KEY, check_fits, load_model
from mmprefix.training.fsdp import FullyShardedStrategy
from mmprefix.training.layers import Recomputing, checkpoint_activations, compile_layers
from mmprefix.training.optim import Guard, GuardArgs, OptimizerArgs, PartArgs, build_optimizer
from mmprefix.varlen import MAX_HEAD_SIZE
from mmprefix.vision import ConnectorArgs, VisionArgs

_BUCKET = 64
"""What lengths are rounded up to for a compiled model: shapes repeat, and half a bucket is little."""


class NonFiniteLossError(InputError):
    """The loss of an optimizer step is NaN or infinite; the weights were not touched by it."""


@dataclass
class _Window:
    """What the micro-batches of one optimizer step add up to."""

    losses: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    ids: list[tuple[str, ...]] = field(default_factory=list)
    with_images: int = 0
    """How many of them have an image."""
    of_sets: list[Tensor] = field(default_factory=list)
    """Float ``[sets, 2]`` each: loss and count of each set of a mixture."""


def switch_off_training_mode(part: nn.Module) -> None:
    """What a frozen part needs: batch statistics and dropout stay off."""
    part.eval()
    for module in part.modules():
        # Layers of transformers recompute activations in training mode only; what is inside stays as it is.
        module.training = getattr(module, "gradient_checkpointing", False) is True


def _from_parts(
    vision: VisionArgs,
    decoder: DecoderArgs,
    connector: ConnectorArgs,
    tokenizer: TokenizerArgs,
    prefix_visibility: PrefixVisibility,
) -> tuple[MMPrefixForConditionalGeneration, MMPrefixProcessor]:
    text_tokenizer = load_tokenizer(tokenizer, decoder.name)
    model = MMPrefixForConditionalGeneration.from_parts(
        vision,
        connector,
        decoder,
        image_token_id=text_tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        prefix_visibility=prefix_visibility,
        special_tokens={
            name: getattr(text_tokenizer, name)
            for name in ("bos_token_id", "pad_token_id")
            if getattr(text_tokenizer, name) is not None
        }
        | {"eos_token_id": prompt_end(text_tokenizer, tokenizer.prompt)},
        vocab_size=text_vocab_size(text_tokenizer),
        decoder_dtype=None,
    )
    processor = MMPrefixProcessor(
        MMPrefixImageProcessor.from_spec(model.config.vision_spec),
        text_tokenizer,
        num_image_tokens=model.num_image_tokens,
        separator=tokenizer.separator,
        prompt=tokenizer.prompt,
        prefix_visibility=prefix_visibility,
        shared_prefix=model.config.shared_prefix,
    )
    return model, processor


def prompts_of(batch: EvaluationBatch, image_tokens: Tensor | None) -> list[Prompt]:
    """The prompts of a batch, without their padding.

    Args:
        batch: with its samples' references, whose ids sampled answers are drawn by.
        image_tokens: float ``[I, N, W]``, of the images of the batch.
    """
    mask, lengths = batch.prompts.attention_mask, batch.prompts.attention_mask.sum(1).tolist()
    prompts = []
    for row, (reference, images) in enumerate(zip(batch.references, batch.prompts.image_of.tolist(), strict=True)):
        ids = batch.prompts.input_ids[row, mask.shape[1] - lengths[row] :]
        own = () if image_tokens is None else tuple(image_tokens[image] for image in images if image >= 0)
        # Of several references, the shortest; how many tokens it has is not known here, how many letters is enough.
        expected = min((len(text) for text in reference.references), default=0)
        prompts.append(Prompt(ids, own, f"{reference.dataset}\0{reference.id}", expected))
    return prompts


def _wrap_again(strategy: DDPStrategy) -> None:
    """Lets DDP, which decides when it wraps a model which gradients it will reduce, decide anew; all ranks call it."""
    wrapper = strategy.model
    assert isinstance(wrapper, DistributedDataParallel)
    wrapper.reducer._remove_autograd_hooks()  # else they would go on reducing until the wrapper is collected
    strategy.model = wrapper.module
    strategy.configure_ddp()


def _zero_through(*parts: nn.Module) -> Tensor:
    """0, float scalar, that gives every learning parameter of the parts a gradient of zeros."""
    zeros = [p.sum() * 0.0 for part in parts for p in part.parameters() if p.requires_grad]
    return torch.stack(zeros).sum() if zeros else torch.zeros(())


class MMPrefixModule(pl.LightningModule):
    """A vision encoder, a connector and a decoder, fine-tuned as a prefix LM."""

    def __init__(
        self,
        vision: VisionArgs = VisionArgs(),  # noqa: B008  (never mutated; jsonargparse shows it as default)
        decoder: DecoderArgs = DecoderArgs(),  # noqa: B008
        connector: ConnectorArgs = ConnectorArgs(),  # noqa: B008
        tokenizer: TokenizerArgs = TokenizerArgs(),  # noqa: B008
        pretrained: str | None = None,
        prefix_visibility: PrefixVisibility | None = None,
        loss_normalization: LossNormalization = "tokens",
        optimizer: OptimizerArgs = OptimizerArgs(),  # noqa: B008
        guard: GuardArgs = GuardArgs(),  # noqa: B008
        train_vision: PartArgs = PartArgs(),  # noqa: B008
        train_connector: PartArgs = PartArgs(),  # noqa: B008
        train_decoder: PartArgs = PartArgs(),  # noqa: B008
        gradient_checkpointing: Recomputing = False,
        compile: bool = False,
        attention: Literal["auto", "dense"] = "auto",
        num_beams: int = 1,
        sampling: SamplingArgs | None = None,
        peak_tflops: float | Literal["measure"] | None = None,
        seed: int = 0,
    ) -> None:
        """Builds model and processor from their parts.

        Args:
            vision: the timm encoder.
            decoder: the transformers decoder.
            connector: from encoder to decoder width.
            tokenizer: by default the decoder's own.
            pretrained: a whole model to start from, in place of the four above: the folder of `import-paligemma` or
                `export`, an earlier run's folder, or its checkpoint.
            prefix_visibility: `full`, the default: image and instruction see each other. `nested`: image tokens see only image
                tokens. `causal`: the ordinary decoder, for comparison. With `pretrained`, the
                default is the model's own.
            loss_normalization: `tokens`: mean over all target tokens of an optimizer step. `per_sample`: mean over
                each target's tokens, then over targets, as PaliGemma trains.
            optimizer: AdamW and its schedule.
            guard: what becomes of a step whose loss or gradient is not finite, or far above those before it.
            train_vision: learning rate and freezing of the encoder.
            train_connector: learning rate and freezing of the connector.
            train_decoder: learning rate and freezing of the decoder.
            gradient_checkpointing: recompute activations in the backward pass, to save memory: `true`, of every layer;
                `selective`, of every second; a number n, of every n-th. `elementwise`: of every layer, but for its matrix
                products and attention.
            compile: compile each layer with `torch.compile`, for training.
            attention: `auto`: without a mask, over samples packed into one row, where decoder, device and precision
                allow it, which is said in one line at the start. `dense`: a row for each sample and a mask.
            num_beams: beams when generating for evaluation; 1 is greedy.
            sampling: answers are drawn in place of the likeliest being taken, each from the seed and its sample's id.
            peak_tflops: TFLOP/s that a device can do at most, from its data sheet, to log utilization (train/mfu);
                `measure` times matrix products at start instead. Without it no utilization is logged.
            seed: of dropout and of sampled answers; the command line passes `seed_everything`.
        """
        super().__init__()
        optimizer.check()
        guard.check()
        if num_beams < 1:
            raise InputError(f"model.num_beams: expected at least 1, got {num_beams}")
        if sampling is not None:
            sampling.check(num_beams)
        if isinstance(peak_tflops, float | int) and not 0 < peak_tflops < math.inf:
            raise InputError(f"model.peak_tflops: expected more than 0, or `measure`, got {peak_tflops}")
        if decoder.load_in_4bit and train_decoder.lora is None:
            raise InputError(
                "model.decoder.load_in_4bit: expected model.train_decoder.lora beside it: 4 bits don't learn"
            )
        if pretrained is not None:
            given = {"vision": vision, "decoder": decoder, "connector": connector, "tokenizer": tokenizer}
            for name, args in given.items():
                if args != type(args)():
                    raise InputError(f"model.pretrained: expected no model.{name} beside it, got {args}")
            self.model, self.processor = load_model(Path(pretrained))
            self.model.train()
            if prefix_visibility is not None:
                self.model.config.prefix_visibility = self.processor.prefix_visibility = prefix_visibility
        else:
            self.model, self.processor = _from_parts(vision, decoder, connector, tokenizer, prefix_visibility or "full")
        for config in (self.model.config, self.model.config.text_config, self.model.decoder.config):
            config.dtype = torch.float32  # what is saved says what it is
        if pretrained is not None and self.model.decoder.dtype != torch.float32:
            with parameters_on_meta():
                take_buffers(self.model, MMPrefixForConditionalGeneration(copy.deepcopy(self.model.config)))
        # The decoder's turn comes in `configure_model`: until then it costs no memory.
        self.model.vision.float()
        self.model.connector.float()
        self.loss_normalization: LossNormalization = loss_normalization
        self.optimizer_args = optimizer
        self.guard_args, self._guard = guard, Guard()
        self.part_args = dict(zip(PARTS, (train_vision, train_connector, train_decoder), strict=True))
        for name, part in self.part_args.items():
            if part.unfreeze_at_step is not None and part.unfreeze_at_step < 0:
                raise InputError(
                    f"model.train_{name}.unfreeze_at_step: expected at least 0, got {part.unfreeze_at_step}"
                )
        self._add_adapters(decoder)
        self.num_beams, self.sampling = num_beams, sampling
        self.settings = ""
        """The run's configuration in YAML, for its checkpoints, where the command line knows it."""
        self.peak_tflops = peak_tflops
        self.seed = seed
        self.attention = attention
        self._attention_line = ""
        self._packed = False
        self._exact_buffers: dict[str, Tensor] = {}
        self._gathered = ExitStack()
        self._feature_key: FeatureKey | None = None
        self._compiled = compile
        self._layers_are_compiled = False
        self._in_4bit = decoder.load_in_4bit
        self._window = self._last_window = _Window()
        self._predictions: list[Prediction] = []
        self._waiting: list[tuple[list[Prompt], tuple[Reference, ...]]] = []
        """Of each batch whose prompts wait to be answered."""
        self._answered: list[Prediction] = []
        """What the last step has answered: nothing, or a whole window of batches."""
        self._skipped = 0
        """Records of this process that the evaluation has no answers of: their images can't be decoded."""
        self.evaluation = Evaluation()
        """Of the last split that was evaluated, for reports."""
        self._progress: Progress | None = None
        self._found: list[Part] = []
        """What an evaluation before this one was killed had done, on the first process."""
        self._losses_kept = 0
        """Of `_evaluation_loss`, how many are on disk."""
        self._evaluation_loss: list[Tensor] = []
        """Float ``[1 + sets, 2]`` of each batch: loss and count of all and of each set."""
        # What later unfreezing may switch on again; the rest (unused heads) never learns.
        self._learnable = {
            name: {n for n, p in self.part(name).named_parameters() if p.requires_grad} for name in PARTS
        }
        self._trainable = {name: self._of_part(name) for name in PARTS}
        self._adapters = {name: adapters.learning_modules(self.model, name) for name in adapters.configs_of(self.model)}
        self._set_freezing(step=0)
        checkpoint_activations(self.model, gradient_checkpointing)

    def part(self, name: str) -> nn.Module:
        """`vision`, `connector` or `decoder`."""
        part: nn.Module = getattr(self.model, name)
        return part

    def _add_adapters(self, decoder: DecoderArgs) -> None:
        for name, args in self.part_args.items():
            if args.lora is None:
                continue
            if name == "connector":
                raise InputError(
                    "model.train_connector.lora: expected null: the connector is small and learns as a whole"
                )
            if args.freeze:
                raise InputError(f"model.train_{name}: expected lora or freeze: true, got both")
            base_name = decoder.name if name == "decoder" and decoder.pretrained else None
            adapters.add_lora(self.model, name, args.lora, base_name)

    @property
    def lora(self) -> dict[str, adapters.LoraArgs]:
        """Of the parts with adapters."""
        return {name: args.lora for name, args in self.part_args.items() if args.lora is not None}

    def _of_part(self, name: str) -> list[nn.Parameter]:
        """What may learn of a part."""
        return [p for n, p in self.part(name).named_parameters() if n in self._learnable[name]]

    # Attention

    def setup(self, stage: str) -> None:
        """Chooses how to attend, says so, and tells the data module how to lay out its batches."""
        reason = self._dense_reason()
        packed = self._packed = reason is None
        if packed:
            device = self.trainer.strategy.root_device.type
            kernel = "flash attention over runs of equal length" if device == "cpu" else "varlen flash attention"
            line = f"attention: mask-free ({kernel}), samples packed into one row"
        else:
            line = f"attention: dense mask, a row for each sample: {reason}"
        if line != self._attention_line:  # `fit` ends with a test
            rank_zero_info(line)
        self._attention_line = line
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "packed"):
            data.packed = packed
            data.bucket = _BUCKET if self._compiled else 1
        self._progress, self._found = None, []  # where there is one, `on_load_checkpoint` says
        if isinstance(data, ShardDataModule):
            data.finished = frozenset()
        # Before the strategy casts the module for a `-true` precision.
        self._exact_buffers = {
            name: buffer.detach().clone()
            for name, buffer in self.model.named_buffers()
            if name.endswith("inv_freq") and buffer.dtype == torch.float32
        }

    def configure_model(self) -> None:
        """Gives the model weights in float32, compiles it, and shards it, where the strategy does.

        Weights in half precision would lose small updates; computing in it is the trainer's choice.
        """
        if self._sharding is None and not self._in_4bit:
            self.model.float()
        if self._compiled and not self._layers_are_compiled:
            compile_layers(self.model)
            self._layers_are_compiled = True
        if self._sharding is not None:
            if self._in_4bit:
                raise InputError(
                    "model.decoder.load_in_4bit: expected another strategy than FSDP2, which can't shard 4 bits"
                )
            # Parameters become others; the old ones, which nobody may keep, have memory until then.
            self._trainable = {}
            self._sharding.shard(self.model)
            self._trainable = {name: self._of_part(name) for name in PARTS}

    @property
    def _sharding(self) -> FullyShardedStrategy | None:
        strategy = self.trainer.strategy
        return strategy if isinstance(strategy, FullyShardedStrategy) else None

    def on_fit_start(self) -> None:
        """See `_restore_buffers`."""
        self._restore_buffers()

    def on_validation_start(self) -> None:
        """See `_restore_buffers` and `_gather`."""
        self._restore_buffers()
        self._gather()

    def on_validation_end(self) -> None:
        """See `_gather` and `_end_progress`."""
        self._gathered.close()
        self._end_progress()

    def on_test_start(self) -> None:
        """See `_restore_buffers` and `_gather`."""
        self._restore_buffers()
        self._gather()

    def on_test_end(self) -> None:
        """See `_gather` and `_end_progress`."""
        self._gathered.close()
        self._end_progress()

    def on_predict_start(self) -> None:
        """See `_restore_buffers` and `_gather`."""
        self._restore_buffers()
        self._gather()

    def on_predict_end(self) -> None:
        """See `_gather` and `_end_progress`."""
        self._gathered.close()
        self._end_progress()

    def _gather(self) -> None:
        """Evaluation has the whole model on each process: batches and texts differ in number and length among them."""
        if self._sharding is not None:
            self._gathered.enter_context(self._sharding.gathered(self.model))

    def _restore_buffers(self) -> None:
        """Frequencies of rotary embeddings stay in float32, as transformers keeps them in half-precision models.

        Rounded to bfloat16 by a cast of the whole module, they would turn late positions into others.
        """
        for name, exact in self._exact_buffers.items():
            owner, _, own_name = name.rpartition(".")
            module = self.model.get_submodule(owner)
            buffer = module.get_buffer(own_name)
            if buffer.dtype != exact.dtype:
                setattr(module, own_name, exact.to(buffer.device))

    def _dense_reason(self) -> str | None:
        """Why attention needs a mask in this run, in words; None if it doesn't."""
        if self.attention == "dense":
            return "as model.attention says"
        config = self.model.decoder.config
        implementation = config._attn_implementation
        if implementation != MASK_FREE_IMPLEMENTATION:
            return f"{implementation} attention is the architecture's own"
        if not self.model.config.mask_free:
            return (
                probe(config, implementation, self.model.decoder).dense_reason or "the model was saved before it could"
            )
        dropout = [
            name for name, value in config.to_dict().items()
            if "att" in name and "drop" in name and isinstance(value, float) and value > 0
        ]  # fmt: skip
        learns_itself = not self.part_args["decoder"].freeze and "decoder" not in self._adapters
        if dropout and learns_itself:
            return f"the decoder's {dropout[0]}"
        device = self.trainer.strategy.root_device
        if device.type == "cpu":
            return None
        windows = windows_of(config).values()
        longest = getattr(getattr(self.trainer, "datamodule", None), "longest_target", None)
        hides = windows and self.model.config.prefix_visibility != "causal"
        bound = None if longest is None else bound_of(longest)
        if hides and (bound is None or min(windows) < bound):
            return f"its window of {min(windows)} is shorter than targets may be ({bound or 'without limit'})"
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if size > MAX_HEAD_SIZE or size % 8:
            return f"the CUDA kernel takes no heads of {size}"
        dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(self.trainer.precision).split("-")[0])
        return mask_free_refusal(config, implementation, device, dtype or torch.float32)

    # Cached features

    def feature_key(self) -> FeatureKey:
        """What the features of the encoder, as its weights are now, are known by."""
        return FeatureKey.of(self.model.vision, self.model.config.vision_spec, self.processor.transform)

    def check_frozen_encoder(self) -> None:
        """Before training on cached features.

        Raises:
            InputError: an encoder that learns; no gradient reaches it through a cache.
        """
        args = self.part_args["vision"]
        if not args.freeze or args.unfreeze_at_step is not None:
            raise InputError(
                "data.feature_cache: expected model.train_vision.freeze: true and unfreeze_at_step: null, got freeze: "
                f"{str(args.freeze).lower()} and unfreeze_at_step: {json.dumps(args.unfreeze_at_step)}: "
                "an encoder that learns needs pixels"
            )

    def frozen_feature_key(self) -> FeatureKey:
        """`feature_key`, for training on cached features.

        Raises:
            InputError: see `check_frozen_encoder`.
        """
        self.check_frozen_encoder()
        if self._feature_key is None:  # once: a sharded encoder is whole nowhere
            self._feature_key = self.feature_key()
        return self._feature_key

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says to the data where it goes on.

        Cached features were compared with the encoder as it was built: a checkpoint must not bring another.

        Raises:
            InputError: naming the first weight that differs, other adapters, or a checkpoint whose epoch can't be gone on
                with.
        """
        adapters.check_stored(self.model, checkpoint[CONTENT_KEY].get("adapters", {}))
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.trainer.training:
            self._guard = Guard(**checkpoint[CONTENT_KEY].get("guard", {}))
            if hasattr(datamodule, "resume"):
                datamodule.resume(checkpoint)
        elif isinstance(datamodule, ShardDataModule):
            self._resume_evaluation(datamodule)
        cached = getattr(datamodule, "feature_cache", None) is not None
        if self._sharding is not None:  # it has compared shapes, and loaded, already
            if cached and checkpoint[CONTENT_KEY].get("feature_key") != self.frozen_feature_key().hash:
                raise InputError(
                    "data.feature_cache: the checkpoint has another encoder, or its run had no cached features"
                )
            return
        weights = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        with together():
            check_fits(
                {name: value.shape for name, value in self.state_dict().items()}, weights, self.trainer.ckpt_path or ""
            )
        if not cached:
            return
        unused = self.model.config.vision_spec.unused
        for name, own in self.model.vision.model.state_dict().items():
            stored = checkpoint["state_dict"].get(f"model.vision.model.{name}")
            if stored is None or stored.shape != own.shape or name in unused:
                continue  # what doesn't fit is refused when it is loaded
            if not torch.equal(stored.to(own.device), own.to(stored.dtype)):  # half precision is stored as such
                raise InputError(f"data.feature_cache: the checkpoint has another encoder, {name} differs")

    # Training

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the parts that learn, stepped with a warm-up and cosine schedule.

        Raises:
            InputError: nothing to train, or nothing from the first step.
        """
        if self._scales_loss and self.guard_args.spike_factor is not None:
            raise InputError(
                "model.guard.spike_factor: expected null under precision 16-mixed, whose scaler skips steps itself"
            )
        if all(part.freeze for part in self.part_args.values()):
            raise InputError("model: expected a part that learns, all of vision, connector and decoder are frozen")
        if all(part.is_frozen(0) for part in self.part_args.values()):
            raise InputError(
                "model: expected a part that learns from the first step, all of vision, connector and decoder are frozen "
                "until later"
            )
        total_steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(total_steps):
            raise InputError("trainer: expected max_epochs or max_steps, which the schedule ends at, got neither")
        parts = {name: (self._trainable[name], args) for name, args in self.part_args.items()}
        optimizer, schedule = build_optimizer(parts, self.optimizer_args, int(total_steps), fused=not self._scales_loss)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _scales_loss(self) -> bool:
        """Whether gradients are scaled for fp16: they may overflow then, and the scaler skips the step."""
        return str(self.trainer.precision) == "16-mixed"

    def _set_freezing(self, step: int) -> None:
        for name, args in self.part_args.items():
            frozen = args.is_frozen(step)
            part = self.part(name)
            if (frozen or name in self._adapters) and part.training:
                switch_off_training_mode(part)
            elif not frozen and name not in self._adapters and self.training and not part.training:
                part.train()
            for module in self._adapters.get(name, ()):
                module.training = self.training and not frozen
            for parameter in self._trainable[name]:
                parameter.requires_grad_(not frozen)

    def _parts_that_learn(self) -> list[bool]:
        return [any(p.requires_grad for p in self._trainable[name]) for name in PARTS]

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Seeds the step and freezes or unfreezes parts."""
        words = np.random.SeedSequence((self.seed, self.current_epoch, batch_idx, self.global_rank)).generate_state(2)
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        before = self._parts_that_learn()
        self._set_freezing(self.global_step)
        strategy = self.trainer.strategy
        if self._parts_that_learn() != before and isinstance(strategy, DDPStrategy):
            _wrap_again(strategy)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor | None:
        """Summed loss of a micro-batch; None where every sample of it was bad."""
        if batch.labels.numel() == 0:
            if self.trainer.world_size == 1:
                return None
            # The other ranks reduce gradients with this one: it takes part, with zeros.
            loss_sum = _zero_through(self) if self._sharding is None else self._zero_pass()
            count = loss_sum.detach().new_zeros(())
        else:
            of_labels: list[Tensor] | None = None if batch.label_datasets is None else []
            text_only = batch.pixel_values is None and batch.image_features is None and self.trainer.world_size > 1
            blank = self._blank if text_only else None
            loss_sum, count = self.model.target_loss(batch, self.loss_normalization, of_labels=of_labels, blank=blank)
            if of_labels:
                self._window.of_sets.append(self._by_set(batch, of_labels[0], len(self._set_names("train"))))
            if text_only and self._sharding is None:
                # Text only: the others would wait for the encoder's gradients.
                loss_sum = loss_sum + _zero_through(self.model.vision, self.model.connector)
            elif not loss_sum.requires_grad:  # text only, and the decoder is frozen
                loss_sum = loss_sum + _zero_through(self)
        self._window.with_images += batch.pixel_values is not None or batch.image_features is not None
        self._window.losses.append(loss_sum.detach())
        self._window.counts.append(count)
        self._window.ids.append(tuple(reference.id for reference in batch.references))
        return loss_sum

    def _zero_pass(self) -> Tensor:
        """0, with a gradient of zeros, from a pass through all of the model: the others gather its layers with this rank."""
        image = self.processor.layout.image
        sequence = TokenSequence.from_ids(image, [self.processor.layout.eos], [[self.processor.layout.eos]])
        filler = map_tensors(
            collate([sequence], [()], None, pad_id=self.processor.pad_id, visibility=self.processor.prefix_visibility,
                    packed=self._packed), lambda tensor: tensor.to(self.device),
        )  # fmt: skip
        loss, _ = self.model.target_loss(filler, self.loss_normalization, blank=self._blank)
        return loss * 0.0

    @property
    def _blank(self) -> Literal["image", "features"] | None:
        """What stands in for images where the others gather layers for theirs."""
        if self._sharding is None:
            return None
        return "image" if getattr(self.trainer.datamodule, "feature_cache", None) is None else "features"  # type: ignore[attr-defined]

    def _set_names(self, split: str) -> tuple[str, ...]:
        names = getattr(getattr(self.trainer, "datamodule", None), "set_names", None)
        return names(split) if names else ()

    def _by_set(self, batch: PackedBatch, losses: Tensor, number: int) -> Tensor:
        """Float ``[sets, 2]``, loss and count of each set, from the loss of each label ``[M]``."""
        assert batch.label_datasets is not None
        weights = label_weights(batch.labels, batch.target_lengths, self.loss_normalization)
        both = torch.stack([losses.float() * weights, weights], 1)
        return both.new_zeros((number, 2)).index_add_(0, batch.label_datasets, both)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Normalises the gradients by the count of the whole optimizer step, before they are clipped.

        Raises:
            NonFiniteLossError: before the weights are touched.
        """
        window, self._window = self._window, _Window()
        self._last_window = window
        if not window.losses:
            return
        totals = torch.stack([torch.stack(window.losses).sum(), torch.stack(window.counts).sum()])
        totals = torch.cat([totals, totals.new_tensor([window.with_images])])
        names = self._set_names("train")
        if names:  # a rank may have had none of their samples: it adds zeros
            of_sets = torch.stack([totals.new_zeros(len(names), 2), *window.of_sets]).sum(0)
            totals = torch.cat([totals, of_sets.flatten()])
        totals = self.trainer.strategy.reduce(totals, reduce_op="sum")
        for name, (of_set, of_count) in zip(names, totals[3:].view(-1, 2).tolist(), strict=True):
            if of_count:
                self.log(f"train/{name}/loss", of_set / of_count)
        count = totals[1].clamp(min=1e-6)  # 0 where no rank had a usable sample; the sum is 0 then, too
        loss = totals[0] / count
        problem = self._guard.judge(float(loss), self.guard_args.spike_factor) if totals[1] else None
        if problem is not None:
            pairs = list(zip(window.losses, window.ids, strict=True))
            self._refuse_step(problem, [ids for x, ids in pairs if not x.isfinite()] or [ids for _, ids in pairs])
            return
        if not totals[2]:
            # No rank saw an image. What stood in for one gave zeros: they would still decay weights and age Adam's state.
            for part in (self.model.vision, self.model.connector):
                part.zero_grad(set_to_none=True)
        # Ranks are averaged by the strategy and micro-batches by the trainer: undo both, then divide by the count.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches / count
        # Of a sharded model, each rank's share.
        gradients = [
            p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            for p in self.parameters()
            if p.grad is not None
        ]
        if gradients:  # none, where nobody had an image and the decoder is frozen
            torch._foreach_mul_(gradients, scale)
        self.log("train/loss", loss, prog_bar=True)
        for group in optimizer.param_groups:
            if "/" not in group["name"]:
                self.log(f"lr/{group['name']}", group["lr"])

    def _refuse_step(self, what: str, batches: list[tuple[str, ...]]) -> None:
        """Stops before a step, or takes its gradients away: the optimizer then leaves the weights and its state as they are."""
        ids = [id_ for batch in batches for id_ in batch]
        shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        line = (
            f"step {self.global_step} (epoch {self.current_epoch}): the {what}; samples of the batch: "
            f"{shown or 'on another rank'}"
        )
        guard = self._guard
        if self.guard_args.action == "stop":
            raise NonFiniteLossError(f"{line}; the last checkpoint is from before it")
        guard.skipped += 1
        guard.in_a_row += 1
        if guard.in_a_row > self.guard_args.max_in_a_row:
            raise NonFiniteLossError(f"{line}; {guard.in_a_row - 1} steps before it were skipped, one after the other")
        rank_zero_info(f"skipped {line}; {guard.skipped} steps skipped so far")
        self.log("train/skipped_steps", float(guard.skipped))
        if not self._scales_loss:  # else the scaler sees what is not finite, and skips
            self.zero_grad(set_to_none=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the trainer says, and logs the norm from before."""
        gradients = [p for p in self.parameters() if p.grad is not None]
        by_norm = gradient_clip_algorithm in (None, "norm")
        limit = gradient_clip_val if by_norm and gradient_clip_val else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(gradients, limit)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not self._scales_loss and not torch.isfinite(norm):
            self._refuse_step("gradient is not finite", self._last_window.ids)
        elif gradients:
            self._guard.in_a_row = 0
        self.log("train/grad_norm", norm)
        if not by_norm:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Evaluation

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], rows: int) -> list[str]:
        """One text for each prompt.

        Args:
            prompts: of a window of batches.
            rows: how many are answered at a time.
        """
        with self._uncompiled():
            generated = answers(
                self.model, prompts, rows=rows, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams,
                sampling=self.sampling, seed=self.seed, packed=self._packed,
            )  # fmt: skip
        return self.processor.decode_ids(generated)

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Evaluation runs the model as it is: prefill, each cached step and the loss would all be compiled, for shapes
        that come once, and use up the compiler's limit of recompilations for training."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    @property
    def max_new_tokens(self) -> int:
        """What evaluation generates at most: the data module's longest target."""
        return int(getattr(self.trainer.datamodule, "max_new_tokens", 256))  # type: ignore[attr-defined]

    @property
    def _window_size(self) -> int:
        """Batches whose prompts are answered together."""
        return int(getattr(self.trainer.datamodule, "eval_window", 1))  # type: ignore[attr-defined]

    def _tasks(self, split: str) -> dict[str, str]:
        tasks = getattr(getattr(self.trainer, "datamodule", None), "tasks", None)
        return tasks(split) if tasks else {}

    def _evaluate(self, batch: EvaluationBatch, split: str) -> list[Prediction]:
        tasks = self._tasks(split)
        for reference in batch.references:
            runner.check_reference(tasks.get(reference.dataset, DEFAULT_TASK), reference)
        with self._uncompiled():
            image_tokens = self.model.image_tokens_of(batch.prompts)
        if batch.targets is not None:
            of_labels: list[Tensor] = []
            with self._uncompiled():
                loss = self.model.target_loss(batch.targets, self.loss_normalization, image_tokens, of_labels=of_labels)
            names = self._set_names(split)
            of_sets = [self._by_set(batch.targets, of_labels[0], len(names))] if names else []
            self._evaluation_loss.append(torch.cat([torch.stack(loss).unsqueeze(0), *of_sets]))
        return self._predict(batch, image_tokens)

    def _resume_evaluation(self, data: ShardDataModule) -> None:
        """Finds what an evaluation of the same had done before it was killed, and tells the data to leave it out."""
        trainer = self.trainer
        stage = str(trainer.state.fn.value)  # type: ignore[union-attr]
        split, limit = {
            "validate": ("val", trainer.limit_val_batches), "test": ("test", trainer.limit_test_batches),
            "predict": ("predict", trainer.limit_predict_batches),
        }[stage]  # fmt: skip
        path = trainer.ckpt_path
        # A limit counts this run's batches.
        if path is None or not (isinstance(limit, float) and limit == 1.0):
            return
        key = self._evaluation_key(data, split, Path(path)) if trainer.is_global_zero else {}
        key = trainer.strategy.broadcast(key)
        progress = Progress(Path(trainer.default_root_dir), stage, key, trainer.global_rank)
        if self.trainer.is_global_zero:
            for line in progress.others():
                rank_zero_info(line)
            number = len(data.shards(split))
            self._found = progress.read(number, at_least=self.trainer.world_size)
            if self._found:
                done = sum(len(part.records) for part in self._found)
                answered = sum(len(part.predictions) for part in self._found)
                rank_zero_info(
                    f"{stage}: goes on where it was cut short: {answered:,} answers, to {done:,} of {number:,} records, "
                    f"found in {progress.folder}"
                )
        finished = frozenset(record for part in self._found for record in part.records)
        data.finished = self.trainer.strategy.broadcast(finished)
        self._progress = progress

    def _evaluation_key(self, data: ShardDataModule, split: str, checkpoint: Path) -> dict[str, str]:
        """What answers and losses depend on; neither the number of processes nor the size of batches."""
        files = self.processor.to_files()
        digest = hashlib.sha256(json.dumps(self.model.config.to_dict(), sort_keys=True, default=str).encode())
        for name in sorted(files):
            digest.update(name.encode() + files[name].numpy().tobytes())
        drawn = None if self.sampling is None else {**asdict(self.sampling), "seed": self.seed}
        return {
            "checkpoint": checkpoint_identity(checkpoint),
            "data": data.identity(split),
            "model or prompt": digest.hexdigest(),
            "decoding": json.dumps([self.num_beams, drawn, self.max_new_tokens]),
            "loss or precision": json.dumps([self.loss_normalization, str(self.trainer.precision)]),
            "version": json.dumps([version(name) for name in ("mmprefix", "torch", "transformers", "timm")]),
        }

    def _keep_progress(self) -> None:
        """Appends what the window that was just answered holds."""
        if self._progress is None:
            return
        losses, self._losses_kept = self._evaluation_loss[self._losses_kept :], len(self._evaluation_loss)
        predictions = tuple(self._answered)
        records = tuple(sorted({reference.order[0] for reference, _ in predictions}))
        if records:
            sums = torch.stack(losses).sum(0).tolist() if losses else []
            self._progress.add(Part(records, tuple((loss, count) for loss, count in sums), predictions))

    def _end_progress(self) -> None:
        """All is done, scored and written."""
        if self._progress is not None:
            self._progress.finish()
            self.trainer.datamodule.finished = frozenset()  # type: ignore[attr-defined]
            self._progress = None

    def _predict(self, batch: EvaluationBatch, image_tokens: Tensor | None) -> list[Prediction]:
        """Answers of a whole window, where this batch completes it."""
        self._skipped += len(batch.bad)
        self._waiting.append((prompts_of(batch, image_tokens), batch.references))
        self._answered = []
        if len(self._waiting) >= self._window_size:
            self._answer_waiting()
        return self._answered

    def _answer_waiting(self) -> None:
        """Answers all batches that wait, their prompts sorted by length and mixed with one another."""
        waiting, self._waiting = self._waiting, []
        prompts = [prompt for of_batch, _ in waiting for prompt in of_batch]
        references = [reference for _, of_batch in waiting for reference in of_batch]
        rows = max((len(of_batch) for _, of_batch in waiting), default=0)
        texts = self.generate(prompts, rows) if prompts else []
        self._answered = list(zip(references, texts, strict=True))
        self._predictions += self._answered
        self._keep_progress()

    def _answer_rest(self) -> None:
        """Answers the last window, which may be smaller. No step is running, whose precision it needs."""
        with self.trainer.precision_plugin.val_step_context():
            self._answer_waiting()

    def _start_evaluation(self) -> None:
        """Nothing of an evaluation that was cut short goes into the next, but what it has kept on disk."""
        self._waiting, self._answered, self.evaluation, self._skipped = [], [], Evaluation(), 0
        found, self._found = self._found, []
        self._predictions = [prediction for part in found for prediction in part.predictions]
        self._evaluation_loss = [torch.tensor(part.losses, device=self.device) for part in found if part.losses]
        self._losses_kept = len(self._evaluation_loss)

    def _log_evaluation(self, split: str) -> None:
        self._answer_rest()
        names = self._set_names(split)
        zeros = torch.zeros((1 + len(names), 2), device=self.device)
        sums = self.trainer.strategy.reduce(torch.stack([zeros, *self._evaluation_loss]).sum(0), reduce_op="sum")
        for name, (loss, count) in zip((split, *(f"{split}/{n}" for n in names)), sums.tolist(), strict=True):
            if count > 0:
                self.log(f"{name}/loss", loss / count, prog_bar=name == "val")
        self._evaluation_loss.clear()
        values, shown = self._score(split)
        for name, value in values.items():
            self.log(name, value, prog_bar=name in shown)

    def _score(self, split: str) -> tuple[dict[str, float], set[str]]:
        """Scores the split on the first process.

        Returns:
            On all processes: values by name, and the names that the progress bar shows.

        Raises:
            InputError: what can't be scored, on all processes; the first says it.
        """
        predictions, self._predictions = runner.gathered(self._predictions), []
        skipped = torch.tensor(float(self._skipped), device=self.device)
        skipped = self.trainer.strategy.reduce(skipped, reduce_op="sum")
        values: dict[str, float] = {}
        shown: set[str] = set()
        problem = ""
        if self.trainer.is_global_zero:
            fitting = self.trainer.state.fn == TrainerFn.FITTING
            tokenizer: Tokenizer = "python" if fitting else "auto"
            rules_of = getattr(self.trainer.datamodule, "scoring_rules", None)  # type: ignore[attr-defined]
            rules = rules_of(tokenizer) if rules_of else ScoringRules(caption_tokenizer=tokenizer)
            scores: dict[str, Scored] = {}
            try:
                scores = runner.score_predictions(predictions, self._tasks(split), rules, intervals=not fitting)
            except InputError as error:
                problem = str(error)
            if fitting:  # other stages print a table that says it
                for metric, why in (pair for scored in scores.values() for pair in scored.unavailable.items()):
                    rank_zero_warn(f"{split}: {metric} is unavailable: {why}")
            self.evaluation = Evaluation(predictions, scores, problem, int(skipped))
            values = runner.logged(split, self.evaluation)
            shown = {f"val/{scored.metric}" for scored in scores.values()}
        values, shown, problem = self.trainer.strategy.broadcast((values, shown, problem))
        if problem and split != "predict":  # whose texts are worth something without a score
            raise InputError(problem if self.trainer.is_global_zero else "")
        return values, shown

    def on_validation_epoch_start(self) -> None:
        """See `_start_evaluation`."""
        self._start_evaluation()

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> list[Prediction]:
        """Loss and answers."""
        return self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Logs the split's loss and scores, over all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """See `_start_evaluation`."""
        self._start_evaluation()

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> list[Prediction]:
        """As `validation_step`."""
        return self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_evaluation("test")

    def on_predict_epoch_start(self) -> None:
        """See `_start_evaluation`."""
        self._start_evaluation()

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> list[Prediction]:
        """Answers only; targets are not needed."""
        with self._uncompiled():
            image_tokens = self.model.image_tokens_of(batch.prompts)
        return self._predict(batch, image_tokens)

    def on_predict_epoch_end(self) -> None:
        """Scores, where all samples of a set have references; nothing can be logged here."""
        self._answer_rest()
        self._score("predict")

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts config and processor into the checkpoint, so that it can be used without anything beside it."""
        checkpoint[CONTENT_KEY] = {
            "config": self.model.config.to_dict(),
            "generation_config": self.model.generation_config.to_dict(),
            "processor": self.processor.to_files(),
            "versions": {name: version(name) for name in ("mmprefix", "torch", "transformers", "timm", "lightning")},
            "settings": self.settings,
            "guard": asdict(self._guard),
            "adapters": adapters.settings_of(self.model),
        }
        if self._feature_key is not None:
            checkpoint[CONTENT_KEY]["feature_key"] = self._feature_key.hash
