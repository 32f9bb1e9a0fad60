"""Models that are recorded instead of made: how each tensor comes about, so that a part of it can be made later.

While a `Recording` is on, large tensors on the CPU have no memory (PyTorch's fake tensors); whatever is done to them is
written down. Their values are made from that when they are wanted, tensor by tensor, and where a tensor is one in a file, as
it is or in another precision, a few of its rows cost no more than these rows. Libraries build and load models as they always
do: whatever they do at that, new names, conversions, initial values, is in the record. Values are those that they would have
been, bit for bit: each random operation has drawn its numbers once, for the generator's sake, and draws them again from the
state that it began with. That costs the time of drawing twice, and the memory of the largest tensor.

Files are mapped into memory, by safetensors and by `torch.load(mmap=True)`: only the pages that are read are there, and they
go when the last tensor of a file is made. A library that reads files another way is followed all the same, for more memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

SMALL = 4096
"""Bytes below which a tensor is made at once: a thousand of them are nothing, and libraries look at what is in them."""

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.clone.default)
_OVERWRITES = (
    _aten.copy_.default, _aten.zero_.default, _aten.fill_.Scalar, _aten.normal_.default, _aten.uniform_.default,
)  # fmt: skip


@dataclass(frozen=True)
class _View:
    """A tensor as a view of a storage."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass
class _Operation:
    """One that wrote to a storage."""

    function: Any
    arguments: list[Any]
    """Flat; tensors as `_View`."""
    spec: Any
    outputs: list[_View | None]
    random: Tensor | None
    """State of the generator before it."""


@dataclass
class _Writers:
    """Of a storage: what wrote to it, in order."""

    numbers: list[int] = field(default_factory=list)
    nbytes: int = 0


def is_lazy(tensor: Tensor) -> bool:
    """Whether a tensor has a record in place of values."""
    return isinstance(tensor, FakeTensor)


def suspended() -> AbstractContextManager[Any]:
    """For a while tensors are made as ever: of models that are thrown away."""
    return _disable_current_modes()  # type: ignore[no-any-return]


class Recording(TorchDispatchMode):
    """Records what is done to large tensors on the CPU while it is entered; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._operations: list[_Operation] = []
        self._writers: dict[int, _Writers] = {}
        self._constants: dict[int, Tensor] = {}
        """By fake storage: the real tensor that it stands for."""
        self._versions: dict[int, int] = {}
        self._of_constant: dict[int, FakeTensor] = {}
        self._kept: dict[int, Any] = {}
        """Fake storages: their addresses are their names."""
        self._environment: str | None = None

    def __enter__(self) -> Recording:
        # Modes belong to a thread, and transformers would read files in others.
        self._environment = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        if self._environment is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = self._environment
        self._of_constant.clear()

    # Recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        if any(not is_lazy(t) and t.device.type != "cpu" for t in tensors):
            return func(*args, **kwargs)
        if tensors:
            lazy = any(is_lazy(t) for t in tensors)
            written = [flat[i] for i in _written(func, args, kwargs)]
            if any(not is_lazy(t) for t in written):  # a tensor that is there gets values: they are made
                return func(*args, **kwargs) if not lazy else self._now(func, flat, spec)
            if not lazy and all(_nbytes(t) < SMALL for t in tensors):
                return func(*args, **kwargs)
        elif not self._makes_much(func, args, kwargs):
            return func(*args, **kwargs)
        else:
            written = []
        flat = [self._fake_of(value) if isinstance(value, Tensor) else value for value in flat]
        args, kwargs = tree_unflatten(flat, spec)
        try:
            with self._fakes if not tensors else nullcontext():
                outputs = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._now(func, flat, spec)
        self._record(func, flat, spec, written, outputs)
        return outputs

    def _makes_much(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation without tensors makes a large one, on the CPU."""
        if torch.device(kwargs.get("device") or "cpu").type != "cpu" or not func._schema.returns:
            return False
        if str(func._schema.returns[0].type) != "Tensor":
            return False
        with self._fakes:
            return _nbytes(func(*args, **kwargs)) >= SMALL

    def _fake_of(self, tensor: Tensor) -> FakeTensor:
        """What stands for a real tensor; a lazy one as it is."""
        if isinstance(tensor, FakeTensor):
            return tensor
        found = self._of_constant.get(id(tensor))
        if found is not None:
            return found
        # Small ones may be written to later; of large ones no copy is made, and none may have been written to (`_constant`).
        kept = tensor if _nbytes(tensor) >= SMALL else tensor.detach().clone()
        with torch.no_grad():
            fake: Any = self._fakes.from_tensor(kept.detach())
        key = _key(fake)
        self._constants[key], self._versions[key] = kept, kept._version
        self._kept[key] = fake.untyped_storage()
        if kept is tensor:
            self._of_constant[id(tensor)] = fake
        return fake  # type: ignore[no-any-return]

    def _record(self, func: Any, flat: list[Any], spec: Any, written: list[Tensor], outputs: Any) -> None:
        inside = {_key(t) for t in flat if isinstance(t, Tensor)}
        made = [t if isinstance(t, Tensor) else None for t in tree_flatten(outputs)[0]]
        storages = {_key(t): t for t in [*written, *(t for t in made if t is not None and _key(t) not in inside)]}
        if not storages:
            return  # a view
        random = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            random = self._draw(func, flat, spec)
        number = len(self._operations)
        self._operations.append(
            _Operation(
                func, [_view(value) if isinstance(value, Tensor) else value for value in flat], spec,
                [None if t is None or _key(t) in inside else _view(t) for t in made], random,
            )
        )  # fmt: skip
        for key, tensor in storages.items():
            self._kept[key] = tensor.untyped_storage()
            self._writers.setdefault(key, _Writers(nbytes=tensor.untyped_storage().nbytes())).numbers.append(number)

    def _draw(self, func: Any, flat: list[Any], spec: Any) -> Tensor:
        """Draws what a random operation would, for the generator's sake; returns its state before that."""
        generator = next((value for value in flat if isinstance(value, torch.Generator)), torch.default_generator)
        state = generator.get_state()
        scratch = [
            torch.empty_strided(t.size(), t.stride(), dtype=t.dtype).zero_() if isinstance(t, Tensor) else t
            for t in flat
        ]
        args, kwargs = tree_unflatten(scratch, spec)
        func(*args, **kwargs)
        return state

    def _now(self, func: Any, flat: list[Any], spec: Any) -> Any:
        """Runs an operation for its values."""
        args, kwargs = tree_unflatten(
            [self.whole(value) if isinstance(value, Tensor) else value for value in flat], spec
        )
        return func(*args, **kwargs)

    # Making

    def whole(self, tensor: Tensor) -> Tensor:
        """The values of a lazy tensor, all of them; another tensor as it is."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        with torch.no_grad(), _disable_current_modes():
            return self._make(_view(tensor)).clone()

    def rows(self, tensor: Tensor, start: int, number: int) -> Tensor:
        """``number`` rows (first dimension) from ``start`` of a lazy tensor; views of a file where they are in one.

        Raises:
            RuntimeError: a tensor that values were taken from was written to since.
        """
        with torch.no_grad(), _disable_current_modes():
            found = self._source(_view(tensor))
            if found is None:
                return self._make(_view(tensor)).narrow(0, start, number)
            values, dtypes = found
            values = values.narrow(0, start, number)
            for dtype in reversed(dtypes):
                values = values.to(dtype)
            return values

    def sources(self, tensor: Tensor) -> set[int]:
        """Names of the constants that a lazy tensor is made of, for `forget`."""
        view = _view(tensor)
        found = {view.storage}
        for number in self._needed(view.storage):
            found |= {v.storage for v in self._operations[number].arguments if isinstance(v, _View)}
        return found & self._constants.keys()

    def place(self, source: int) -> int:
        """Where in memory a constant begins: those of one file are side by side."""
        return self._constants[source].data_ptr()

    def forget(self, source: int) -> None:
        """Gives up a constant, and with the last one of a file its mapping into memory."""
        del self._constants[source]

    def _constant(self, view: _View) -> Tensor:
        constant = self._constants[view.storage]
        if constant._version != self._versions[view.storage]:
            raise RuntimeError(
                f"a tensor of shape {tuple(constant.shape)} was written to after its values were recorded"
            )
        return _real(constant.untyped_storage(), view)

    def _source(self, view: _View) -> tuple[Tensor, list[torch.dtype]] | None:
        """The constant that a tensor is a copy of, and the precisions on the way, the last first; None if it is more."""
        dtypes: list[torch.dtype] = []
        before = len(self._operations)
        while view.storage not in self._constants:
            numbers = self._writers[view.storage].numbers
            if numbers[-1] >= before:  # written to after it was copied
                return None
            operation = self._operations[numbers[-1]]
            views = [v for v in operation.arguments if isinstance(v, _View)]
            if operation.function in _COPIES and len(numbers) == 1 and operation.outputs == [view]:
                (source,) = views
            elif operation.function is _aten.copy_.default and views[0] == view:
                source = views[1]
            else:
                return None
            if source.size != view.size:
                return None
            dtypes.append(view.dtype)
            before, view = numbers[-1], source
        return self._constant(view), dtypes

    def _needed(self, storage: int) -> list[int]:
        """Operations that make the values of a storage, in order."""
        found: set[int] = set()
        wanted = [(storage, len(self._operations))]
        while wanted:
            key, before = wanted.pop()
            if key in self._constants or key not in self._writers:
                continue
            writers = self._writers[key]
            numbers = [n for n in writers.numbers if n < before]
            for i in range(len(numbers) - 1, 0, -1):  # but the first, which makes it
                operation = self._operations[numbers[i]]
                own = operation.arguments[0]
                if operation.function in _OVERWRITES and _size(own) == writers.nbytes and own.offset == 0:
                    numbers = [numbers[0], *numbers[i:]]
                    break
            for number in numbers:
                if number not in found:
                    found.add(number)
                    arguments = self._operations[number].arguments
                    wanted += [(v.storage, number) for v in arguments if isinstance(v, _View) and v.storage != key]
        return sorted(found)

    def _make(self, view: _View) -> Tensor:
        if view.storage in self._constants:
            return self._constant(view)
        storages: dict[int, Any] = {}

        def real(value: Any) -> Any:
            if not isinstance(value, _View):
                return value
            if value.storage in self._constants:
                return self._constant(value)
            return _real(storages[value.storage], value)

        for number in self._needed(view.storage):
            operation = self._operations[number]
            arguments = [real(value) for value in operation.arguments]
            args, kwargs = tree_unflatten(arguments, operation.spec)
            with _generator_at(operation.random, arguments) as replaced:
                outputs = operation.function(*args, **{**kwargs, **replaced})
            for expected, output in zip(operation.outputs, tree_flatten(outputs)[0], strict=True):
                if expected is not None:
                    storages[expected.storage] = _as(output, expected)
        return _real(storages[view.storage], view)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _size(view: _View) -> int:
    number = 1
    for size in view.size:
        number *= size
    return number * view.dtype.itemsize


def _view(tensor: Tensor) -> _View:
    size, stride = tuple(int(n) for n in tensor.size()), tuple(int(n) for n in tensor.stride())
    return _View(_key(tensor), size, stride, int(tensor.storage_offset()), tensor.dtype)


def _real(storage: Any, view: _View) -> Tensor:
    return torch.empty(0, dtype=view.dtype, device="cpu").set_(storage, view.offset, view.size, view.stride)


def _as(output: Tensor, view: _View) -> Any:
    """The storage of an output, laid out as was recorded."""
    assert (output.dtype, tuple(output.shape)) == (view.dtype, view.size), (output.dtype, output.shape, view)
    if output.stride() != view.stride or output.storage_offset() != view.offset:
        length = view.offset + 1 + sum((n - 1) * step for n, step in zip(view.size, view.stride, strict=True))
        storage = torch.empty(length, dtype=view.dtype, device="cpu").untyped_storage()
        _real(storage, view).copy_(output)
        return storage
    return output.untyped_storage()


def _written(func: Any, args: Any, kwargs: Any) -> list[int]:
    """Places, among the flat arguments, of tensors that an operation writes to."""
    schema = func._schema.arguments
    found: list[int] = []
    place = 0
    names = [argument.name for argument in schema[: len(args)]] + list(kwargs)
    writes = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
    for name, value in zip(names, [*args, *kwargs.values()], strict=True):
        leaves = tree_flatten(value)[0]
        if name in writes:
            found += [place + i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        place += len(leaves)
    return found


@contextmanager
def _generator_at(state: Tensor | None, arguments: list[Any]) -> Iterator[dict[str, Any]]:
    """The generator of an operation as it was; yields what replaces arguments."""
    if state is None:
        yield {}
        return
    if any(isinstance(value, torch.Generator) for value in arguments):
        generator = torch.Generator()
        generator.set_state(state)
        yield {"generator": generator}
        return
    now = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield {}
    finally:
        torch.set_rng_state(now)


class Deferred:
    """A model's parameters, to be made a share at a time, when the model has been taken apart among processes."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        """Leaves ``model`` with parameters on the meta device, tied as they were, and real buffers.

        Args:
            model: built while ``recording`` was on.
            recording: no longer on.
        """
        self._recording = recording
        self._values: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        meta: dict[int, nn.Parameter] = {}
        for module_name, module in model.named_modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if id(parameter) not in meta:
                    full = f"{module_name}.{name}" if module_name else name
                    empty = torch.empty_strided(
                        parameter.size(), parameter.stride(), dtype=parameter.dtype, device="meta"
                    )
                    replaced = meta[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                    self._values[full], self._names[id(replaced)] = parameter, full
                module._parameters[name] = meta[id(parameter)]
        buffers: dict[int, Tensor] = {}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and is_lazy(buffer):  # each process needs them whole
                    module._buffers[name] = buffers.setdefault(id(buffer), recording.whole(buffer))

    @property
    def names(self) -> Iterable[str]:
        """Of parameters, tied ones by the first of theirs."""
        return self._values.keys()

    def whole(self, tensor: Tensor) -> Tensor:
        """The values of a parameter on the meta device; another tensor as it is."""
        name = self._names.get(id(tensor))
        return tensor if name is None else self._recording.whole(self._values[name]).detach()

    def fill(self, targets: Mapping[str, tuple[int, int, Callable[[Tensor], Any]]]) -> None:
        """Makes all parameters once, rows of them, file by file, and gives each up behind it.

        Args:
            targets: by name, of all of `names`: first row and number of rows that are wanted, and who takes them. Of
                tensors without dimensions, 0 and 1.
        """
        recording, values = self._recording, self._values
        sources = {name: recording.sources(v) if is_lazy(v) else set() for name, v in values.items()}
        uses: dict[int, int] = {}
        for of_one in sources.values():
            for source in of_one:
                uses[source] = uses.get(source, 0) + 1
        order = sorted(values, key=lambda name: max(map(recording.place, sources[name]), default=0))
        for name in order:
            value = values.pop(name)
            start, number, take = targets[name]
            if number:
                if not is_lazy(value) or value.ndim == 0:
                    whole = recording.whole(value).detach()
                    take(whole.narrow(0, start, number) if whole.ndim else whole)
                else:
                    take(recording.rows(value, start, number))
            del value
            for source in sources.pop(name):
                uses[source] -= 1
                if not uses[source]:
                    recording.forget(source)
