"""Machine code of kernels: kept in files, put into memory by LLVM's linker. A start that finds all of it does without numba,
whose import alone takes longer than loading them. Files are in the user's cache, or came with this package (see `ship`).

An object is one exported C function of int64 words that returns one, see `compile`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from dsv3_cpu.processor import fingerprint, level, sources

_DIGEST = 32  # bytes before the object: its sha256
_lock = threading.RLock()


@functools.cache
def cache_folder() -> Path | None:
    """Where machine code is kept: NUMBA_CACHE_DIR, else dsv3/numba in the user's cache, by what it depends on. None if it
    cannot be written."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        root = Path(chosen)
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3" / "numba"
    folder = root / f"dsv3-cpu-{fingerprint()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def installed_folder(level: str) -> Path:
    """Where objects for processors of a level are that came with this package, made of these sources (see `ship`)."""
    return Path(__file__).with_name("_objects") / f"{sys.platform}-{level}-{sources().hex()[:16]}"


@functools.cache
def _folders() -> tuple[Path, ...]:
    name = level()
    return tuple(folder for folder in (cache_folder(), installed_folder(name) if name else None) if folder is not None)


def is_there(name: str) -> bool:
    """Whether a kernel's object is in a file, damaged or not."""
    return any((folder / file_of(name)).exists() for folder in _folders())


def file_of(name: str) -> str:
    """What the file with a kernel's object is called."""
    return f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.o"


def read(name: str) -> bytes | None:
    """An object from the cache, or else of those installed; None if it is not there or damaged."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            data = (folder / file_of(name)).read_bytes()
            digest, code = data[:_DIGEST], data[_DIGEST:]
            if code and hashlib.sha256(code).digest() == digest:
                return code
    return None


def keep(name: str, code: bytes) -> None:
    """Write an object into the cache, whole or not at all."""
    folder = cache_folder()
    if folder is None:
        return
    path = folder / file_of(name)
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with open(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def link(name: str, code: bytes) -> int:
    """The address of the function `name` that an object exports."""
    with _lock:
        engine = _engine()
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        address: int = engine.get_function_address(name)
    if not address:
        raise RuntimeError(f"{name} is not in its object")
    return address


@functools.cache
def _engine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for name, address in _system():
        llvm.add_symbol(name, address)
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _system() -> list[tuple[str, int]]:
    """What kernels ask of the system, under names of our own: to let another thread run, and memory."""
    windows = sys.platform == "win32"
    process: Any = ctypes.CDLL("ucrtbase" if windows else None)
    threads: Any = ctypes.CDLL("kernel32") if windows else process
    functions = {"dsv3_yield": (threads, "SwitchToThread" if windows else "sched_yield")}
    functions |= {f"dsv3_{name}": (process, name) for name in ("malloc", "free")}
    found = [(ours, getattr(library, theirs)) for ours, (library, theirs) in functions.items()]
    return [(name, ctypes.cast(function, ctypes.c_void_p).value or 0) for name, function in found]
