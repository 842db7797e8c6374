"""Files of the command line: written whole or not at all, read only if they are what they claim."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOCK_NAME = ".lock"  # in a folder that one process at a time may use
PARTIAL = ".partial"  # ends the name of a file that is being written
MAX_REASON = 200  # characters: a message that quotes a whole file helps nobody


class CommandError(Exception):
    """What a command cannot do; the message is one line that names the file or the argument."""


def one_line(error: object) -> str:
    """What an error says, short enough for a terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."


def require(extra: str, *modules: str) -> None:
    """Raise a `CommandError` that says what to install, if one of these is not there."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed: pip install {_source(extra)}")


def _source(extra: str) -> str:
    """What pip installs this package with an extra from: where it came from itself."""
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").exists():
        return f'-e "{"." if checkout == Path.cwd() else checkout}[{extra}]"'
    from importlib import metadata  # which takes longer than all else that is imported here

    package = f"mapo-kernels[{extra}]"
    try:
        # PEP 610: pip writes it, but not of what comes from an index.
        text = metadata.distribution("mapo-kernels").read_text("direct_url.json")
        origin = json.loads(text or "")
        url, vcs = origin["url"], origin.get("vcs_info")
    except (metadata.PackageNotFoundError, ValueError, LookupError):
        return f'"{package}"'
    if vcs:
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f'"{package} @ {url}"'


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder that exists for this process; CommandError where another one has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK_NAME)
    with naming(folder / LOCK_NAME):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise CommandError(f"{folder}: another run is using it") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses into a `CommandError` about `path`."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or one_line(error)}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file and flush it to disk, or leave what was there; a link is replaced, not followed.

    Args:
        path: in a folder that exists.
        content: all of it.

    Raises:
        CommandError: it cannot be written, for example because the disk is full.
    """
    partial = path.with_name(path.name + PARTIAL)
    with naming(path):
        try:
            partial.unlink(missing_ok=True)  # of a run that was killed; never written through
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if path.is_file() and not path.is_symlink():
                shutil.copymode(path, partial)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's new names to disk, where the system can: Windows and some others cannot."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a matplotlib figure as PNG, by `write_whole`; `options` are those of `savefig`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    write_whole(path, buffer.getvalue())


def read_whole(path: Path) -> bytes:
    """A file's bytes; CommandError where it cannot be read, or is a device, a pipe or a folder."""
    with naming(path):
        # Reading a pipe or a device may never end.
        if path.exists() and not path.is_file():
            raise CommandError(f"{path}: expected a file, got something else")
        return path.read_bytes()


def check(value: Any, schema: dict[str, Any]) -> None:
    """Raise a ValueError of one line unless `value` follows a JSON schema."""
    from jsonschema import Draft202012Validator

    error = next(Draft202012Validator(schema).iter_errors(value), None)
    if error is not None:
        raise ValueError(f"{error.json_path}: {one_line(error.message)}")


def read_json(path: Path, schema: dict[str, Any], what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        schema: what it must follow.
        what: names it in the error, such as "a result file".

    Raises:
        CommandError: it cannot be read, is no JSON, or does not follow the schema.
    """
    content = read_whole(path)
    try:
        found = json.loads(content)
        check(found, schema)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path}: expected {what}, got {one_line(error)}") from error
    return found


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a record as a line of JSON, flushed to disk.

    Raises:
        CommandError: the file cannot be written to.
    """
    with naming(path), path.open("ab") as file:
        file.write((json.dumps(record, separators=(",", ":")) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a file with one a line; a last line that was cut off is left out.

    Raises:
        CommandError: the file cannot be read, or a line of it is no record.
    """
    records = []
    for number, line in enumerate(read_whole(path).split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
            check(records[-1], schema)
        except (ValueError, RecursionError) as error:
            reason = one_line(error)
            raise CommandError(f"{path}: line {number} is no record: {reason}") from error
    return records


def drop_cut_off_line(path: Path) -> None:
    """End a file of such lines with a whole one, so that another can be added."""
    whole, _, cut_off = read_whole(path).rpartition(b"\n")
    if cut_off:
        write_whole(path, whole + b"\n" if whole else b"")
