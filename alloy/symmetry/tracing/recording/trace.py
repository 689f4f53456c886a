"""Trace a model: run it on examples, without values where that can be done, and join the logs.

Fake tensors (shapes without values) are tried first: they need no weights and no compute. Where a
model reads values (`.item()`, a mask that chooses a path), the forward is repeated with the real
ones.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from alloy.devices import beside
from alloy.errors import SymmetryError
from alloy.symmetry.tracing.recording.kernels import plain_kernels
from alloy.symmetry.tracing.recording.log import Log
from alloy.symmetry.tracing.recording.observe import Observe
from alloy.symmetry.tracing.recording.recorder import Reads, Recorder
from alloy.symmetry.tracing.recording.refusals import refuse_untraceable

Inputs = Mapping[str, Any]

_EXPLORATIONS = 8


def listed_examples(example_inputs: Inputs | Sequence[Inputs]) -> list[Inputs]:
    """Examples as a list, whether one or several were given."""
    several = isinstance(example_inputs, Iterable) and not isinstance(example_inputs, Tensor)
    one = isinstance(example_inputs, Mapping)
    examples = [example_inputs] if one else list(example_inputs) if several else []
    if not examples or not all(isinstance(example, Mapping) for example in examples):
        raise SymmetryError(
            "example_inputs must be a dict of the model's keyword arguments, or a list of such "
            f"dicts; given: {type(example_inputs).__name__}"
        )
    return examples


def trace(model: nn.Module, example_inputs: Inputs | Sequence[Inputs], observe: Observe) -> Log:
    """Run the model on each example and join the logs. Raises SymmetryError if that fails."""
    refuse_untraceable(model)
    given = listed_examples(example_inputs)
    examples: list[Inputs] = [beside(model, example) for example in given]
    log = _trace(model, examples, observe)
    reached = log.reached()
    if not any(root.id in reached for root in log.roots):
        shapes = ", ".join(str(list(root.shape)) for root in log.roots)
        raise SymmetryError(
            f"no weight reaches the observed outputs (of shapes {shapes}): they depend on the "
            "inputs alone, and say nothing of the model. Pass observe=, a function from the output "
            "to the tensors that count"
        )
    return log


def _trace(model: nn.Module, examples: list[Inputs], observe: Observe) -> Log:
    with plain_kernels(model):
        try:
            with _unchanged(model):
                return _trace_fake(model, examples, observe)
        except Exception as failure:  # the real forward decides whether anything is wrong
            if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
                raise SymmetryError(
                    f"the model has no weights and cannot be traced without them: {_say(failure)}. "
                    "Load its weights, or pass example inputs whose path does not depend on data"
                ) from failure
        return _trace_real(model, examples, observe)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Generator[None]:
    """Undo what a forward without values leaves behind: attributes, caches, log lines."""
    attributes = [
        (vars(module), {k: (v, _copied(v)) for k, v in vars(module).items()})
        for module in model.modules()
    ]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for current, before in attributes:
            for name, value in list(current.items()):
                if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(value)):
                    continue
                if name not in before:
                    del current[name]
                    continue
                current[name], content = before[name]
                if isinstance(value, dict):
                    value.clear()
                    value.update(content)
                elif isinstance(value, list):
                    value[:] = content
        sources = {type(module).__module__ for module in model.modules()}
        for source in sources:
            for function in list(vars(sys.modules[source]).values()):
                cells = getattr(function, "__closure__", None) or ()
                for cached in (function, *(cell.cell_contents for cell in cells)):
                    if hasattr(cached, "cache_clear") and hasattr(cached, "__wrapped__"):
                        cached.cache_clear()


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list)) else value


def _say(failure: BaseException) -> str:
    notes = " ".join(getattr(failure, "__notes__", []))
    return (
        f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''} {notes}"
    )


def _trace_real(model: nn.Module, examples: list[Inputs], observe: Observe) -> Log:
    log = Log()
    recorder = Recorder(model, log)
    _register_weights(recorder, model, {})
    _register_buffers(recorder, dict(model.named_buffers()), lambda buffer: buffer)
    try:
        with torch.random.fork_rng(), Reads(recorder):
            torch.manual_seed(0)
            _run(recorder, model, examples, observe)
            _explore(recorder, model, examples, observe)
    except SymmetryError:
        raise
    except Exception as failure:
        raise SymmetryError(f"the model's forward failed: {_say(failure)}") from failure
    return log


def _explore(
    recorder: Recorder, model: nn.Module, examples: list[Inputs], observe: Observe
) -> None:
    """Try other weights until all are reached, where data decides the path (routing)."""
    log = recorder.log
    generator = torch.Generator().manual_seed(0)

    def unread() -> set[int]:
        return log.trainable - {v.id for call in log.calls for v in call.tensors()}

    for _ in range(_EXPLORATIONS):
        missing = unread()
        if not missing or not log.read:
            return
        with _swapped(model, lambda tensor: _redrawn(recorder, tensor, generator)):
            _run(recorder, model, examples, observe)


def _redrawn(recorder: Recorder, tensor: Any, generator: torch.Generator) -> Any:
    """Another draw of a matrix, known to the log as the same weight."""
    if not isinstance(tensor, nn.Parameter) or tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    other = nn.Parameter(
        (noise * tensor.detach().float().square().mean().sqrt()).to(tensor), requires_grad=False
    )
    recorder.register(other, as_value=recorder.value(tensor))
    return other


def _trace_fake(model: nn.Module, examples: list[Inputs], observe: Observe) -> Log:
    log = Log(fake=True)
    recorder = Recorder(model, log)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in memo:
            if tensor.is_meta:
                with mode:
                    memo[id(tensor)] = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                    )
            else:
                memo[id(tensor)] = mode.from_tensor(tensor)
        return memo[id(tensor)]

    examples = [tree_map(fake, dict(example)) for example in examples]
    buffers = dict(model.named_buffers())
    with _swapped(model, fake), mode:
        _register_weights(recorder, model, memo)
        _register_buffers(recorder, buffers, fake)
        _run(recorder, model, examples, observe)
    return log


@contextlib.contextmanager
def _swapped(model: nn.Module, replace: Callable[[Any], Any]) -> Generator[None]:
    """Exchange all parameters and buffers for a while; ties stay ties."""
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            saved.append((table, dict(table)))
            for name, tensor in list(table.items()):
                table[name] = replace(tensor)
    try:
        yield
    finally:
        for table, tensors in saved:
            for name, tensor in tensors.items():
                table[name] = tensor


def _register_weights(recorder: Recorder, model: nn.Module, fakes: Mapping[int, Tensor]) -> None:
    """Give the state dict its values; a real weight and its fake twin are one."""
    originals = {id(twin): number for number, twin in fakes.items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        value = recorder.value(tensor)
        recorder.log.weights[name] = value
        if value.floating:
            recorder.log.trainable.add(value.id)
        if id(tensor) in originals:
            recorder.values[originals[id(tensor)]] = value


def _register_buffers(
    recorder: Recorder, buffers: Mapping[str, Tensor], twin: Callable[[Tensor], Tensor]
) -> None:
    """Keep the names of buffers, and the numbers of finished tables where there are any."""
    for name, buffer in buffers.items():
        value = recorder.log.tables[name] = recorder.value(twin(buffer))
        if buffer.is_floating_point() and not buffer.is_meta:
            recorder.log.buffers[value.id] = buffer


def _run(recorder: Recorder, model: nn.Module, examples: list[Inputs], observe: Observe) -> None:
    log = recorder.log
    with torch.no_grad(), recorder.naming_modules():
        for example in examples:
            log.inputs.update(
                recorder.value(t).id for t in tree_leaves(dict(example)) if isinstance(t, Tensor)
            )
            try:
                with recorder:
                    output = model(**example)
                    observed = observe(output)
            except Exception as failure:
                failure.add_note(f"(after {recorder.last})")
                raise
            tensors = [t for t in tree_leaves(observed) if isinstance(t, Tensor)]
            if not tensors:
                raise SymmetryError(
                    f"nothing to observe in the model's output {type(output).__name__}: pass "
                    "observe=, a function from the output to the tensors that count"
                )
            log.roots += [recorder.value(t) for t in tensors]
