"""What training costs: floating-point operations of a step, and memory of a device, both before anything is run.

**FLOPs are model FLOPs**, as PaLM defines them for its model FLOPs utilization (MFU, arXiv 2204.02311, appendix B):
what forward and backward need, whatever the implementation does. Padding, hidden query-key pairs, logits that no label
reads, and activations that are recomputed are not useful work. A multiplication and an addition are two operations.
Only matrix products and convolutions are counted; norms, activation functions and the optimizer are not.

The costs of one image, token, query-key pair and label are not formulas for one architecture: they are counted by
torch's own `FlopCounterMode` in passes of a copy on the meta device, once. A step is then a sum of products of numbers
that the collator knows, without asking the device.

**Memory** is the peak of live tensors of a whole step, simulated: the real model code runs forward and backward
on fake tensors (shapes and dtypes without data), while a dispatch mode adds up storages as they come and go.

Shapes: I images, N image tokens of one image, W decoder width, T tokens, M labels, V vocabulary.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from mmprefix.adapters import LoraArgs, add_lora
from mmprefix.errors import InputError
from mmprefix.generation import run_decoder
from mmprefix.loss import LossNormalization, transient_bytes
from mmprefix.modeling import MMPrefixConfig, MMPrefixForConditionalGeneration
from mmprefix.packing import PackedBatch, PrefixPlan, collate, map_tensors
from mmprefix.sequence import PromptLayout, TokenSequence
from mmprefix.varlen import AttentionCall

GIB = 2**30
PARTS = ("vision", "connector", "decoder")


def meta_model(config: MMPrefixConfig) -> MMPrefixForConditionalGeneration:
    """The model of a config without weights, on the meta device; seconds for billions of parameters."""
    with torch.device("meta"):
        return MMPrefixForConditionalGeneration(copy.deepcopy(config))


def trained_parts(model: MMPrefixForConditionalGeneration) -> frozenset[str]:
    """Which of `PARTS` have a parameter that learns at the moment."""
    return frozenset(name for name in PARTS if any(p.requires_grad for p in getattr(model, name).parameters()))


# FLOPs


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of a model, by what they grow with.

    Attributes:
        vision: of one image through the encoder, its attention included (it sees all of the image).
        connector: of one image's tokens.
        token: of one token through the decoder's layers, without attention scores. In mixtures of experts, of the
            experts that a token is sent to (llama4 computes all of its experts for every token: all are counted).
        pair: of one visible query-key pair, all heads and layers: for plain attention, 4 x heads x head size x layers.
            Sliding-window layers are taken to see all pairs of the rule, which overstates what they need: a long
            target's tokens beyond the window.
        label: of one label through the output layer.
        label_only: the part of ``token`` that a packed row spares tokens which predict no label, see `last_layer`.
        vision_pairs: the part of ``vision`` that has no weight: products of attention.
        adapters: what adapters add, counted in the same way; None without any.
        adapted: parts that have adapters.
    """

    vision: int
    connector: int
    token: int
    pair: int
    label: int
    label_only: int = 0
    vision_pairs: int = 0
    adapters: ModelFlops | None = None
    adapted: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: MMPrefixConfig, lora: Mapping[str, LoraArgs] | None = None) -> ModelFlops:
        """Counts them, on the meta device.

        Args:
            config: of the model, without adapters.
            lora: adapters of parts. Those of DoRA count as LoRA's: what a pass spends on magnitudes grows with nothing.

        Raises:
            NotImplementedError, RuntimeError: a decoder whose shapes depend on values, which a meta tensor hasn't.
        """
        # In half precision: experts' grouped products have no other shapes on the meta device (torch 2.14).
        model = meta_model(config).to(torch.bfloat16).eval()
        plain = cls._count(model)
        if not lora:
            return plain
        for part, args in lora.items():
            # A folder's config may say DoRA, too.
            add_lora(model, part, args, dora=False)
        whole = cls._count(model)
        both = zip(vars(plain).items(), vars(whole).values(), strict=True)
        more = {name: b - a for (name, a), b in both if isinstance(a, int)}
        return replace(plain, adapters=cls(**more), adapted=frozenset(lora))

    @classmethod
    def _count(cls, model: MMPrefixForConditionalGeneration) -> ModelFlops:
        height, width = model.config.vision_spec.image_size
        pixels = torch.empty(1, 3, height, width, dtype=torch.bfloat16, device="meta")
        vision = _flops(lambda: model.vision(pixels))
        vision_pairs = _flops(lambda: model.vision(pixels), weights=False)
        # With gradients, a connector that begins with views of them would fail in `_flops`, which has none.
        with torch.no_grad():
            features = model.vision(pixels)
        connector = _flops(lambda: model.connector(features))
        # A pass over T tokens costs token * T + pair * T^2: two lengths tell the two apart, whatever the layers are.
        # Long enough for the quadratic part to be exact in integers, short enough to cost nothing.
        short, long = 64, 128
        once, twice = (_decoder_flops(model, length, num_labels=0) for length in (short, long))
        pair = (twice - 2 * once) // (long * long - 2 * short * short)
        token = (once - pair * short * short) // short
        label = _decoder_flops(model, short, num_labels=1) - once
        label_only = (once - _decoder_flops(model, short, num_labels=0, restricted=True)) // short
        return cls(vision, connector, token, pair, label, label_only, vision_pairs)

    def recomputed(self, batch: PackedBatch, trained: Collection[str], shares: Mapping[str, float]) -> int:
        """FLOPs of forward that gradient checkpointing does again in backward: of layers that gradients go through.

        They are no model FLOPs.

        Args:
            batch: as for `step`.
            trained: as for `step`.
            shares: of the layers of `vision` and `decoder`, which are taken to be alike, those that are computed again.
        """
        encoded = 0 if batch.pixel_values is None else batch.pixel_values.shape[0]
        vision = encoded * self.vision if "vision" in trained else 0
        decoder = batch.num_tokens * self.token + batch.visible_pairs * self.pair if trained else 0
        return round(shares.get("vision", 0.0) * vision + shares.get("decoder", 0.0) * decoder)

    def step(self, batch: PackedBatch, trained: Collection[str]) -> int:
        """Model FLOPs of forward and backward of one micro-batch.

        A matrix product of forward costs the same again in backward for the gradient of its input, and again for that
        of its weight; what nobody needs is not counted:

        - a part that learns costs 2x its forward in backward (PaLM's convention; the input gradient of the very first
          layer is counted, too);
        - a frozen part behind one that learns lets gradients through: 1x, and 2x for the products of attention, which
          have no weight but two inputs;
        - a frozen part with nothing that learns before it costs no backward;
        - a part with adapters is a frozen one behind its own adapters, which cost 2x their forward.

        Args:
            batch: only its sizes are read, none of its tensors.
            trained: which of `PARTS` learn.
        """
        encoded = 0 if batch.pixel_values is None else batch.pixel_values.shape[0]
        images = encoded if batch.image_features is None else batch.image_features.shape[0]
        learning = frozenset(trained) - self.adapted  # with all of their weights
        vision_factor = 3 if "vision" in learning else 2 if "vision" in trained else 1
        behind_vision = "vision" in trained
        connector_factor = 3 if "connector" in trained else 2 if behind_vision else 1
        behind_connector = behind_vision or "connector" in trained
        decoder_factor = 3 if "decoder" in learning else 2 if behind_connector or "decoder" in trained else 1
        pair_factor = 1 if decoder_factor == 1 else 3
        rows = batch.plan.label_rows
        unread = 0 if rows is None else max(0, batch.num_tokens - rows.numel())

        def of_tokens(costs: ModelFlops) -> int:
            return batch.num_tokens * costs.token - unread * costs.label_only + batch.labels.numel() * costs.label

        total = (
            encoded * vision_factor * self.vision
            + images * connector_factor * self.connector
            + decoder_factor * of_tokens(self)
            + pair_factor * batch.visible_pairs * self.pair
        )
        if "vision" in self.adapted & set(trained):
            total += encoded * self.vision_pairs
        if self.adapters is not None:  # where they don't learn yet, they are frozen as the rest
            total += encoded * (3 if "vision" in trained else 1) * self.adapters.vision
            total += (3 if "decoder" in trained else decoder_factor) * of_tokens(self.adapters)
        return total


def _grouped_mm_flops(a: torch.Size, b: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of ``[T, K] x [experts, K, N]``, where each row meets one expert; torch's counter passes over it in silence."""
    return 2 * a[0] * a[1] * b[-1]


def _matrix_shape(layer: nn.Module | None) -> torch.Size:
    assert layer is not None
    assert isinstance(layer.weight, Tensor)
    return layer.weight.shape


def _flops(function: Callable[[], Any], weights: bool = True) -> int:
    """Counted; without ``weights``, of products of activations only."""
    formulas = {torch.ops.aten._grouped_mm: _grouped_mm_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        function()
    counts = counter.get_flop_counts().get("Global", {})
    return sum(number for operator, number in counts.items() if weights or operator not in _WITH_WEIGHT)


_WITH_WEIGHT = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)


def _decoder_flops(
    model: MMPrefixForConditionalGeneration, length: int, num_labels: int, restricted: bool = False
) -> int:
    """Of a pass over one row of ``length`` tokens that all see each other, with logits of ``num_labels`` of them.

    Restricted, the last layer's `label_only` modules get no token at all.
    """
    index = torch.zeros(1, length, dtype=torch.long, device="meta")
    plan = PrefixPlan(index, index, index, index, index, label_positions=index[0, :num_labels])
    if restricted:  # the calls are never run: no kernel takes meta tensors
        plan = replace(
            plan, label_rows=index[0, :0], calls=(AttentionCall(0, 0, None, index[0], index[0], 0, 0, False),)
        )
    width = _matrix_shape(model.get_input_embeddings())[1]
    embeds = torch.empty(1, length, width, dtype=torch.bfloat16, device="meta")
    return _flops(lambda: run_decoder(model.decoder, embeds, plan, index, index, use_cache=False))


def measured_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the fastest of several large square matrix products: a peak that the device really reaches.

    A vendor's number is higher (no device runs at it for long), so utilization against this one comes out higher.

    Args:
        device: blocks it, which is why it is done once, before training.
        dtype: what the model computes in.
        seconds: how long to go on; one product more than that at most.
    """
    side = 8192 if device.type == "cuda" else 1024
    # Random: a GPU multiplies zeros and ones at a higher clock than it can hold with data.
    a = torch.randn(side, side, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + seconds
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    torch.mm(a, a)  # the first one loads kernels
    synchronize(device)
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return float(2 * side**3 / best)


# Memory


def _grouped_mm(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As the operator; in float32, too, of tensors without data, whose shapes torch 2.14 gives in half precision only."""
    if not isinstance(a, FakeTensor) or a.dtype != torch.float32:
        return torch.ops.aten._grouped_mm.default(a, b, *args, **kwargs)
    return torch.ops.aten._grouped_mm.default(a.bfloat16(), b.bfloat16(), *args, **kwargs).float()


@contextmanager
def counted_without_values(config: PreTrainedConfig) -> Iterator[None]:
    """Where a decoder runs on tensors without data.

    Raises:
        InputError: what it does depends on values.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        message = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.decoder: expected a decoder whose shapes don't depend on values, a {config.model_type}'s can't be "
            f"counted: {message}"
        ) from error


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make inside the block, until they are freed; remembers the peak.

    What was alive before is not counted, nor what an operation needs inside itself, but for the loss, which makes its
    logits inside. Views count once.

    Attributes:
        live: bytes by kind at the moment.
        at_peak: bytes by kind when their sum was largest.
    """

    def __init__(self, kind_of: Callable[[Tensor], str] = lambda tensor: "activations") -> None:
        """``kind_of`` sorts a new tensor into a kind."""
        super().__init__()
        self.kind_of = kind_of
        self.live: dict[str, float] = {}
        self.at_peak: dict[str, float] = {}
        # By id, because storages cannot be compared; the reference's callback drops the entry with the storage.
        self._known: dict[int, tuple[weakref.ref[Any], str, float]] = {}

    @property
    def peak(self) -> float:
        """Largest sum of live bytes so far."""
        return sum(self.at_peak.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.count(tensor, "before", 0.0)  # known already, unless it is older than the block
        run = _grouped_mm if func is torch.ops.aten._grouped_mm.default else func
        outputs = run(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self.count(tensor, self.kind_of(tensor))
        if func is torch.ops.mmprefix.linear_cross_entropy.default:  # the one operator of ours that holds much inside
            inside = transient_bytes(*args)
            self._add("logits", inside)
            self._add("logits", -inside)
        return outputs

    def count(self, tensor: Tensor, kind: str, share: float = 1.0) -> None:
        """Counts ``share`` of a tensor's storage as ``kind``, unless it is known."""
        if tensor.layout != torch.strided:  # a sparse gradient of an embedding
            self.count(tensor._indices(), kind, share)
            self.count(tensor._values(), kind, share)
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = share * storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._free(key)), kind, size
        if size:
            self._add(kind, size)

    def recount(self, tensor: Tensor, kind: str, share: float) -> None:
        """Counts a known tensor as another kind: what turned out to be a gradient, of which a rank keeps its share."""
        self._free(id(tensor.untyped_storage()))
        self.count(tensor, kind, share)

    def _add(self, kind: str, size: float) -> None:
        self.live[kind] = self.live.get(kind, 0.0) + size
        if size > 0 and sum(self.live.values()) > self.peak:
            self.at_peak = dict(self.live)

    def _free(self, key: int) -> None:
        entry = self._known.pop(key, None)
        if entry is not None and entry[2]:
            self._add(entry[1], -entry[2])


@dataclass(frozen=True)
class Record:
    """What a typical record holds: an image, one instruction, and targets that share them as their prefix.

    Attributes:
        instruction_tokens: without BOS and separator, as `data.max_instruction_tokens` counts them.
        target_tokens: of each target, without EOS.
        targets: how many.
    """

    instruction_tokens: int = 32
    target_tokens: int = 32
    targets: int = 1


def typical_batch(model: MMPrefixForConditionalGeneration, record: Record, size: int) -> PackedBatch:
    """A batch of ``size`` such records; pixels are on the meta device, and ids are zeros."""
    config = model.config
    layout = PromptLayout(image=config.image_token_id, bos=0, separator=(0,), eos=0)
    views = config.vision_spec.max_views
    sequence = TokenSequence.build(
        layout, views * model.num_image_tokens, [0] * record.instruction_tokens,
        [[0] * record.target_tokens] * record.targets,
    )  # fmt: skip
    pixels = torch.empty(size * views, 3, *config.vision_spec.image_size, device="meta")
    return collate(
        [sequence] * size, [range(n * views, (n + 1) * views) for n in range(size)], pixels, pad_id=0,
        visibility=config.prefix_visibility, packed=config.mask_free,
    )  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """What Lightning's `precision` means for memory.

    Attributes:
        stored: dtype of weights, gradients and optimizer state.
        autocast: dtype that matrix products are cast to, None for none.
    """

    stored: torch.dtype
    autocast: torch.dtype | None

    @classmethod
    def from_name(cls, name: str | int | None) -> Precision:
        """Reads Lightning's names (`32-true`, `bf16-mixed`, ...) and their short forms.

        Raises:
            InputError: one that is not estimated.
        """
        short = {"None": "32-true", "64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
        bits, _, kind = short.get(str(name), str(name)).partition("-")
        dtypes = {"64": torch.float64, "32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}
        if bits not in dtypes or (kind != "true" and (kind != "mixed" or bits not in ("16", "bf16"))):
            raise InputError(
                f"precision: expected 64-true, 32-true, 16-true, bf16-true, 16-mixed or bf16-mixed, got {name}"
            )
        return cls(dtypes[bits], None) if kind == "true" else cls(torch.float32, dtypes[bits])

    @property
    def compute(self) -> torch.dtype:
        """What matrix products run in."""
        return self.autocast or self.stored


@dataclass(frozen=True)
class Layout:
    """How a run is spread over its devices.

    Attributes:
        devices: ranks.
        strategy: `ddp`, everything on each of them, or `fsdp`, shards, gathered layer by layer (`training.fsdp`).
        replicas: full copies of the shards.
        param_dtype: what weights are gathered in, None for as they are stored.
        reduce_dtype: what gradients are reduced in, None for as they are computed.
        reshard_after_forward: layers are given up after forward, and gathered again for backward.
        cpu_offload: parameters, gradients and optimizer state live in the host's memory.
        prefetch: how many layers ahead are gathered.
    """

    devices: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    replicas: int = 1
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    prefetch: int = 1

    def __post_init__(self) -> None:
        """Raises InputError for replicas that don't divide the devices."""
        if self.replicas < 1 or self.devices % self.replicas:
            raise InputError(
                f"trainer.strategy.replicas: expected a divisor of the {self.devices} devices, got {self.replicas}"
            )

    @property
    def shards(self) -> int:
        """Ranks that a parameter is divided among."""
        return self.devices // self.replicas if self.strategy == "fsdp" else 1


class MemoryEstimate:
    """Memory of one device in training, in bytes, from the model's config alone.

    The peak is that of a simulated training step in the trainer's own order: gradients of the last step live until
    forward is done, and go before backward makes new ones. It holds tensors only: not the CUDA context, fragments of
    the allocator, nor what an operation needs inside itself. The operations are those of the CPU: fused attention
    without its matrix of scores where there is no dropout on them, and the CPU's list of what autocast runs in half
    precision (on CUDA, norms and softmax run in float32).

    Attributes:
        weights: parameters and buffers.
        gradients: of what learns.
        optimizer: AdamW's two moments.
        communication: DDP's buckets, which are as large as the gradients; for FSDP, the gathered weights: those
            outside of layers, which stay gathered, and the largest layer with as many as are gathered ahead, or all where
            layers stay gathered, too.
        host: what `Layout.cpu_offload` keeps in the host's memory, for each device; the three above are 0 then.
    """

    def __init__(
        self,
        model: MMPrefixForConditionalGeneration,
        record: Record,
        precision: Precision,
        layout: Layout = Layout(),
        *,
        accumulates: bool = False,
        normalization: LossNormalization = "tokens",
    ) -> None:
        """Prepares the simulation.

        Args:
            model: on the meta device, frozen and in training mode as it will be; it is used up.
            record: what is in every record.
            precision: of the trainer.
            layout: over the devices.
            accumulates: whether gradients stay over several micro-batches.
            normalization: of the loss.
        """
        share = 1 / layout.shards
        gathered = layout.param_dtype if layout.strategy == "fsdp" else None
        model = model.to(precision.stored)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.weights = share * sum(map(_bytes, [*model.parameters(), *model.buffers()]))
        self.gradients = share * sum(map(_bytes, trained))
        self.optimizer = 2 * self.gradients
        self.communication = self.host = 0.0
        # Gathered weights are what autocast copies, unless they come in half precision.
        model = model.to(gathered or precision.stored)
        if layout.strategy == "fsdp" and (layout.shards > 1 or gathered or layout.cpu_offload):
            at_once = 1 + layout.prefetch if layout.reshard_after_forward else None
            self.communication = float(_gathered_bytes(model, at_once))
        elif layout.strategy == "ddp" and layout.devices > 1:
            self.communication = self.gradients
        if layout.strategy == "fsdp" and layout.cpu_offload:
            self.host = self.weights + self.gradients + self.optimizer
            share = self.weights = self.gradients = self.optimizer = 0.0
        # What stays of a gradient after it was reduced, in the dtype of the stored weight.
        self._kept = share * precision.stored.itemsize / (gathered or precision.stored).itemsize
        self.record, self.accumulates, self.normalization = record, accumulates, normalization
        self.autocast = precision.autocast
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fakes:
            model.to_empty(device="cpu")
            model.tie_weights()
        self._model = model
        self._peaks: dict[int, dict[str, float]] = {}

    def step_peak(self, batch_size: int) -> dict[str, float]:
        """Bytes by kind (`activations`, `logits`, `gradients`) at the peak of a step, beside what always stays."""
        if batch_size not in self._peaks:
            self._peaks[batch_size] = self.peak_of(typical_batch(self._model, self.record, batch_size))
        return self._peaks[batch_size]

    def peak_of(self, batch: PackedBatch) -> dict[str, float]:
        """`step_peak` of a step with this batch, of which shapes and dtypes are read, and its plan's numbers."""
        model = self._model
        vocabulary = _matrix_shape(model.get_output_embeddings())[0]
        logits = (batch.labels.numel(), vocabulary)

        def kind_of(tensor: Tensor) -> str:
            is_logits = tensor.shape[-1:] == (vocabulary,) and tensor.numel() == logits[0] * logits[1]
            return "logits" if is_logits else "activations"

        live = LiveBytes(kind_of)
        trained = [p for p in model.parameters() if p.requires_grad]
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: live.recount(_grad(p), "gradients", self._kept))
            for p in trained
        ]
        with self._fakes, live:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                live.recount(parameter.grad, "gradients", self._kept)
            live.at_peak = {}
            batch = map_tensors(batch, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
            # As Lightning does it: without a cache, each product's cast weight is freed where backward has no use for it.
            enabled = self.autocast is not None
            with counted_without_values(model.decoder.config):
                with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=enabled, cache_enabled=False):
                    loss, _ = model.target_loss(batch, self.normalization)
                if not self.accumulates:
                    model.zero_grad()
                loss.backward()
        for hook in hooks:
            hook.remove()
        model.zero_grad()
        return live.at_peak

    def total(self, batch_size: int) -> float:
        """Bytes of a device at the peak of a step."""
        return self.weights + self.optimizer + self.communication + sum(self.step_peak(batch_size).values())

    def each_record(self) -> tuple[dict[str, float], float]:
        """Bytes by kind that a record adds, and of activations whatever the batch size.

        Read off the two largest sizes simulated so far: in small batches the peak may lie where gradients are summed.
        """
        a, b = sorted(self._peaks)[-2:]
        small, large = self._peaks[a], self._peaks[b]
        each = {kind: (large.get(kind, 0.0) - small.get(kind, 0.0)) / (b - a) for kind in ("activations", "logits")}
        return each, max(0.0, large["activations"] - b * each["activations"])

    def largest_batch(self, memory: float, start: int = 1) -> int:
        """The largest batch size whose peak fits into ``memory`` bytes, 0 if none does, at most `MAX_BATCH`.

        The peak is the largest of a few straight lines in the batch size (end of forward, end of backward): convex,
        so that secants find the answer in a few simulations and prove it without trying the next size.

        Args:
            memory: bytes of a device.
            start: size to begin with; ones that were simulated already are read again for nothing.
        """
        self.total(start)
        self.total(2 * start)
        while True:
            sizes = sorted(self._peaks)
            fits = [size for size in sizes if self.total(size) <= memory]
            low, high = max(fits, default=0), min((s for s in sizes if s not in fits), default=MAX_BATCH + 1)
            if high == low + 1:
                return low
            # With a size that does not fit, between the two; without one, beyond the two largest; else before all.
            a, b = (low, high) if fits and high <= MAX_BATCH else fits[-2:] if len(fits) > 1 else sizes[:2]
            slope = (self.total(b) - self.total(a)) / (b - a)
            if b == low and self.total(low) + slope > memory:
                return low
            guess = int(a + (memory - self.total(a)) / slope) if slope else 8 * b
            self.total(max(low + 1, min(guess, high - 1, 8 * max(1, low))))


MAX_BATCH = 1 << 14
"""Where the search for the largest batch ends: nobody trains with more records on a device."""


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _gathered_bytes(model: nn.Module, at_once: int | None) -> int:
    """Of the parameters that a rank holds in full at once: all outside of layers, and the largest layers, or all."""
    layers = [layer for stack in model.modules() if isinstance(stack, nn.ModuleList | nn.Sequential) for layer in stack]
    inside = set() if at_once is None else {id(p) for layer in layers for p in layer.parameters()}
    outside = sum(_bytes(p) for p in model.parameters() if id(p) not in inside)
    if at_once is None:
        return outside
    nested = {id(m) for layer in layers for m in layer.modules() if m is not layer}  # else they would count twice
    sizes = [sum(map(_bytes, layer.parameters())) for layer in layers if id(layer) not in nested]
    return outside + sum(sorted(sizes, reverse=True)[:at_once])
