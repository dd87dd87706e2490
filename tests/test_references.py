"""References to a user's own code: how they are found, and what is refused."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnn.references import digest_of, is_reference, resolve


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder of the user's own, whose modules are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(file: str, text: str) -> Path:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def result(reference: str) -> object:
    function = resolve(reference)
    assert callable(function)
    return function()


def refusal(reference: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the callers look at the message
        resolve(reference)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("package.module:name", True),
        ("module:name", True),
        ("file.py:name", True),
        ("../my folder/my-file.py:name", True),
        ("digits", False),
        ("photos/train", False),
        ("photos/train:test", False),
        ("my-module:name", False),
        ("module:", False),
        (":name", False),
        ("module:my-name", False),
        ("", False),
    ],
)
def test_a_reference_is_a_module_or_a_python_file_and_a_name(text: str, is_one: bool) -> None:
    assert is_reference(text) is is_one


def test_a_file_is_found_from_the_working_folder() -> None:
    write("my code/net-1.py", "def make(): return 5")
    assert result("my code/net-1.py:make") == 5


def test_a_module_is_found_in_the_working_folder() -> None:
    write("stranger/parts/net.py", "def make(): return 6")
    assert result("stranger.parts.net:make") == 6


def test_a_file_imports_its_siblings() -> None:
    write("own/sibling_of_net.py", "value = 7")
    write("own/net.py", "from sibling_of_net import value\ndef make(): return value")
    assert result("own/net.py:make") == 7


def test_a_file_may_define_dataclasses() -> None:
    text = "from __future__ import annotations\nimport dataclasses\n"
    write(
        "net.py",
        f"{text}@dataclasses.dataclass\nclass Net:\n    size: dataclasses.InitVar[int] = 1",
    )
    assert type(result("net.py:Net")).__name__ == "Net"


def test_two_files_of_one_name_are_two_modules() -> None:
    write("a/net.py", "def make(): return 1")
    write("b/net.py", "def make(): return 2")
    assert [result("a/net.py:make"), result("b/net.py:make")] == [1, 2]


def test_an_edited_file_is_loaded_again_and_an_unchanged_one_is_not() -> None:
    write("net.py", "def make(): return 1")
    assert resolve("net.py:make") is resolve("net.py:make")
    write("net.py", "def make(): return 2")
    assert result("net.py:make") == 2


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("missing.py:make", "'missing.py:make': there is no file '"),
        ("folder.py:make", "'folder.py:make': there is no file '"),
        ("no_such_module:make", "there is no module 'no_such_module' in the working folder or"),
        ("json.no_such:make", "there is no module 'json.no_such' in the working folder or"),
        ("net.py:mak", "'net.py:mak': there is no 'mak' in it (did you mean 'make'?)"),
        ("net.py:other", "'net.py:other': there is no 'other' in it"),
        ("net.py:SIZE", "'net.py:SIZE' is of type int: it must be a function or a class"),
        ("raises.py:make", "'raises.py:make' can't be imported: KeyError: 'a b'"),
        ("raises:make", "'raises:make' can't be imported: KeyError: 'a b'"),
        ("needs.py:make", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("needs:make", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("broken.py:make", "can't be imported: SyntaxError: '(' was never closed"),
        ("script.py:make", "can't be imported: SystemExit: 3"),
        ("net.py", "'net.py' is neither package.module:name nor file.py:name"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(reference: str, reason: str) -> None:
    Path("folder.py").mkdir()
    write("net.py", "SIZE = 3\ndef make(): return 1")
    write("raises.py", "raise KeyError('a b')")
    write("needs.py", "import no_such_package")
    write("broken.py", "make = (")
    write("script.py", "import sys\nsys.exit(3)")
    assert reason in refusal(reference)


def test_a_file_that_failed_can_be_mended() -> None:
    write("net.py", "raise OSError('one\\nline')")
    assert refusal("net.py:make").endswith("OSError: one line")
    write("net.py", "def make(): return 4")
    assert result("net.py:make") == 4


def test_the_digest_is_that_of_the_file_that_defines_the_function() -> None:
    file = write("own/place_of_make.py", "def make(): return 1")
    write("own/net.py", "from place_of_make import make\ndef other(): return make()")
    assert digest_of("own/net.py:make") == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (
        digest_of("own/net.py:other") == hashlib.sha256(Path("own/net.py").read_bytes()).hexdigest()
    )


def test_the_digest_of_an_object_or_a_decorated_function_is_that_of_its_file() -> None:
    text = "import functools\ndef make(size): return size\nten = functools.partial(make, 10)\n"
    file = write("net.py", f"{text}@functools.cache\ndef cached(): return 1")
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest_of("net.py:ten") == digest_of("net.py:cached") == expected


def test_code_without_a_file_has_no_digest() -> None:
    with pytest.raises(ValueError, match="'builtins:print' is in no file"):
        digest_of("builtins:print")
