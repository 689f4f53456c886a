"""Linear combinations as one loop over the elements, compiled by LLVM when a process needs it.

A loop is written for the dtypes, the number of models and whether there is a base: what is constant
is unrolled, and LLVM's vectorizer does the rest. That takes less than 0.1 s, numba a second to be
imported and to load as much from its cache. Nothing is kept on the disk.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from alloy.checkpoint.engine.kernels import BF16, F16, F32

_INFINITY = 0x7F800000
_INFINITE_F16 = 0x7C00
_ONE_AT_A_TIME = threading.Lock()
_ENGINES: list[Any] = []
"""They own the machine code."""


def mix(
    rows: np.ndarray,
    kind: int,
    coefficients: np.ndarray,
    has_base: bool,
    out: np.ndarray,
    out_kind: int,
) -> bool:
    """out = sum c_i W_i; with a base (row 0) W_0 + sum c_i (W_i - W_0). False if not finite.

    Not finite means that an input was not, or that the sum left the range of the output dtype.

    Args:
        rows: [models, bytes] uint8, each row contiguous.
        coefficients: [models] float32, one fewer with a base.
        out: [bytes] uint8, contiguous, apart from the rows.
    """
    assert out.flags.c_contiguous, "the result is contiguous"
    assert all(row.flags.c_contiguous for row in rows), "each row is contiguous"
    factors = np.ascontiguousarray(coefficients, np.float32)
    with _ONE_AT_A_TIME:
        run = _mix(kind, out_kind, len(factors), bool(has_base))
    num_elements = rows.shape[1] // (4 if kind == F32 else 2)
    return bool(
        run(rows.ctypes.data, rows.strides[0], num_elements, factors.ctypes.data, out.ctypes.data)
    )


def is_finite(raw: np.ndarray, kind: int) -> bool:
    """True if a row of bytes [bytes] uint8 holds no NaN and no Inf."""
    assert raw.flags.c_contiguous, "the row is contiguous"
    with _ONE_AT_A_TIME:
        run = _is_finite(kind)
    return bool(run(raw.ctypes.data, len(raw) // (4 if kind == F32 else 2)))


class _Loop:
    """The text of a loop over elements in LLVM's language; every value is assigned once."""

    def __init__(self) -> None:
        self.entry: list[str] = []
        """Before the loop."""
        self.body: list[str] = []

    def once(self, operation: str) -> str:
        """A value that no element changes."""
        self.entry.append(f"%e{len(self.entry)} = {operation}")
        return f"%e{len(self.entry) - 1}"

    def value(self, operation: str) -> str:
        """A value of each element."""
        self.body.append(f"%v{len(self.body)} = {operation}")
        return f"%v{len(self.body) - 1}"

    def bits(self, value: str) -> str:
        return self.value(f"bitcast float {value} to i32")

    def number(self, bits: str) -> str:
        return self.value(f"bitcast i32 {bits} to float")

    def select(self, condition: str, value: str, otherwise: str) -> str:
        chosen = self.value(f"icmp {condition}")
        return self.value(f"select i1 {chosen}, i32 {value}, i32 {otherwise}")

    def load(self, row: str, kind: int) -> str:
        """The bits of this element, as 32."""
        width = "i32" if kind == F32 else "i16"
        place = self.value(f"getelementptr {width}, ptr {row}, i64 %j")
        stored = self.value(f"load {width}, ptr {place}, align 1")
        return stored if kind == F32 else self.value(f"zext i16 {stored} to i32")

    def decode(self, row: str, kind: int) -> str:
        """This element as float32."""
        stored = self.load(row, kind)
        if kind == F32:
            return self.number(stored)
        if kind == BF16:
            return self.number(self.value(f"shl i32 {stored}, 16"))
        # shift exponent and mantissa into place, then a multiplication by 2**112 moves the
        # exponent's bias and makes subnormals normal; Inf and NaN become Inf or NaN again
        magnitude = self.value(f"shl i32 {self.value(f'and i32 {stored}, {0x7FFF}')}, 13")
        special = self.select(f"uge i32 {magnitude}, {0x0F800000}", str(_INFINITY), "0")
        scale = self.number(str(0x77800000))
        scaled = self.bits(self.value(f"fmul float {self.number(magnitude)}, {scale}"))
        sign = self.value(f"shl i32 {self.value(f'and i32 {stored}, {0x8000}')}, 16")
        unsigned = self.value(f"or i32 {scaled}, {special}")
        return self.number(self.value(f"or i32 {unsigned}, {sign}"))

    def encode(self, value: str, kind: int) -> tuple[str, str]:
        """A float32 in another dtype, and a magnitude that tells whether it stayed finite."""
        bits = self.bits(value)
        magnitude = self.value(f"and i32 {bits}, {0x7FFFFFFF}")
        if kind == F32:
            return bits, magnitude
        if kind == BF16:
            half = self._rounded_bf16(bits)
            rounded = self.value(f"shl i32 {self.value(f'and i32 {half}, {0x7FFF}')}, 16")
            # a NaN whose rounding carries into the sign is still seen in `bits`
            largest = self.value(f"call i32 @llvm.umax.i32(i32 {magnitude}, i32 {rounded})")
            return self.value(f"trunc i32 {half} to i16"), largest
        rounded = self._rounded_f16(magnitude)
        sign = self.value(f"and i32 {self.value(f'lshr i32 {bits}, 16')}, {0x8000}")
        signed = self.value(f"or i32 {rounded}, {sign}")
        return self.value(f"trunc i32 {signed} to i16"), rounded

    def _rounded_bf16(self, bits: str) -> str:
        """The upper 16 of 32 bits, rounded to nearest, ties to even. Finite values only."""
        odd = self.value(f"and i32 {self.value(f'lshr i32 {bits}, 16')}, 1")
        up = self.value(f"add i32 {odd}, {0x7FFF}")
        return self.value(f"lshr i32 {self.value(f'add i32 {bits}, {up}')}, 16")

    def _rounded_f16(self, bits: str) -> str:
        """The float16 magnitude nearest to a float32 one, ties to even; Inf beyond 65504."""
        # normal: rebias the exponent by -112 and round 13 bits away; subnormal: an addition of 0.5
        # aligns the mantissa so that the hardware rounds it at the last bit a float16 has
        odd = self.value(f"and i32 {self.value(f'lshr i32 {bits}, 13')}, 1")
        up = self.value(f"add i32 {odd}, {0xC8000FFF}")
        normal = self.value(f"lshr i32 {self.value(f'add i32 {bits}, {up}')}, 13")
        aligned = self.bits(self.value(f"fadd float {self.number(bits)}, 5.0e-01"))
        subnormal = self.value(f"sub i32 {aligned}, {0x3F000000}")
        rounded = self.select(f"ult i32 {bits}, {0x38800000}", subnormal, normal)
        return self.select(f"uge i32 {bits}, {0x477FF000}", str(_INFINITE_F16), rounded)

    def store(self, encoded: str, kind: int) -> None:
        width = "i32" if kind == F32 else "i16"
        place = self.value(f"getelementptr {width}, ptr %out, i64 %j")
        self.body.append(f"store {width} {encoded}, ptr {place}, align 1")

    def function(self, parameters: str, magnitude: str, infinite: int) -> str:
        """The whole: 1 if no element's magnitude reaches `infinite`."""
        entry, body = ("\n  ".join(lines) for lines in (self.entry, self.body))
        return f"""
declare i32 @llvm.umax.i32(i32, i32)

define i32 @kernel({parameters}) {{
entry:
  %empty = icmp sle i64 %count, 0
  {entry}
  br i1 %empty, label %end, label %loop
loop:
  %j = phi i64 [ 0, %entry ], [ %next, %loop ]
  %largest = phi i32 [ 0, %entry ], [ %larger, %loop ]
  {body}
  %larger = call i32 @llvm.umax.i32(i32 %largest, i32 {magnitude})
  %next = add nuw nsw i64 %j, 1
  %done = icmp eq i64 %next, %count
  br i1 %done, label %end, label %loop
end:
  %most = phi i32 [ 0, %entry ], [ %larger, %loop ]
  %finite = icmp ult i32 %most, {infinite}
  %result = zext i1 %finite to i32
  ret i32 %result
}}
"""


@cache
def _mix(kind: int, out_kind: int, num_models: int, has_base: bool) -> Callable[..., int]:
    loop = _Loop()
    rows = []
    for i in range(num_models + has_base):
        offset = loop.once(f"mul i64 %stride, {i}")
        rows.append(loop.once(f"getelementptr i8, ptr %rows, i64 {offset}"))
    factors = []
    for i in range(num_models):
        place = loop.once(f"getelementptr float, ptr %coefficients, i64 {i}")
        factors.append(loop.once(f"load float, ptr {place}"))
    base = loop.decode(rows[0], kind) if has_base else None
    total = "0.0" if has_base else None
    for row, factor in zip(rows[has_base:], factors, strict=True):
        value = loop.decode(row, kind)
        if base is not None:
            value = loop.value(f"fsub float {value}, {base}")
        scaled = loop.value(f"fmul float {factor}, {value}")
        total = scaled if total is None else loop.value(f"fadd float {total}, {scaled}")
    if base is not None:
        total = loop.value(f"fadd float {total}, {base}")
    assert total is not None, "there is a model"
    encoded, magnitude = loop.encode(total, out_kind)
    loop.store(encoded, out_kind)
    parameters = (
        "ptr noalias readonly %rows, i64 %stride, i64 %count, "
        "ptr noalias readonly %coefficients, ptr noalias %out"
    )
    text = loop.function(parameters, magnitude, _INFINITE_F16 if out_kind == F16 else _INFINITY)
    return _compiled(text, (_POINTER, _SIZE, _SIZE, _POINTER, _POINTER))


@cache
def _is_finite(kind: int) -> Callable[..., int]:
    loop = _Loop()
    mask, infinite = {
        F32: (0x7FFFFFFF, _INFINITY),
        BF16: (0x7FFF, _INFINITY >> 16),
        F16: (0x7FFF, _INFINITE_F16),
    }[kind]
    magnitude = loop.value(f"and i32 {loop.load('%row', kind)}, {mask}")
    text = loop.function("ptr readonly %row, i64 %count", magnitude, infinite)
    return _compiled(text, (_POINTER, _SIZE))


_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


def _compiled(text: str, parameters: Sequence[Any]) -> Callable[..., int]:
    """The function `kernel` of a module, optimized for this processor."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="jitdefault",
        jit=True,
    )
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = llvm.get_process_triple(), str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _ENGINES.append(engine)
    return ctypes.CFUNCTYPE(ctypes.c_int32, *parameters)(engine.get_function_address("kernel"))
