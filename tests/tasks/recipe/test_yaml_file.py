"""YAML is read strictly: every fault is one sentence with the file and the line."""

import time
from pathlib import Path

import pytest

from tasks.recipe.section import ParamsError
from tasks.recipe.yaml_file import LARGEST_FILE, read_yaml

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "toy.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"toy\.yaml: line 3: key 'a' stands twice"),
        ("a: {x: 1, x: 2}\n", "line 1: key 'x' stands twice"),
        ("<<: {a: 1}\n<<: {b: 2}\n", "line 2: key '<<' stands twice"),
        (BOMB, r"toy\.yaml: its aliases expand to more than 100,000 values"),
        ("a: &a [*a]\n", r"toy\.yaml: an alias contains itself"),
        ("a: *b\n", "line 1: found undefined alias 'b'"),
        ("a: " + "[" * 5000 + "]" * 5000, "line 1: nested more than 50 deep"),
        ("a: " + "{a: " * 60 + "1" + "}" * 60, "line 1: nested more than 50 deep"),
        ("a:\n\tb: 1\n", "line 2: .*indent with spaces, not with tabs"),
        ("a: 1\nc: {a:hf://org/b}\n", r"line 2: 'a:hf://org/b' has no value: .*quote"),
        ("c: {hf://org/b}\n", r"line 1: 'hf://org/b' has no value: .*quote what has a colon"),
        ("c: {a: hf://org/b, : }\n", r'line 1: .*quote what has a colon: \{a: "hf://org/name"\}'),
        ("a: b: c\n", "line 1: mapping values are not allowed here"),
        ("a: @x\n", "line 1: found character '@'"),
        ("a: {b: 1\n", "line 2: expected ',' or '}'"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
        ("? [a]\n: 2\n", "line 1: a list is no key"),
        ("? \n: 2\n", "line 1: an empty word is no key"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1: could not determine a constructor"),
        ("a: 2024-13-45\n", r"toy\.yaml: month must be in 1\.\.12"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: 1\nb: \x07\n", "line 2: character 7 is not allowed in YAML"),
    ],
)
def test_a_fault_is_named_with_file_and_line_at_once(file, text, message) -> None:
    file.write_text(text)
    begun = time.process_time()
    with pytest.raises(ParamsError, match=message) as caught:
        read_yaml(file)
    assert time.process_time() - begun < 5
    assert len(str(caught.value)) < 500 + len(str(file))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named_with_their_line(file) -> None:
    file.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ParamsError, match="line 2 is not UTF-8: save the file as UTF-8"):
        read_yaml(file)


def test_files_that_cannot_be_read_are_named(file) -> None:
    with pytest.raises(ParamsError, match=r"toy\.yaml is missing"):
        read_yaml(file)
    with pytest.raises(ParamsError, match="cannot be read: Is a directory"):
        read_yaml(file.parent)
    file.write_text("#" * (LARGEST_FILE + 1))
    with pytest.raises(ParamsError, match="a params file has at most 1 MiB"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", None),
        ("a: 1\r\nb: [x, y]\r\n", {"a": 1, "b": ["x", "y"]}),
        ("\ufeffa: 1\n", {"a": 1}),
        ("a: &a {p: 1}\nb: {<<: *a, p: 2}\n", {"a": {"p": 1}, "b": {"p": 2}}),
        ("c: {a: hf://org/b@main}\n", {"c": {"a": "hf://org/b@main"}}),
        ("1: x\n", {1: "x"}),
    ],
)
def test_what_people_mean_is_read(file, text, content) -> None:
    file.write_text(text)
    assert read_yaml(file) == content


def test_words_that_older_yaml_takes_for_booleans_are_words(file) -> None:
    """DVC reads recipes by YAML 1.2, too: `on` is a key of a search, `no` a language."""
    file.write_text("on: {no: yes, off: true, y: False}\nmembers: [no, true, trueish, null]\n")
    read = {"on": {"no": "yes", "off": True, "y": False}}
    assert read_yaml(file) == {**read, "members": ["no", True, "trueish", None]}
