"""A user's own code, by reference: `package.module:name`, or `file.py:name`."""

import difflib
import hashlib
import importlib
import inspect
import sys
import threading
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is most like another, empty if none is like it."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_reference(text: str) -> bool:
    """Return whether a text has the form of a reference, not that of a name or a path."""
    place, colon, name = text.rpartition(":")
    is_place = place.endswith(".py") or all(part.isidentifier() for part in place.split("."))
    return bool(colon and name.isidentifier() and is_place)


def resolve(reference: str) -> Any:
    """Return what a reference names: a function, a class, or another object that can be called.

    Paths of files are relative to the working folder. A file that is not there may be in Python's
    path, as on Ray's nodes. A file's own folder is importable for it, and the working folder for a
    module.

    Raises:
        ValueError: there is no such file, module or name, importing it fails, or the object can't
            be called; in one line.
    """
    module, name = _module(reference)
    try:
        found: object = getattr(module, name)
    except AttributeError:
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        hint = did_you_mean(name, known)
        raise ValueError(f"{reference!r}: there is no {name!r} in it{hint}") from None
    if not callable(found):
        kind = type(found).__name__
        line = f"{reference!r} is of type {kind}: it must be a function or a class"
        raise ValueError(line)  # noqa: TRY004 -- one class for all bad input
    return found


def reference_to(found: Any) -> str:
    """Return the reference to a function or a class, for other processes.

    Raises:
        ValueError: it has no name at the top of a module or a script.
    """
    name, place = getattr(found, "__qualname__", ""), getattr(found, "__module__", "")
    if not (inspect.isfunction(found) or inspect.isclass(found)) or not name.isidentifier():
        raise ValueError(
            f"{name or type(found).__name__!r} has no name that other processes could find: give a "
            "function or a class that is defined at the top of a file, or a text such as "
            "'file.py:name'"
        )
    module = sys.modules.get(place)
    file = getattr(module, "__file__", None)
    if place == "__main__" and file is None:
        # Its source alone would lack the names that it uses.
        raise ValueError(
            f"{name!r} is defined in a notebook or at the prompt, where other processes can't "
            f"find it: put it into a file, say by `%%writefile mine.py` as the first line of its "
            f"cell, and give 'mine.py:{name}'"
        )
    if getattr(module, name, None) is not found:
        raise ValueError(f"{found!r} is not the {name!r} of its module {place!r}: give that")
    if file is None or not _is_private(place, Path(file)):
        return f"{place}:{name}"
    path = Path(file).absolute()
    is_below = path.is_relative_to(Path.cwd())
    return f"{path.relative_to(Path.cwd()) if is_below else path}:{name}"


def _is_private(place: str, file: Path) -> bool:
    """Return whether other processes may not find a module by its name, but by its file."""
    if place == "__main__" or isinstance(
        getattr(sys.modules[place], "__loader__", None), _FreshLoader
    ):
        return True
    return "." not in place and file.name != "__init__.py" and file.absolute().parent != Path.cwd()


class LoadedSoFarError(BaseException):
    """Ends the loading of a script, which keeps what it has defined so far."""


_loading = threading.local()


def stop_loading() -> None:
    """End the loading of a script for a reference, if this is called by the script meanwhile.

    So a script that defines a network and then starts a sweep needs no `if __name__ ==
    "__main__"`: other processes load it up to that start.
    """
    if getattr(_loading, "depth", 0):
        raise LoadedSoFarError


def module_path(reference: str) -> Path:
    """Return the file of a reference, or the folder of its outermost package.

    Raises ValueError as `resolve` does.
    """
    resolve(reference)
    place = reference.rpartition(":")[0]
    if place.endswith(".py"):
        return _find_file(Path(place))
    outermost = sys.modules[place.partition(".")[0]]
    folders = list(getattr(outermost, "__path__", ()))
    file = folders[0] if folders else outermost.__file__
    if file is None:
        raise ValueError(f"{reference!r} is in no file that could travel to other nodes")
    return Path(file).absolute()


def digest_of(reference: str) -> str:
    """Return the SHA-256 of the file that defines what a reference names, 64 hex digits.

    Other files that it imports are not covered. Raises ValueError as `resolve` does.
    """
    module = _module(reference)[0]
    found = inspect.unwrap(resolve(reference))
    if inspect.isfunction(found) or inspect.isclass(found):  # it may come from another module
        module = sys.modules.get(found.__module__, module)
    file = getattr(module, "__file__", None)
    if file is None:
        raise ValueError(f"{reference!r} is in no file: its code has no digest")
    return hashlib.sha256(_content(Path(file), reference)).hexdigest()


def _module(reference: str) -> tuple[ModuleType, str]:
    """Return the module of a reference, imported, and the name in it."""
    if not is_reference(reference):
        raise ValueError(f"{reference!r} is neither package.module:name nor file.py:name")
    place, _, name = reference.rpartition(":")
    if place.endswith(".py"):
        return _load_file(reference, _find_file(Path(place))), name
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(place), name
    except ModuleNotFoundError as error:
        if error.name and f"{place}.".startswith(f"{error.name}."):
            missing = f"there is no module {error.name!r}"
            raise ValueError(
                f"{reference!r}: {missing} in the working folder or Python's path"
            ) from (error)
        raise _failure(reference, error) from error
    except (Exception, SystemExit) as error:  # a module may raise anything, or be a script
        raise _failure(reference, error) from error


def _find_file(path: Path) -> Path:
    """Return a file in the working folder, or else in Python's path by its name."""
    places = [path, *(Path(folder, path.name) for folder in sys.path)]
    return next((each for each in places if each.is_file()), path).absolute()


def _load_file(reference: str, file: Path) -> ModuleType:
    """Return the module in a file, under a name of its path and content."""
    digest = hashlib.sha256(f"{file}\0".encode(errors="surrogateescape"))
    digest.update(_content(file, reference))
    # Of the content as well, so that a notebook gets the edited file.
    name = f"{file.stem}_{digest.hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _FreshLoader(name, str(file))
    spec = ModuleSpec(name, loader, origin=str(file))
    spec.has_location = True
    module = module_from_spec(spec)
    _make_importable(file.parent)
    sys.modules[name] = module  # dataclasses, for example, look their module up
    _loading.depth = getattr(_loading, "depth", 0) + 1
    try:
        loader.exec_module(module)
    except LoadedSoFarError:
        pass
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failure(reference, error) from error
    finally:
        _loading.depth -= 1
    return module


class _FreshLoader(SourceFileLoader):
    """Compiles the file as it is: cached bytecode may be of an edit in the same second."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the file."""
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # as for a script


def _content(file: Path, reference: str) -> bytes:
    try:
        if not file.is_file():
            raise ValueError(f"{reference!r}: there is no file {str(file)!r}")
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{reference!r}: can't read {str(file)!r}: {error.strerror}") from error


def _failure(reference: str, error: BaseException) -> ValueError:
    message = " ".join(str(error).split())
    return ValueError(f"{reference!r} can't be imported: {type(error).__name__}: {message}")
