"""`alloy merge` and `alloy plan`: merge checkpoints on disk, or show what a merge would do.

The engine is imported once a command runs: help, refused arguments and completion need none of it.
"""

import json
import re
import shlex
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alloy.checkpoint.checks.groups import GROUPS
from alloy.cli.places import is_remote, named, placed
from alloy.cli.wording import in_options, refusals
from alloy.errors import MergeError
from alloy.merging import MERGE_METHODS

if TYPE_CHECKING:
    from alloy.checkpoint import MergePlan, MergeRequest

MERGE_EXAMPLE = """**Example**: two fine-tunes and the checkpoint they started from

    alloy merge ties merged a=models/a b=models/b --base models/seed --coefficients 0.6,0.4

An interrupted merge goes on where it stopped when the same command is given again."""
PLAN_EXAMPLE = """**Example**: which tensor is made from what, before anything is written

    alloy plan linear merged models/a models/b --coefficients '*mlp*=7,3' --coefficients '*=1,1'"""


_STREAMED = sorted(name for name, method in MERGE_METHODS.items() if method.scope == "tensor")


def _methods(incomplete: str) -> list[str]:
    return [name for name in _STREAMED if name.startswith(incomplete)]


def _of(*values: str) -> Callable[[str], list[str]]:
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


Method = Annotated[
    str,
    typer.Argument(
        help=f"How to merge: {', '.join(_STREAMED)}. docs/methods.md has each with its paper.",
        autocompletion=_methods,
        show_default=False,
    ),
]
Output = Annotated[
    Path, typer.Argument(help="A folder that does not exist or is empty.", show_default=False)
]
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]SOURCE...",
        help="The checkpoints, in order: folders with config.json and safetensors, safetensors "
        "files, BASE+ADAPTER, an adapter of PEFT on its base; in a checkout also hf://org/name@"
        "revision, s3://bucket/prefix, mlflow:models/NAME@alias. The first one's names, order, "
        "sharding, config and tokenizer are the result's.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="The checkpoint that the sources were trained from, for methods with task vectors."
    ),
]
Coefficients = Annotated[
    list[str] | None,
    typer.Option(
        metavar="C,C,... | PATTERN=C,C,...",
        help="One number for each source (1..0 falls from the first layer to the last); or by glob "
        "pattern of tensor names, several times: the first pattern that matches decides.",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="OPTION=VALUE",
        help="An option of the method; by pattern of tensor names: "
        '`density={"*attn*": 0.3, "*": 0.5}`; over depth: `{"from": 0.2, "to": 0.8}`; by source: '
        '`{"a": 1, "b": 0.7}`.',
    ),
]
Statistics = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FILE", help="Grams or Fisher diagonals of a source."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the result: float32, float16, bfloat16, float64; by default the sources'.",
        autocompletion=_of("float32", "float16", "bfloat16", "float64"),
    ),
]
ShardBytes = Annotated[
    str | None, typer.Option(metavar="SIZE", help="The most that a file holds, as 5GB.")
]
TokenizerPolicy = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        help="Where vocabularies differ: same (refuse), base (the base's tokens), union (all "
        "tokens).",
        autocompletion=_of("same", "base", "union"),
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Where chat templates differ: the source whose template is taken, a file, or auto, "
        "the commonest.",
    ),
]
Processor = Annotated[
    str | None, typer.Option(metavar="NAME", help="The source whose processor the result has.")
]
GenerationConfig = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The source whose generation config the result has."),
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OLD=NEW",
        help="Prefixes of names that the first source has otherwise, as "
        "`model.=model.language_model.`; found where one change places everything.",
    ),
]
Kept = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN|GROUP",
        help=f"Tensors that stay the first source's; groups are {', '.join(GROUPS)}.",
        autocompletion=_of(*GROUPS),
    ),
]
Slices = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FIRST:END,...",
        help="Layers of the result, in order: `a=0:16` copies sixteen of `a`, `a=0:8,b=0:8` merges "
        "eight of each.",
    ),
]
Stack = Annotated[
    str | None,
    typer.Option(help="What the layers of --slices begin with, where a model has several stacks."),
]
Copy = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=NAME", help="Tensors taken as they are from one source."),
]
Drop = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Tensors that the result shall lack.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Config keys and files that may differ: the first source's are taken.",
    ),
]


def merge(
    method: Method,
    output: Output,
    sources: Sources,
    base: Base = None,
    coefficients: Coefficients = None,
    options: Options = None,
    statistics: Statistics = None,
    dtype: Dtype = None,
    shard_bytes: ShardBytes = None,
    tokenizer: TokenizerPolicy = "same",
    chat_template: ChatTemplate = None,
    processor: Processor = None,
    generation_config: GenerationConfig = None,
    names: Names = None,
    kept: Kept = None,
    slices: Slices = None,
    stack: Stack = None,
    copy: Copy = None,
    drop: Drop = None,
    allow: Allow = None,
    threads: Annotated[int | None, typer.Option(help="Workers; by default all cores.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where decompositions are computed, as cuda; by default on the cores."),
    ] = None,
    hash_sources: Annotated[
        bool, typer.Option("--hash-sources", help="Record the SHA-256 of every source file.")
    ] = False,
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Bring sources of other places into a cache first, verified, for other merges "
            "too; else their ranges are read while merging, and no copy is made.",
        ),
    ] = False,
) -> None:
    """Merge checkpoints on disk, larger than memory, into one that loads.

    Everything is checked before a tensor is read; the output appears whole or not at all.
    """
    from alloy.checkpoint import plan_merge

    with refusals("merge"):
        plan = plan_merge(
            _request(
                method, output, sources, base, coefficients, options, statistics, dtype,
                shard_bytes, tokenizer, chat_template, processor, generation_config, names, kept,
                slices, stack, copy, drop, allow, by_ranges=not (download or hash_sources),
            )
        )  # fmt: skip
        carry_out(
            plan,
            threads=threads,
            device=device,
            hash_sources=hash_sources,
            trust_manifests=all(
                is_remote(s) for s in (*_places(sources), *([base] if base else []))
            ),
            command=shlex.join(["alloy", *sys.argv[1:]]),
        )


def _places(sources: Sequence[str]) -> list[str]:
    """The sources without their names."""
    given = named_sources(sources)
    return list(given.values()) if isinstance(given, Mapping) else list(given)


def carry_out(
    plan: "MergePlan",
    *,
    threads: int | None = None,
    device: str | None = None,
    hash_sources: bool = False,
    trust_manifests: bool = False,
    command: str | None = None,
) -> None:
    """Run a plan with a bar, and say what was noted and written."""
    from tqdm import tqdm

    from alloy.checkpoint import run_plan

    lock = threading.Lock()
    bar = tqdm(
        desc="compile",  # what a machine's first merge waits for
        total=plan.num_bytes,
        unit="B",
        unit_scale=True,
        disable=None,
        leave=False,
    )

    def advance(num_bytes: int) -> None:
        with lock:
            bar.set_description("merge", refresh=False)
            bar.update(num_bytes)

    with bar:
        report = run_plan(
            plan,
            threads=threads,
            device=device,
            hash_sources=hash_sources,
            trust_manifests=trust_manifests,
            command=command,
            on_bytes=advance,
        )
    for note in report.notes:
        typer.echo(f"note: {in_options(note)}")
    if report.resumed:
        typer.echo(f"went on after {', '.join(report.resumed)}")
    typer.echo(
        f"wrote {report.output}: {report.num_tensors} tensors, {report.num_bytes:,} bytes "
        f"in {report.seconds:.1f} s"
    )


def plan(
    method: Method,
    output: Output,
    sources: Sources,
    base: Base = None,
    coefficients: Coefficients = None,
    options: Options = None,
    statistics: Statistics = None,
    dtype: Dtype = None,
    shard_bytes: ShardBytes = None,
    tokenizer: TokenizerPolicy = "same",
    chat_template: ChatTemplate = None,
    processor: Processor = None,
    generation_config: GenerationConfig = None,
    names: Names = None,
    kept: Kept = None,
    slices: Slices = None,
    stack: Stack = None,
    copy: Copy = None,
    drop: Drop = None,
    allow: Allow = None,
) -> None:
    """Check a merge and show what it would do: each tensor, its sources, settings and bytes.

    Reads headers and configs alone, and writes nothing.
    """
    from alloy.checkpoint import plan_merge

    with refusals("plan"):
        planned = plan_merge(
            _request(
                method, output, sources, base, coefficients, options, statistics, dtype,
                shard_bytes, tokenizer, chat_template, processor, generation_config, names, kept,
                slices, stack, copy, drop, allow,
            )
        )  # fmt: skip
    typer.echo(replace(planned, notes=tuple(map(in_options, planned.notes))))


def _request(
    method: str,
    output: Path,
    sources: Sequence[str],
    base: str | None,
    coefficients: Sequence[str] | None,
    options: Sequence[str] | None,
    statistics: Sequence[str] | None,
    dtype: str | None,
    shard_bytes: str | None,
    tokenizer: str,
    chat_template: str | None,
    processor: str | None,
    generation_config: str | None,
    names: Sequence[str] | None,
    kept: Sequence[str] | None,
    slices: Sequence[str] | None,
    stack: str | None,
    copy: Sequence[str] | None,
    drop: Sequence[str] | None,
    allow: Sequence[str] | None,
    *,
    by_ranges: bool = True,
) -> "MergeRequest":
    """The settings of a merge as the library takes them."""
    from alloy.checkpoint import MergeRequest

    if method in MERGE_METHODS and method not in _STREAMED:
        raise MergeError(
            f"method {method!r} runs the models while it merges: give them to "
            "alloy.merge_checkpoints in Python"
        )
    return MergeRequest(
        method,
        _here(named(named_sources(sources)), by_ranges=by_ranges),
        output,
        base=None if base is None else placed(base, by_ranges=by_ranges),
        coefficients=rows_of(coefficients or ()),
        statistics=key_values(statistics or (), "--statistics", "NAME=FILE", Path) or None,
        dtype=dtype,
        shard_bytes=shard_bytes,
        tokenizer=tokenizer,
        chat_template=chat_template,
        processor=processor,
        generation_config=generation_config,
        names=key_values(names or (), "--names", "OLD=NEW", str),
        kept=kept or (),
        slices=[slice_of(text) for text in slices or ()],
        stack=stack,
        copy=key_values(copy or (), "--copy", "PATTERN=NAME", str),
        drop=drop or (),
        allow=allow or (),
        options=key_values(options or (), "--set", "OPTION=VALUE", json_value),
    )


def _here(
    sources: Mapping[str, str] | Sequence[str], *, by_ranges: bool
) -> dict[str, str] | list[str]:
    """Sources on this disk, brought where they lie elsewhere."""
    if isinstance(sources, Mapping):
        return {name: placed(s, by_ranges=by_ranges) for name, s in sources.items()}
    return [placed(source, by_ranges=by_ranges) for source in sources]


def named_sources(given: Sequence[str]) -> list[str] | dict[str, str]:
    """Paths in order, or by name if they have names. A path that exists may hold an equals sign."""
    named = [text for text in given if "=" in text and not Path(text).exists()]
    if not named:
        return list(given)
    if unnamed := [text for text in given if text not in named]:
        hint = ""
        if all(_is_number(text) for text in unnamed):
            hint = f"; coefficients are one argument: --coefficients C,{','.join(unnamed)}"
        raise MergeError(f"{unnamed[0]} has no name, {named[0]} has one: name all or none{hint}")
    pairs = key_values(given, "source", "NAME=PATH", str)
    if len(pairs) != len(given):
        raise MergeError(f"sources {' '.join(given)}: two have one name")
    return pairs


def slice_of(text: str) -> dict[str, list[int]]:
    """`a=0:8,b=4:12` as layers by source."""
    layers: dict[str, list[int]] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(.+)=(\d+):(\d+)", part)
        if match is None:
            raise MergeError(f"--slices {text}: write NAME=FIRST:END, as a=0:16 or a=0:8,b=0:8")
        if match[1] in layers:
            raise MergeError(
                f"--slices {text}: {match[1]!r} stands twice: what is copied one after the other "
                "takes a --slices each"
            )
        layers[match[1]] = [int(match[2]), int(match[3])]
    return layers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def rows_of(given: Sequence[str]) -> list[Any] | dict[str, list[Any]] | None:
    """Numbers, or rows of numbers by pattern."""
    if not given:
        return None
    by_pattern = [text for text in given if "=" in text]
    if by_pattern and len(by_pattern) != len(given):
        raise MergeError(
            f"--coefficients {' '.join(given)}: numbers alone or by pattern, not both; "
            "end the patterns with '*=...' instead"
        )
    if by_pattern:
        return key_values(given, "--coefficients", "PATTERN=C,C,...", _numbers)
    return [number for text in given for number in _numbers(text)]


def _numbers(text: str) -> list[Any]:
    """Numbers, or anchors of a gradient over depth, `1..0`."""
    try:
        return [_anchors(part) if ".." in part else float(part) for part in text.split(",")]
    except ValueError:
        raise MergeError(
            f"--coefficients {text}: write numbers with commas between them, 0.6,0.4; 1..0 is one "
            "that falls with depth"
        ) from None


def _anchors(text: str) -> list[float]:
    return [float(part) for part in text.split("..")]


def key_values(
    given: Sequence[str], option: str, form: str, convert: Callable[[str], Any]
) -> dict[str, Any]:
    """`KEY=VALUE` arguments as a mapping."""
    pairs: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise MergeError(f"{option} {text}: write {form}")
        pairs[key] = convert(value)
    return pairs


def json_value(text: str) -> Any:
    """A number, a boolean, a list or a mapping as JSON or YAML writes it; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        if not text.lstrip().startswith(("{", "[")):
            return text
    import yaml

    from alloy.yaml_keys import UniqueKeysLoader

    try:
        return yaml.load(text, UniqueKeysLoader)
    except yaml.YAMLError as error:
        said = getattr(error, "problem", None) or "it does not end"
        raise MergeError(f"{text}: no list or mapping ({said}); write {{a: 1, b: 0.7}}") from None
