"""Computation of one tensor: by a compiled loop if there is one, else by the method's function.

Both give the same bits, except the mixtures on the sphere: their inner products are summed in
another order, which float32 coefficients hide almost always (tests/alloy/checkpoint/test_kernels.py
says how often).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

import alloy.checkpoint.engine.kernels as kernels
from alloy.checkpoint.adapter.compute import Input
from alloy.checkpoint.engine.accelerator import Accelerator
from alloy.checkpoint.engine.guess import Guess, guess_thresholds, kth_largest
from alloy.checkpoint.engine.steps import Rows, as_float, mapped_dtype
from alloy.checkpoint.format import ITEM_BYTES, Entry
from alloy.checkpoint.ranges.files import elsewhere
from alloy.checkpoint.tensors import TORCH_DTYPES, load_tensor
from alloy.errors import MergeError
from alloy.merging import MergeMethod, MergeSettings

_ELECTIONS = ("mass", "weighted mass", "count")
_KEEP_NOTHING = (0xFFFFFFFF, 0)
_KEEP_EVERYTHING = (0, 0xFFFFFFFF)


@dataclass(frozen=True)
class Tensors:
    """Inputs of a tensor, with the sources' names for messages."""

    name: str
    inputs: tuple[Entry, ...]
    sources: tuple[str, ...]
    dtype: str
    """Of the output."""
    shape: tuple[int, ...]
    """Of the output; the inputs' may have other numbers of rows where vocabularies differ."""
    mapped: bool = False
    """Rows are looked up by token."""

    @property
    def row_dtypes(self) -> list[str]:
        """Of the inputs as they are read."""
        if self.mapped:
            return [mapped_dtype(self.inputs)] * len(self.inputs)
        return [entry.dtype for entry in self.inputs]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def kind(self) -> int:
        return kernels.KINDS[self.inputs[0].dtype]

    @property
    def out_kind(self) -> int:
        return kernels.KINDS[self.dtype]

    @property
    def compiled(self) -> bool:
        """True if the kernels read and write these dtypes."""
        dtypes = {entry.dtype for entry in self.inputs}
        return len(dtypes) == 1 and dtypes | {self.dtype} <= kernels.KINDS.keys()

    def blame(self, rows: Rows, start: int) -> MergeError:
        """The error for a chunk whose result is not finite."""
        read = zip(rows, self.row_dtypes, self.inputs, self.sources, strict=True)
        for row, dtype, entry, source in read:
            values = as_float(row, dtype)
            if not np.isfinite(values).all():
                index = start + int(np.flatnonzero(~np.isfinite(values))[0])
                return MergeError(
                    f"{self.name} in {source!r} ({entry.origin}) "
                    f"has NaN or Inf at flat index {index}; repair or replace that checkpoint"
                )
        return MergeError(
            f"{self.name}: the result leaves the range of {self.dtype}; "
            "lower the coefficients or ask for dtype='float32'"
        )


class _Work:
    """Defaults: one pass, cut anywhere."""

    num_measures = 0
    chunked = True
    alignment = 1

    def measure(self, round_: int, rows: Rows, start: int) -> None:
        raise AssertionError("only what was guessed is settled")

    def prepare(self, round_: int) -> None:
        raise NotImplementedError

    def compute(self, rows: Rows, start: int, out: np.ndarray) -> None:
        raise NotImplementedError

    def memory(self, num_bytes: int) -> np.ndarray | None:
        return None

    def guess(self, inputs: Sequence[Input]) -> bool:
        return False

    def settle(self, outs: Mapping[int, np.ndarray]) -> bool:
        raise NotImplementedError


class Copy(_Work):
    """The bytes of one source, or of several that must agree."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors

    def compute(self, rows: Rows, start: int, out: np.ndarray) -> None:
        tensors = self.tensors
        for row, source in zip(rows[1:], tensors.sources[1:], strict=True):
            if not np.array_equal(row, rows[0]):
                raise MergeError(
                    f"{tensors.name} is {tensors.dtype} and differs "
                    f"between {tensors.sources[0]!r} and {source!r}; "
                    f"say whose to take: copy={{{tensors.name!r}: {tensors.sources[0]!r}}}"
                )
        dtype = tensors.inputs[0].dtype
        if dtype in kernels.KINDS and not kernels.is_finite(rows[0], kernels.KINDS[dtype]):
            raise tensors.blame(rows, start)
        if dtype == "F64" and not np.isfinite(rows[0].view(np.float64)).all():
            raise tensors.blame(rows, start)
        if dtype == tensors.dtype:
            out[:] = rows[0]
        else:
            _convert(tensors, rows, start, out)


class Held(_Work):
    """A tensor that was merged already, by a method that runs the whole model."""

    def __init__(self, tensors: Tensors, merged: Mapping[str, Any]):
        self.tensors, self.merged = tensors, merged

    def compute(self, rows: Rows, start: int, out: np.ndarray) -> None:
        import torch

        data = self.merged[self.tensors.name].flatten().view(torch.uint8).numpy()
        first = start * ITEM_BYTES[self.tensors.dtype]
        out[:] = data[first : first + len(out)]


class Mix(_Work):
    """A linear combination: of the models, or of the task vectors added to their base."""

    def __init__(self, tensors: Tensors, coefficients: Sequence[float], *, base: bool):
        self.tensors, self.base = tensors, base
        self.coefficients = np.array(coefficients, np.float32)

    def compute(self, rows: Rows, start: int, out: np.ndarray) -> None:
        tensors = self.tensors
        assert isinstance(rows, np.ndarray), "compiled inputs have one dtype"
        if not kernels.mix(rows, tensors.kind, self.coefficients, self.base, out, tensors.out_kind):
            raise tensors.blame(rows, start)


class Mixture(Mix):
    """A linear combination by coefficients that follow from the whole tensor's inner products."""

    num_measures = 1
    alignment = kernels.REDUCTION

    def __init__(self, tensors: Tensors, method: MergeMethod, keywords: dict, *, base: bool):
        n = len(tensors.inputs) - base
        super().__init__(tensors, [0.0] * n, base=base)
        reductions = -(-tensors.num_elements // kernels.REDUCTION)
        self.method, self.keywords = method, keywords
        self.sums = np.zeros((reductions, n, n))

    def measure(self, round_: int, rows: Rows, start: int) -> None:
        first = start // kernels.REDUCTION
        kernels.inner_products(rows, self.tensors.kind, self.base, self.sums[first:])

    def prepare(self, round_: int) -> None:
        import torch

        inner = np.add.accumulate(self.sums, axis=0)[-1]  # in order, unlike a pairwise sum
        if np.isfinite(inner).all():
            assert self.method.mix is not None, "only mixtures come here"
            mixture = self.method.mix(torch.from_numpy(inner), **self.keywords)
            self.coefficients = mixture.float().numpy()
        # otherwise an input is not finite, and so is its multiple by zero: `compute` finds it


class Sparse(_Work):
    """Task vectors thinned out and added, or put to a vote, by one compiled loop."""

    def __init__(self, tensors: Tensors, settings: MergeSettings):
        options = settings.options_of(tensors.name)
        n = len(tensors.inputs) - 1
        self.tensors = tensors
        self.coefficients = np.array(settings.coefficients[tensors.name], np.float32)
        self.trims = np.zeros((0, 2), np.uint32)
        self.drops = np.zeros((0, 2), np.uint64)
        self.factor = np.float32(1)
        self.election = _ELECTIONS.index(options["election"]) if "election" in options else -1
        self.normalize = bool(options.get("normalize", False))
        self.scale = np.float32(options.get("scale", 1.0))
        self.num_models = n

    def compute(self, rows: Rows, start: int, out: np.ndarray) -> None:
        tensors = self.tensors
        if not kernels.sparse(
            rows, tensors.kind, self.coefficients, self.trims, self.drops, self.factor, start,
            self.election, self.normalize, self.scale, out, tensors.out_kind,
        ):  # fmt: skip
            raise tensors.blame(rows, start)


class Drop(Sparse):
    """DARE: which entries survive follows from the seed, the names and the indices."""

    def __init__(self, tensors: Tensors, settings: MergeSettings):
        from alloy.merging.randomness import stream_key

        super().__init__(tensors, settings)
        options = settings.options_of(tensors.name)
        density, seed = options["density"], options["seed"]
        limit = int(np.ceil(density * 2.0**32))  # an integer is below a number if below its ceiling
        keys = [stream_key(seed, tensors.name, i) for i in range(self.num_models)]
        self.drops = np.array([(key, limit) for key in keys], np.uint64)
        self.factor = np.float32(1 / density if options["rescale"] else 1.0)


class Trim(Sparse):
    """TIES and Breadcrumbs: the magnitudes to keep are determined exactly, from their histogram.

    TIES needs one threshold a model. A sample brackets it, so that one pass can merge: it keeps all
    that reaches the bracket, counts what exceeds it and lists the few elements within. These decide
    on the exact threshold and are then merged again. Where the sample misled, the tensor is
    measured as a whole.
    """

    def __init__(self, tensors: Tensors, settings: MergeSettings):
        super().__init__(tensors, settings)
        self.ranks = _ranks(settings.name, settings.options_of(tensors.name), tensors.num_elements)
        self.trims = np.array([_KEEP_EVERYTHING] * self.num_models, np.uint32)
        if isinstance(self.ranks, tuple):
            rounds = 2 if tensors.inputs[0].dtype == "F32" else 1
            self.num_measures = rounds
            self.counts = np.zeros((self.num_models, kernels.NUM_MAGNITUDES), np.int64)
        elif not self.ranks:
            self.trims = np.array([_KEEP_NOTHING] * self.num_models, np.uint32)
        self._guess: Guess | None = None
        self._lock = threading.Lock()

    def guess(self, inputs: Sequence[Input]) -> bool:
        if isinstance(self.ranks, tuple) and len(self.ranks) == 1:
            tensors = self.tensors
            self._guess = guess_thresholds(
                inputs, tensors.num_elements, tensors.kind, self.ranks[0]
            )
        return self._guess is not None

    def compute(self, rows: Rows, start: int, out: np.ndarray) -> None:
        if self._guess is None:
            super().compute(rows, start, out)
            return
        tensors, guess = self.tensors, self._guess
        assert isinstance(rows, np.ndarray), "compiled inputs have one dtype"
        words = rows.view(f"u{kernels.item_bytes(tensors.kind)}")
        positions = guess.space(words)
        counts = np.zeros((self.num_models, 2), np.int64)
        halves = tensors.kind == tensors.out_kind == kernels.BF16
        if halves and self.num_models <= 3 and self.election < 2:
            listed = np.empty((len(words), len(positions)), np.uint16)
            finite, count = kernels.vote_in_brackets(
                words, self.coefficients, guess.brackets, self.election == 1, self.normalize,
                self.scale, out.view(np.uint16), counts, positions, listed,
            )  # fmt: skip
        else:
            finite, count = kernels.sparse_in_brackets(
                rows, tensors.kind, self.coefficients, guess.brackets, self.election,
                self.normalize, self.scale, out, tensors.out_kind, counts, positions,
            )  # fmt: skip
            listed = words[:, positions[: max(count, 0)]]
        # what is not finite may be due to an element in doubt: `settle` then has it measured
        guess.add(start, counts, positions, listed, count if finite else -1)

    def settle(self, outs: Mapping[int, np.ndarray]) -> bool:
        assert self._guess is not None, "settled after a guess"
        guess, self._guess = self._guess, None
        thresholds = guess.thresholds()
        if thresholds is None:
            return False
        self._keep_from(thresholds)
        item = ITEM_BYTES[self.tensors.dtype]
        for start, positions, rows in guess.doubts:
            values = np.empty(len(positions) * item, np.uint8)
            super().compute(rows, start, values)
            outs[start].view(f"u{item}")[positions] = values.view(f"u{item}")
        return True

    def measure(self, round_: int, rows: Rows, start: int) -> None:
        counts = np.zeros_like(self.counts)
        if round_ == 0:
            kernels.count_magnitudes(rows, self.tensors.kind, counts)
        else:
            kernels.count_lower_halves(rows, self.bins, counts)
        with self._lock:
            self.counts += counts

    def prepare(self, round_: int) -> None:
        assert isinstance(self.ranks, tuple)
        if round_ == 0:
            # per model and rank: the bin, and how many of it are larger than what is looked for
            places = [[kth_largest(count, k) for k in self.ranks] for count in self.counts]
            self.bins = np.array([[bin_ for bin_, _ in row] for row in places], np.int64)
            self.remaining = [[k for _, k in row] for row in places]
            values = self.bins
            self.counts = np.zeros((*self.bins.shape, 1 << 16), np.int64)
        else:
            values = np.array(
                [
                    [
                        (bin_ << 16) + kth_largest(count, k)[0]
                        for bin_, count, k in zip(bins, counts, ks, strict=True)
                    ]
                    for bins, counts, ks in zip(self.bins, self.counts, self.remaining, strict=True)
                ],
                np.int64,
            )
        self._keep_from(values[:, 0])
        if len(self.ranks) == 2:
            self.trims[:, 1] = values[:, 1]

    def _keep_from(self, lowest: np.ndarray) -> None:
        self.trims = np.stack([lowest, np.full(len(lowest), 0xFFFFFFFF)], 1).astype(np.uint32)


class Function(_Work):
    """The method's own function, in torch."""

    def __init__(
        self,
        tensors: Tensors,
        settings: MergeSettings,
        *,
        base: bool,
        statistics: Callable[[str], Sequence[Any] | None] | None,
        accelerator: Accelerator | None,
    ):
        self.tensors, self.settings, self.base, self.statistics = (
            tensors,
            settings,
            base,
            statistics,
        )
        self.chunked = settings.method.elementwise and statistics is None
        self.accelerator = None if self.chunked else accelerator

    def memory(self, num_bytes: int) -> np.ndarray | None:
        return None if self.accelerator is None else self.accelerator.memory(num_bytes)

    def compute(self, rows: Rows, start: int, out: np.ndarray) -> None:
        import torch

        tensors = self.tensors
        dtypes = [getattr(torch, TORCH_DTYPES[dtype]) for dtype in tensors.row_dtypes]
        values = [
            torch.from_numpy(row).view(dtype) for row, dtype in zip(rows, dtypes, strict=True)
        ]
        if not self.chunked:
            values = [value.reshape(tensors.shape) for value in values]
        if len(set(dtypes)) > 1:
            widest = torch.float64 if torch.float64 in dtypes else torch.float32
            values = [value.to(widest) for value in values]
        for value, entry, source in zip(values, tensors.inputs, tensors.sources, strict=True):
            if not bool(value.isfinite().all()):
                raise MergeError(
                    f"{tensors.name} in {source!r} ({entry.origin}) has NaN or Inf; repair or "
                    "replace that checkpoint"
                )
        measured = None if self.statistics is None else self.statistics(tensors.name)
        merge = partial(self._merged, start)
        if self.accelerator is None:
            merged = merge(values, measured)
        else:
            merged = self.accelerator.run(merge, values, measured, tensors.name)
        out[:] = merged.contiguous().flatten().view(torch.uint8).numpy()

    def _merged(self, start: int, values: Sequence[Any], measured: Sequence[Any] | None) -> Any:
        import torch

        from alloy.merging import merge_tensor

        return merge_tensor(
            self.settings,
            self.tensors.name,
            values[1:] if self.base else values,
            base=values[0] if self.base else None,
            statistics=measured,
            offset=start,
            dtype=getattr(torch, TORCH_DTYPES[self.tensors.dtype]),
        )


def merged_whole(
    tensors: Sequence[Tensors], settings: MergeSettings, data: Mapping[str, Any], *, base: bool
) -> dict[str, Any]:
    """All tensors of a method that runs the model, in memory; the sources stay mapped files."""
    import torch

    from alloy.merging.apply import merge_whole

    def sources(i: int) -> dict[str, torch.Tensor]:
        return {t.name: _mapped(t.inputs[i]) for t in tensors}

    models = [sources(i) for i in range(len(tensors[0].inputs))] if tensors else []
    first = models.pop(0) if base and models else None
    merged = merge_whole(settings, [t.name for t in tensors], models, first, data)
    dtypes = {t.name: getattr(torch, TORCH_DTYPES[t.dtype]) for t in tensors}
    return {name: tensor.to(dtypes[name]).contiguous() for name, tensor in merged.items()}


def _mapped(entry: Entry) -> Any:
    """A tensor whose memory is its file: read when used, given back when memory is short.

    One that an adapter changes, or that lies elsewhere, is held in memory.
    """
    import torch

    if entry.fold is not None or elsewhere(entry.file) is not None:
        return load_tensor(entry)
    if not entry.num_bytes:
        return torch.empty(entry.shape, dtype=getattr(torch, TORCH_DTYPES[entry.dtype]))
    pages = np.memmap(entry.file, np.uint8, "c", entry.start, (entry.num_bytes,))
    flat = torch.from_numpy(pages).clone() if entry.start % 8 else torch.from_numpy(pages)
    return flat.view(getattr(torch, TORCH_DTYPES[entry.dtype])).reshape(entry.shape)


def work_for(
    tensors: Tensors,
    settings: MergeSettings,
    *,
    base: bool,
    statistics: Callable[[str], Sequence[Any] | None] | None = None,
    compiled: bool = True,
    accelerator: Accelerator | None = None,
) -> partial[_Work]:
    """Choose how to merge a tensor; `compiled` False forces the method's own function."""
    method, options = settings.method, settings.options_of(tensors.name)
    by_model = any(method.options[k].by_model and isinstance(v, tuple) for k, v in options.items())
    if settings.name == "passthrough" and options["scale"] == 1:
        return partial(Copy, tensors)
    if compiled and tensors.compiled and statistics is None and not by_model:
        coefficients = settings.coefficients.get(tensors.name)
        match settings.name:
            case "linear" | "task_arithmetic":
                return partial(Mix, tensors, coefficients, base=base)
            case "passthrough":
                return partial(Mix, tensors, [options["scale"]], base=False)
            case "modality_arithmetic":
                row = [options["scale"]] * (len(tensors.inputs) - 1)
                return partial(Mix, tensors, row, base=True)
            case "ties" | "breadcrumbs" | "breadcrumbs_ties":
                return partial(Trim, tensors, settings)
            case "dare_linear" | "dare_ties":
                return partial(Drop, tensors, settings)
        if method.mixture is not None and options.get("vectors", "tensor") == "tensor":
            keywords = dict(options)
            if coefficients is not None:
                keywords["coefficients"] = coefficients
            return partial(Mixture, tensors, method, keywords, base=base)
    return partial(
        Function, tensors, settings, base=base, statistics=statistics, accelerator=accelerator
    )


def _ranks(method: str, options: Mapping[str, Any], num_elements: int) -> tuple[int, ...] | bool:
    """The ranks, from the largest, whose magnitudes bound what is kept; or whether all is kept."""
    density = options["density"]
    if method == "ties":
        if density >= 1 or density <= 0:
            return density >= 1
        return (max(1, int(density * num_elements)),)
    count = int(density * num_elements)
    outliers = int(options["gamma"] * num_elements)
    return (outliers + count, outliers + 1) if count else False


def _convert(tensors: Tensors, rows: Rows, start: int, out: np.ndarray) -> None:
    """One tensor in another dtype."""
    if tensors.compiled:
        assert isinstance(rows, np.ndarray), "compiled inputs have one dtype"
        one = np.ones(1, np.float32)
        if not kernels.mix(rows[:1], tensors.kind, one, False, out, tensors.out_kind):
            raise tensors.blame(rows, start)
        return
    import torch

    dtype = getattr(torch, TORCH_DTYPES[tensors.inputs[0].dtype])
    value = torch.from_numpy(rows[0]).view(dtype).to(getattr(torch, TORCH_DTYPES[tensors.dtype]))
    if not bool(value.isfinite().all()):
        raise tensors.blame(rows, start)
    out[:] = value.view(torch.uint8).numpy()
