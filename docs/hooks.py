"""The parts of the site that are not in docs/: pages from elsewhere, and what the reference needs.

A link from a page to any file of the repository works on the site as it does in the repository:
the file is brought along, and the link is rewritten. The reference lists every public name; one
without a docstring, or on no page, is a warning, which `make docs` does not accept.
"""

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")
INTERNAL = ("alloy.symmetry.tracing",)  # packages without public names
LOG = logging.getLogger("mkdocs.hooks.alloy")

_library: griffe.Module | None = None


def library() -> griffe.Module:
    """The library as its source says it is; nothing of it is imported."""
    global _library
    if _library is None:
        loaded = griffe.load(
            "alloy",
            search_paths=[ROOT],
            try_relative_path=False,
            allow_inspection=False,
            docstring_parser="google",
            resolve_aliases=True,
        )
        assert isinstance(loaded, griffe.Module)
        _library = loaded
    return _library


def public(module: griffe.Module) -> Iterator[tuple[str, griffe.Object]]:
    """The names that a package exports, with what they are, and so for the packages inside it."""
    for name in sorted(map(str, module.exports or ())):
        value = module[name]
        value = value.final_target if isinstance(value, griffe.Alias) else value
        if not name.startswith("__") and not value.is_module:
            yield f"{module.path}.{name}", value
    for inner in module.modules.values():
        if inner.is_init_module and not inner.path.startswith(INTERNAL):
            yield from public(inner)


def unexplained() -> list[str]:
    """What the reference would not explain.

    Public names, and public methods of public classes, without a docstring; arguments that a
    docstring explains and the signature does not have; names on no page of docs/reference/.
    """
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    packages = [library()[name] for name in re.findall(r"^::: alloy\.([\w.]+)", pages, re.M)]
    shown = {value.path for package in packages for _, value in public(package)}
    shown |= {member.path for package in packages for member in package.members.values()}
    faults = []
    for name, value in public(library()):
        faults += [f"{path} has no docstring" for path in _undocumented(value)]
        faults += [f"{path} is no argument" for path in _unknown_arguments(value)]
        if value.path not in shown:
            faults.append(f"{name} is on no page of docs/reference/")
    return sorted(set(faults))


def _members(value: griffe.Object) -> list[griffe.Object]:
    """A public object and, of a class, its public methods and properties."""
    own = value.members.items() if isinstance(value, griffe.Class) else ()
    methods = [m for name, m in own if not name.startswith("_") and isinstance(m, griffe.Object)]
    return [value, *(m for m in methods if m.is_function or "property" in m.labels)]


def _undocumented(value: griffe.Object) -> list[str]:
    return [member.path for member in _members(value) if not member.docstring]


def _unknown_arguments(value: griffe.Object) -> list[str]:
    """Names that the section "Args" of a docstring explains and the signature does not have."""
    unknown = []
    for member in _members(value):
        if isinstance(member, griffe.Function) and member.docstring:
            known = {parameter.name.lstrip("*") for parameter in member.parameters}
            args = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", member.docstring.value, re.M | re.S)
            names = re.findall(r"^    (\S[^:\n]*):", args[1] if args else "", re.M)
            unknown += [f"{member.path}({n})" for n in names if n.lstrip("*") not in known]
    return unknown


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring along what pages link to outside docs/."""
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            if not target.startswith("docs/") and files.get_file_from_path(target) is None:
                path = ROOT / target
                if path.is_file():
                    file = File.generated(config, target, abs_src_path=str(path))
                    file.inclusion = InclusionLevel.NOT_IN_NAV
                    files.append(file)
                    waiting += [file] if file.is_documentation_page() else []
    return files


def _targets(page: File) -> list[str]:
    """What a page links to, as paths in the repository."""
    home = posixpath.dirname(_place(page))
    links = [link for _, link, _ in LINK.findall(page.content_string) if "://" not in link]
    return [posixpath.normpath(posixpath.join(home, link)) for link in links]


def _place(file: File) -> str:
    """A file's path in the repository."""
    return Path(file.abs_src_path or "").relative_to(ROOT).as_posix()


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that cross the border of docs/, and list the public names where asked."""
    home = posixpath.dirname(_place(page.file))

    def on_site(found: re.Match[str]) -> str:
        if "://" in found[2]:
            return found[0]
        target = posixpath.normpath(posixpath.join(home, found[2])).removeprefix("docs/")
        return found[1] + posixpath.relpath(target, posixpath.dirname(page.file.src_uri)) + found[3]

    return LINK.sub(on_site, markdown).replace("<!-- names of alloy -->", _names())


def _names() -> str:
    """A table of what `import alloy` gives, each name with the first sentence about it."""
    rows = ["| name | |", "|---|---|"]
    for name, value in public(library()):
        if name.count(".") == 1 and value.docstring:
            sentence = value.docstring.value.partition("\n\n")[0].replace("\n", " ")
            rows.append(f"| [`{name}`][{value.path}] | {sentence} |".replace("||", "|"))
    return "\n".join(rows)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse public names that the reference does not explain."""
    for fault in unexplained():
        LOG.warning(fault)
