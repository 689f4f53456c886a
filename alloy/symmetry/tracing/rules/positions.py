"""Operations that depend on the place along a dim: windows, shifts, resampling, transforms."""

from alloy.symmetry.tracing.engine import Engine, RuleDoesNotApply, merged
from alloy.symmetry.tracing.links import Homogeneous
from alloy.symmetry.tracing.recording.log import Call
from alloy.symmetry.tracing.rules.registry import listed_dims, pass_dims, rule
from alloy.symmetry.tracing.terms import Node, direct_sum, pin, product, split


@rule("roll flip")
def roll(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    pass_dims(engine, x, call.outputs[0], listed_dims(call.inputs["dims"], len(x.shape)), "shifted")


@rule("tril triu")
def triangle(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    rank = len(x.shape)
    pass_dims(engine, x, call.outputs[0], [rank - 2, rank - 1], "triangle")


@rule(
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d max_pool1d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool1d "
    "adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_linear1d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d"
)
def resample(engine: Engine, call: Call) -> None:
    """Windows over the trailing dims; leading ones pass."""
    x = next(call.tensors())
    count = next(int(c) for c in reversed(call.name) if c.isdigit() and c in "123")
    dims = range(len(x.shape) - count, len(x.shape))
    for out in call.outputs:
        pass_dims(engine, x, out, dims, "positions", linear="max" not in call.name)
        if "max" in call.name and out.floating:
            for d in range(dims.start):
                engine.link(Homogeneous((x, d), (out, d)))


@rule("grid_sampler_2d grid_sampler_3d grid_sampler _grid_sampler_2d_cpu_fallback")
def grid_sampler(engine: Engine, call: Call) -> None:
    x, grid, out = call.inputs["input"], call.inputs["grid"], call.outputs[0]
    engine.pin_dims(x, range(2, len(x.shape)), "positions")
    engine.pin_dims(grid, [len(grid.shape) - 1], "coordinates")
    x_dims, grid_dims = engine.get(x), engine.get(grid)
    engine.set(out, [merged([x_dims[0], grid_dims[0]]), x_dims[1], *grid_dims[1:-1]])
    engine.same(x, out, [(1, 1)])


@rule("im2col")
def im2col(engine: Engine, call: Call) -> None:
    x, out = call.inputs["self"], call.outputs[0]
    engine.pin_dims(x, [2, 3], "positions")
    n, c = engine.get(x)[:2]
    window = Node(out.shape[1] // x.shape[1], "window")
    engine.set(out, [n, product([c, window]), Node(out.shape[2], "positions")])


@rule("col2im")
def col2im(engine: Engine, call: Call) -> None:
    """Windows [n, channels x window, places] added up to positions [n, channels, height, width]."""
    x, out = call.inputs["self"], call.outputs[0]
    if len(x.shape) != 3:
        raise RuleDoesNotApply
    engine.pin_dims(x, [2], "positions")
    n, fused, _ = engine.get(x)
    pair = split(fused, out.shape[1])
    if pair is None:
        raise RuleDoesNotApply
    pin(pair[1], "window")
    engine.set(out, [n, pair[0], *(Node(size, "positions") for size in out.shape[2:])])
    engine.same(x, out, [(0, 0)])


@rule("unfold")
def unfold(engine: Engine, call: Call) -> None:
    x, out = call.inputs["self"], call.outputs[0]
    dim = call.inputs["dimension"] % len(x.shape)
    engine.pin_dims(x, [dim], "windows")
    dims = [*engine.get(x), Node(out.shape[-1], "window")]
    dims[dim] = Node(out.shape[dim], "windows")
    engine.set(out, dims)
    engine.same(x, out, ((d, d) for d in range(len(x.shape)) if d != dim))


@rule("pixel_shuffle pixel_unshuffle")
def pixel_shuffle(engine: Engine, call: Call) -> None:
    x, out = call.inputs["self"], call.outputs[0]
    engine.pin_dims(x, [len(x.shape) - 2, len(x.shape) - 1], "positions")
    *batch, channels, _, _ = engine.get(x)
    new = out.shape[-3]
    if call.name == "pixel_shuffle":
        pair = split(channels, new)
        if pair is None:
            raise RuleDoesNotApply
        pin(pair[1], "pixels of a channel")
        channels = pair[0]
    else:
        channels = product([channels, Node(new // x.shape[-3], "pixels of a channel")])
    engine.set(out, [*batch, channels, *(Node(n, "positions") for n in out.shape[-2:])])


@rule("view_as_real view_as_complex")
def view_as_complex(engine: Engine, call: Call) -> None:
    x, out = call.inputs["self"], call.outputs[0]
    nodes = list(engine.get(x))
    if call.name == "view_as_complex":
        engine.pin_dims(x, [len(nodes) - 1], "real and imaginary part")
        engine.set(out, nodes[:-1])
    else:
        engine.set(out, [*nodes, direct_sum([Node(1), Node(1)])])


@rule("_fft_r2c _fft_c2r _fft_c2c")
def fourier(engine: Engine, call: Call) -> None:
    x = call.inputs["self"]
    dims = listed_dims(call.inputs["dim"], len(x.shape))
    pass_dims(engine, x, call.outputs[0], dims, "positions of a Fourier transform")
