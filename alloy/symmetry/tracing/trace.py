"""Write down every operation of a forward pass: which tensors went in, which came out.

The log is all that the rules see. Fake tensors (shapes without values) are tried first: they need no
weights and no compute. Where a model reads values (`.item()`, a mask that chooses a path), the forward
is repeated with the real ones.
"""

import contextlib
import logging
import sys
import types
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from alloy.errors import SymmetryError

Inputs = Mapping[str, Any]
Observe = Callable[[Any], Any]

_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)
_WHOLE_KERNELS = ("eager", "sdpa")  # attention that runs as operations the log can see
_EXPLORATIONS = 8
_SMALL = 4096  # values of integer constants up to this many elements are kept


class Value:
    """A tensor of the log: its shape and where its memory is, not its numbers."""

    __slots__ = ("boolean", "constant", "floating", "id", "place", "shape", "storage")

    def __init__(self, number: int, tensor: Tensor, storage: int) -> None:
        self.id = number
        self.shape = tuple(tensor.shape)
        self.floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        self.boolean = tensor.dtype == torch.bool
        self.storage = storage
        self.place = (tensor.stride(), tensor.storage_offset()) if storage >= 0 else None
        self.constant: list[int] | None = None  # of a small vector of integers, its numbers


@dataclass(slots=True)
class Call:
    """One operation: `inputs` by the schema's names, tensors replaced by Values."""

    operation: Any
    inputs: dict[str, Any]
    outputs: list[Value]
    module: str
    result: Any  # the outputs in the operation's own structure

    @property
    def name(self) -> str:
        return self.operation._schema.name.removeprefix("aten::")

    def tensors(self) -> Iterator[Value]:
        for argument in self.inputs.values():
            if isinstance(argument, Value):
                yield argument
            elif isinstance(argument, (list, tuple)):
                yield from (a for a in argument if isinstance(a, Value))


@dataclass
class Log:
    """What one or several forwards did. `roots` are the outputs that must not change."""

    calls: list[Call] = field(default_factory=list)
    weights: dict[str, Value] = field(default_factory=dict)
    trainable: set[int] = field(default_factory=set)  # ids of floating weights
    inputs: set[int] = field(default_factory=set)
    roots: list[Value] = field(default_factory=list)
    read: set[int] = field(default_factory=set)  # ids whose numbers left the log: `.item()`, numpy
    buffers: dict[int, Tensor] = field(default_factory=dict)  # floating buffers with their numbers
    fake: bool = False

    def mutated_storages(self) -> set[int]:
        return {v.storage for call in self.calls for v in written(call)}


_SCHEMAS: dict[Any, tuple[list[str], dict[str, Any], list[str]]] = {}


def _schema(operation: Any) -> tuple[list[str], dict[str, Any], list[str]]:
    """Argument names, defaults, and the names of arguments that are written to."""
    if operation not in _SCHEMAS:
        arguments = operation._schema.arguments
        _SCHEMAS[operation] = (
            [a.name for a in arguments],
            {a.name: a.default_value for a in arguments if a.has_default_value()},
            [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write],
        )
    return _SCHEMAS[operation]


def written(call: Call) -> Iterator[Value]:
    """The tensors that a call changes in place."""
    for name in _schema(call.operation)[2]:
        argument = call.inputs.get(name)
        for value in argument if isinstance(argument, (list, tuple)) else [argument]:
            if isinstance(value, Value):
                yield value


class _Recorder(TorchDispatchMode):
    """Appends every operation to a log. Tensors are kept alive, so that their ids stay unique."""

    def __init__(self, model: nn.Module, log: Log) -> None:
        super().__init__()
        self.log = log
        self.values: dict[int, Value] = {}
        self.kept: list[Tensor] = []
        self.places: dict[int, list[tuple[Value, Tensor]]] = {}  # storage -> values in it
        self.module_names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.last = "nothing"

    def value(self, tensor: Tensor) -> Value:
        known = self.values.get(id(tensor))
        if known is None or known.shape != tuple(tensor.shape):  # `unsqueeze_` reshapes in place
            return self._register(tensor)
        return known

    def _register(self, tensor: Tensor, *, as_value: Value | None = None) -> Value:
        storage = _storage_of(tensor)
        in_storage = self.places.setdefault(storage, [])
        if as_value is None:
            as_value = Value(len(self.kept), tensor, storage)
        self.values[id(tensor)] = as_value
        self.kept.append(tensor)
        in_storage.append((as_value, tensor))
        return as_value

    def unseen(self, tensor: Tensor) -> Value:
        """The value of an argument: a tensor with no history may share memory with a known one."""
        known = self.values.get(id(tensor))
        if known is not None and known.shape == tuple(tensor.shape):
            return known
        for value, other in self.places.get(_storage_of(tensor), ()):
            same_place = (other.stride(), other.storage_offset()) == (
                tensor.stride(),
                tensor.storage_offset(),
            )
            if same_place and value.shape == tuple(tensor.shape):
                return self._register(tensor, as_value=value)  # `.data`
        return self._register(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation = func
        kwargs = kwargs or {}
        if not isinstance(operation, torch._ops.OpOverload):
            raise SymmetryError(
                f"{operation} in {self._where()} runs code that cannot be traced: set attention to "
                "'sdpa' or 'eager' and use the model before torch.compile"
            )
        self.last = f"{operation} in {self._where()}"
        if operation.namespace == "prim":
            return operation(*args, **kwargs)
        names, defaults, _ = _schema(operation)
        inputs = dict(defaults)  # converted first: `unsqueeze_` reshapes its input
        for name, argument in [*zip(names, args, strict=False), *kwargs.items()]:
            inputs[name] = self._convert(argument)
        result = operation(*args, **kwargs)
        self._record(operation, args, inputs, result)
        return result

    def _where(self) -> str:
        return self.stack[-1] if self.stack else "the model"

    def _record(self, operation, args, inputs, result) -> None:
        outputs: list[Value] = []
        converted = self._convert_result(result, outputs)
        if not outputs and operation._schema.returns:
            self.log.read.update(v.id for v in _values(inputs.values()))
        if operation._schema.name == "aten::lift_fresh":
            _keep_constant(args[0], outputs[0])
        elif operation._schema.name == "aten::arange":
            numbers = [inputs.get(k) for k in ("start", "end", "step")]
            steps = [n for n in numbers if isinstance(n, int)]
            if steps and not outputs[0].floating and outputs[0].shape[0] <= _SMALL:
                outputs[0].constant = list(range(*steps))
        self.log.calls.append(Call(operation, inputs, outputs, self._where(), converted))

    def _convert(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.unseen(argument)
        if isinstance(argument, (list, tuple)):
            return [self._convert(a) for a in argument]
        return argument

    def _convert_result(self, result: Any, outputs: list[Value]) -> Any:
        if isinstance(result, Tensor):
            value = self.value(result)
            outputs.append(value)
            return value
        if isinstance(result, (list, tuple)):
            return [self._convert_result(r, outputs) for r in result]
        return result

    @contextlib.contextmanager
    def naming_modules(self) -> Generator[None]:
        """Know, at any time, which module runs."""

        def enter(module, _):
            self.stack.append(
                self.module_names.get(id(module), type(module).__name__) or "the model"
            )

        def leave(module, *_):
            if self.stack:
                self.stack.pop()

        hooks = nn.modules.module
        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Reads(TorchFunctionMode):
    """Notes tensors whose numbers are read without an operation, by numpy or into a list."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given: tuple[Any, ...] = tuple(args)
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr):
            self.recorder.log.read.add(self.recorder.unseen(given[0]).id)
        return func(*given, **(kwargs or {}))


def _values(arguments: Any) -> Iterator[Value]:
    for argument in arguments:
        if isinstance(argument, Value):
            yield argument
        elif isinstance(argument, list):
            yield from _values(argument)


def _storage_of(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
        return -id(tensor)


def _keep_constant(source: Tensor, value: Value) -> None:
    """Remember the numbers of an integer tensor that was written in the model's code."""
    small = source.ndim <= 1 and source.numel() <= _SMALL
    if small and not isinstance(source, FakeTensor) and not source.dtype.is_floating_point:
        value.constant = [int(x) for x in source.reshape(-1)]


def trace(model: nn.Module, example_inputs: Inputs | Sequence[Inputs], observe: Observe) -> Log:
    """Run the model on each example and join the logs. Raises SymmetryError naming op and module."""
    refuse_untraceable(model)
    examples = [example_inputs] if isinstance(example_inputs, Mapping) else list(example_inputs)
    if not examples or not all(isinstance(example, Mapping) for example in examples):
        raise SymmetryError(
            "example_inputs must be a dict of the model's keyword arguments, or a list of such dicts"
        )
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
    """Forget what a forward without values left behind: attributes, caches of functions, log lines."""
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
    recorder = _Recorder(model, log)
    _register_weights(recorder, model, {})
    _register_buffers(recorder, list(model.buffers()), list(model.buffers()))
    try:
        with torch.random.fork_rng(), _Reads(recorder):
            torch.manual_seed(0)
            _run(recorder, model, examples, observe)
            _explore(recorder, model, examples, observe)
    except SymmetryError:
        raise
    except Exception as failure:
        raise SymmetryError(f"the model's forward failed: {_say(failure)}") from failure
    return log


def _explore(
    recorder: _Recorder, model: nn.Module, examples: list[Inputs], observe: Observe
) -> None:
    """Where data decides the path (routing to experts), try other weights until all were reached."""
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


def _redrawn(recorder: _Recorder, tensor: Any, generator: torch.Generator) -> Any:
    """Another draw of a matrix, known to the log as the same weight."""
    if not isinstance(tensor, nn.Parameter) or tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    other = nn.Parameter(
        (noise * tensor.detach().float().square().mean().sqrt()).to(tensor), requires_grad=False
    )
    recorder._register(other, as_value=recorder.value(tensor))
    return other


def _trace_fake(model: nn.Module, examples: list[Inputs], observe: Observe) -> Log:
    log = Log(fake=True)
    recorder = _Recorder(model, log)
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
    buffers = list(model.buffers())
    with _swapped(model, fake), mode:
        _register_weights(recorder, model, memo)
        _register_buffers(recorder, buffers, [fake(buffer) for buffer in buffers])
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


def _register_weights(recorder: _Recorder, model: nn.Module, fakes: Mapping[int, Tensor]) -> None:
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
    recorder: _Recorder, buffers: Sequence[Tensor], twins: Sequence[Tensor]
) -> None:
    """Keep the numbers of buffers (finished tables), where there are any."""
    for buffer, twin in zip(buffers, twins, strict=True):
        if buffer.is_floating_point() and not buffer.is_meta:
            recorder.log.buffers[recorder.value(twin).id] = buffer


def _run(recorder: _Recorder, model: nn.Module, examples: list[Inputs], observe: Observe) -> None:
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


def refuse_untraceable(model: nn.Module) -> None:
    """Raise SymmetryError, naming the module, for models whose operations a log cannot show."""
    if hasattr(model, "_orig_mod"):
        raise SymmetryError(
            "the model is compiled: pass the model before torch.compile (_orig_mod)"
        )
    quantised = getattr(model, "is_quantized", False) or getattr(
        getattr(model, "config", None), "quantization_config", None
    )
    if quantised:
        raise SymmetryError(
            f"the model is quantised ({type(quantised).__name__}): load it without "
            "quantization_config, or call model.dequantize()"
        )
    for name, module in model.named_modules():
        place = f"module {name or type(model).__name__!r} ({type(module).__name__})"
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise SymmetryError(f"{place} is compiled: build the model again without compile()")
        if hasattr(module, "_flat_param") or "FullyShardedDataParallel" in type(module).__name__:
            raise SymmetryError(
                f"{place} is sharded: gather it with summon_full_params, or load it plain"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise SymmetryError(f"{place} is TorchScript: pass the Python module it was made from")
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False):
            raise SymmetryError(f"{place} is offloaded: load the model without device_map")
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    _refuse_tensor(tensor, f"{key!r} of {place}")


def _refuse_tensor(tensor: Tensor, place: str) -> None:
    if type(tensor) not in _PLAIN_TENSORS:
        name = type(tensor).__name__
        advice = (
            "gather it with full_tensor()"
            if "DTensor" in name
            else "load the model without quantisation"
        )
        raise SymmetryError(f"{place} is a {name}, not a plain tensor: {advice}")
    if tensor.is_quantized or "float8" in str(tensor.dtype) or "float4" in str(tensor.dtype):
        raise SymmetryError(
            f"{place} is quantised ({tensor.dtype}): load the model in float32 or bfloat16"
        )


@contextlib.contextmanager
def plain_kernels(model: nn.Module) -> Generator[None]:
    """Run the model for a while in eval mode, through operations that show what they do.

    Fused kernels (encoder fast paths, LSTM, flash attention) and routing by gathering (mixtures of
    experts) are replaced by equivalents that compute the same function.
    """
    training = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    onednn = torch._C._get_mkldnn_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch._C._set_mkldnn_enabled, onednn)
        stack.callback(lambda: [setattr(m, "training", flag) for m, flag in training])
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        for module, _ in training:
            module.training = False
            if hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate"):
                vars(module)["forward"] = types.MethodType(_all_experts, module)
                stack.callback(vars(module).pop, "forward")
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        stack.enter_context(_plain_attention(model))
        yield


@contextlib.contextmanager
def _plain_attention(model: nn.Module) -> Generator[None]:
    config = getattr(model, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    if chosen in (None, *_WHOLE_KERNELS) or not hasattr(model, "set_attn_implementation"):
        yield
        return
    choose: Any = model.set_attn_implementation
    choose("eager")
    try:
        yield
    finally:
        choose(chosen)


def _all_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor):
    """A mixture of experts in which every expert computes every token.

    The same function as the routed one, with the expert an ordinary dim of every tensor:
    x [E, tokens, residual], routing weights zero where an expert was not chosen.
    """
    x_TR = hidden_states.reshape(-1, hidden_states.shape[-1])
    num_experts = experts.num_experts
    name = "gate_up_proj" if experts.has_gate else "up_proj"

    def linear(x_ETI: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)
        y_ETO = torch.bmm(x_ETI, weight if experts.is_transposed else weight.transpose(1, 2))
        return y_ETO + getattr(experts, f"{name}_bias")[:, None] if experts.has_bias else y_ETO

    inner = linear(x_TR.expand(num_experts, *x_TR.shape), name)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    y_ETR = linear(inner, "down_proj")
    if experts.has_post_expert_norm:
        y_ETR = experts.post_expert_norm(y_ETR)
    routing_TE = x_TR.new_zeros(x_TR.shape[0], num_experts).scatter(
        1, top_k_index, top_k_weights.to(x_TR.dtype)
    )
    return (y_ETR * routing_TE.t()[..., None]).sum(0).reshape(hidden_states.shape)


def observe_outputs(output: Any) -> Any:
    """The tensors of a model's output that count by default.

    All of them, except internal states: of an output with heads (`logits`, `pred_boxes`) the hidden
    states, attentions, caches and pooled features are internal, and so are embeddings that the output
    also compares (`logits_per_image`); an output of nothing else (a bare encoder) is observed at its
    last hidden state and pooled features.
    """
    if not isinstance(output, Mapping):
        return _floating(output)
    state = {
        key: value
        for key, value in output.items()
        if not any(
            word in key for word in ("past_key", "attentions", "cache", "mems", "_state_dict")
        )
        and key not in ("hidden_states", "state", "rnn_state")
    }
    internal = ["hidden_state", "_states", "pooler", "embeds", "pooled", "_output"]
    if any("logits_per" in key for key in state):
        internal.append("embeddings")
    heads = {
        key: value
        for key, value in state.items()
        if not any(word in key for word in internal) and _floating(value)
    }
    return _floating(heads or {k: v for k, v in state.items() if "hidden_states" not in k})


def _floating(output: Any) -> list[Tensor]:
    return [
        t
        for t in tree_leaves(output)
        if isinstance(t, Tensor) and (t.dtype.is_floating_point or t.dtype.is_complex)
    ]
