"""Rows of a cache in places of one size, so that a decoding step is always the same launches: on a GPU, one CUDA graph.

A token of PaliGemma-3B's shape takes an H200 16 ms while Python launches kernels one by one, and 6 as one graph, its capture
included (benchmarks/decode.py). For that, shapes and addresses may not change: each answer has a place of fixed
length, filled from the left, and what is not filled yet is hidden:

    p p p t t t . .      p prefix, t generated, . not written yet
    p p p p p t . .      the next token's column is also its position

A place that nobody is in computes on, at position 1, until a prompt takes it over; nobody reads what it says. (It may not
go on counting: positions have tables that end, and rotary frequencies that depend on the largest of all.)

Shapes: R places, L columns, V vocabulary, H query heads, G key-value heads, D head size, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmprefix.attention import CachedColumns, cached_columns
from mmprefix.modeling import MMPrefixForConditionalGeneration

_ROUND_COLUMNS = 64
"""Attention kernels copy a mask whose rows are not aligned."""


class _Place(DynamicLayer):
    """One layer's keys and values ``[R, G, L, D]``; a step writes one column of each place.

    Args:
        like: keys or values ``[n, G, T, D]`` of a prefill.
        places: how many.
        columns: L.
        length: int64 ``[R]``, the column of each place's next token; changed from outside.
    """

    def __init__(self, like: DynamicLayer, places: int, columns: int, length: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        assert like.keys is not None
        assert like.values is not None
        self.keys, self.values = (
            x.new_zeros(places, x.shape[1], columns, x.shape[3]) for x in (like.keys, like.values)
        )
        self._length = length
        self._rows = torch.arange(places, device=length.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes ``[R, G, 1, D]``; gives all columns, what is not written yet included."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[self._rows, :, self._length] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[self._rows, :, self._length] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """As if all columns but the last were filled: places differ, and `CachedColumns` knows by how much."""
        assert self.keys is not None
        return int(self.keys.shape[2]) - 1

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Columns, and where they begin."""
        return self.get_seq_length() + 1, 0


class Places:
    """Answers in the making.

    Args:
        model: in eval mode, with a decoder that attends without masks.
        places: R.
        columns: at least the longest prompt and its answer.
        fresh: the cache of a prefill, which says what layers there are; nothing is taken from it yet.
        captured: whether steps run as a CUDA graph.
    """

    def __init__(
        self, model: MMPrefixForConditionalGeneration, places: int, columns: int, fresh: DynamicCache, captured: bool
    ) -> None:
        device = next(layer.keys.device for layer in fresh.layers if layer.is_initialized and layer.keys is not None)
        columns = -(-columns // _ROUND_COLUMNS) * _ROUND_COLUMNS
        self._model = model
        self._last = torch.zeros(places, dtype=torch.int64, device=device)
        self._length = torch.ones(places, dtype=torch.int64, device=device)
        self._prefix = torch.ones(places, dtype=torch.int64, device=device)
        self._taken = torch.zeros(places, dtype=torch.int64, device=device)
        self._columns = CachedColumns(self._length, self._prefix, columns, model.config.prefix_visibility == "causal")
        self._cache = DynamicCache()
        # Layers that take keys of others have none of their own.
        self._cache.layers = [
            _Place(layer, places, columns, self._length) if layer.is_initialized else layer for layer in fresh.layers
        ]
        self._captured = captured
        self._replay: Callable[[], Tensor] | None = None

    def put(self, places: list[int], fresh: DynamicCache, rows: list[int], mask: Tensor, last: Tensor) -> None:
        """Rows of a prefill take places.

        Args:
            places: where to, one for each of ``rows``.
            fresh: their keys and values, padded on the left, of T columns.
            rows: of the prefill.
            mask: int64 ``[n, T]`` of the prefill, 0 on padding.
            last: int64 ``[n]``, the first token of each answer.
        """
        device = self._last.device
        to, of = torch.tensor(places, device=device), torch.tensor(rows, device=device)
        length, width = mask[of].sum(1), mask.shape[1]
        # What padding was on the left is left over on the right: hidden, and written over in time.
        source = torch.arange(width, device=device) + (width - length).unsqueeze(1)
        source = source.clamp(max=width - 1)[:, None, :, None]
        for own, other in zip(self._cache.layers, fresh.layers, strict=True):
            if isinstance(own, _Place):
                assert own.keys is not None
                assert own.values is not None
                for kept, x in ((own.keys, other.keys), (own.values, other.values)):
                    assert x is not None
                    kept[to, :, :width] = torch.take_along_dim(x[of], source, 2)
                    kept[to, :, width:] = (
                        0  # an earlier answer's: hidden, but what is not finite shows through a weight of 0
                    )
        self._last[to], self._length[to], self._prefix[to], self._taken[to] = last[of], length, length, 1

    def step(self) -> Tensor:
        """Feeds the last token of each place; logits of the next ones, float ``[R, V]``, until the next step."""
        if self._captured and self._replay is None:
            self._replay = self._capture()
            self._captured = self._replay is not None
        return self._forward() if self._replay is None else self._replay()

    def push(self, tokens: Tensor, ended: list[int]) -> None:
        """The next tokens, int64 ``[R]``, and which places are left."""
        self._last.copy_(tokens)
        self._length += self._taken
        if ended:
            self._length[ended], self._prefix[ended], self._taken[ended] = 1, 1, 0

    def _forward(self) -> Tensor:
        with cached_columns(self._columns):
            output = self._model(
                input_ids=self._last.unsqueeze(1), attention_mask=self._columns.written(),
                position_ids=self._length.unsqueeze(1), past_key_values=self._cache, use_cache=True,
            )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits

    def _capture(self) -> Callable[[], Tensor] | None:
        """The step as a graph; None, with a warning, where the decoder asks the device for something on the way."""
        device = self._last.device
        dtype = torch.get_autocast_dtype("cuda")
        # The cache of weights in the other dtype would hold tensors of the graph's own memory.
        autocast = torch.autocast("cuda", dtype, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False)
        graph = torch.cuda.CUDAGraph()
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        debugged = torch.cuda.get_sync_debug_mode()
        try:
            side.wait_stream(current)
            with torch.cuda.stream(side), autocast:
                self._forward()  # libraries load kernels and take workspaces; each writes the same columns again
                # Found here: a capture that breaks off leaves the process in a state of its own.
                torch.cuda.set_sync_debug_mode("error")
                self._forward()
            torch.cuda.set_sync_debug_mode(debugged)
            current.wait_stream(side)
            # Loaders' threads may copy meanwhile.
            with autocast, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self._forward()
        except RuntimeError as error:
            line = " ".join(str(error).split())[:200]
            warnings.warn(f"answers are decoded without a CUDA graph, slower: {line}", stacklevel=2)
            return None
        finally:
            torch.cuda.set_sync_debug_mode(debugged)
            torch.cuda.set_stream(current)

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
