"""Settings in order: flag, `DSV3_*` variable, TOML file, default. The only place that reads the environment.

An unknown variable or key is an error with the nearest match: a setting that is silently ignored is worse than none.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.errors import UsageError, nearest

PREFIX = "DSV3_"
# Read elsewhere or by the tests; not settings of a command.
OTHER_VARIABLES = {
    "DSV3_CONFIG": "path of the TOML file",
    "DSV3_TEST_DATA": "folder of the tests' data",
    "DSV3_BUILD_KERNELS": "while dsv3 is installed: which kernels of the CPU backend are compiled",
    "DSV3_CPU_PIN": "1: the CPU backend's threads stay on one processor each",
    "DSV3_API_KEYS": "keys of dsv3 serve, separated by commas",
}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def _flag(text: str) -> bool:
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise ValueError(f"expected one of {', '.join(_TRUE + _FALSE[:-1])}")


@dataclass(frozen=True)
class Setting:
    """A setting's name, how text becomes its value, its default, and what it is for."""

    name: str
    convert: Callable[[str], Any]
    default: Any
    help: str


SETTINGS: dict[str, Setting] = {
    s.name: s
    for s in (
        Setting("model", str, "demo", "checkpoint folder; 'demo' is the bundled one"),
        Setting("backend", str, "auto", "backend by name, or auto"),
        Setting("device", str, None, "device as family:index, such as cuda:1"),
        Setting("dtype", str, None, "of activations: float64, float32 or bfloat16 (default: the checkpoint's)"),
        Setting("quant", str, None, "how linears and experts are kept (default: as stored)"),
        Setting("kv_dtype", str, None, "of the latent cache (default: dtype)"),
        Setting("strict", _flag, False, "a fallback to the reference is an error"),
        Setting("threads", int, None, "CPU threads (default: torch's)"),
        Setting("max_new_tokens", int, 200, "tokens to generate at most"),
        Setting("temperature", float, 0.0, "0 is greedy"),
        Setting("top_p", float, 1.0, "sample from the smallest set of tokens with this probability"),
        Setting("seed", int, None, "of the sampling noise (default: random)"),
        Setting("draft", str, None, "mtp: guess with the MTP module and verify; same text, fewer steps"),
        Setting("tuning_dir", str, None, "folder of dsv3 tune's measurements (default: dsv3/tuning in $XDG_DATA_HOME)"),
        Setting("check", _flag, False, "compare every call with its reference; print the first divergence (slow)"),
        Setting("debug", _flag, False, "show tracebacks"),
    )
}


@dataclass(frozen=True)
class Resolved:
    """A setting's value, and where it came from."""

    value: Any
    source: str


def environment() -> dict[str, str]:
    """A copy of the process's environment, for processes started with a changed one and for comparing before and after."""
    return dict(os.environ)


# OpenMP's own are some hundred thousand turns of a loop (GNU) and 200 ms (LLVM, whose effect here was not measured).
_WAITS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
_waits_set: list[str] = []


def shorten_waits() -> None:
    """Have OpenMP's threads, which torch's operators use, sleep soon after their work, if torch is not loaded yet and the user
    has not said how they should wait. Watching for more work they would keep processors from a backend's own threads: on two
    cores, prefill and steps of several sequences took up to twice as long."""
    if "torch" in sys.modules or any(name in os.environ for name in ("OMP_WAIT_POLICY", *_WAITS)):
        return
    os.environ.update(_WAITS)
    _waits_set.extend(_WAITS)


def without_our_waits(variables: dict[str, str]) -> dict[str, str]:
    """An environment for other engines: as it was before `shorten_waits`."""
    return {name: value for name, value in variables.items() if name not in _waits_set}


def state_folder() -> Path:
    """dsv3 in the user's folder of state: what programs remember from run to run."""
    root = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        return Path(root).expanduser() / "dsv3"
    except RuntimeError as error:  # ~ of a user who does not exist
        raise UsageError(f"the folder of state {root!r}: {error}; set XDG_STATE_HOME to a folder") from error


def environment_keys() -> str | None:
    """DSV3_API_KEYS: what a command line must not show."""
    return os.environ.get("DSV3_API_KEYS")


def config_path() -> Path:
    """The TOML file: $DSV3_CONFIG, else dsv3/config.toml in the user's configuration folder."""
    named = os.environ.get("DSV3_CONFIG")
    root = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    try:
        return Path(named).expanduser() if named else Path(root).expanduser() / "dsv3" / "config.toml"
    except RuntimeError as error:  # ~ of a user who does not exist
        raise UsageError(f"the folder of settings {named or root!r}: {error}; set DSV3_CONFIG to a file") from error


def tuning_folder(flag: str | None = None) -> Path:
    """Where `dsv3 tune` keeps its measurements: the flag, else $DSV3_TUNING_DIR, else tuning_dir of the TOML file, else
    dsv3/tuning in the user's data folder."""
    named = flag or os.environ.get(PREFIX + "TUNING_DIR")
    if not named and "tuning_dir" in (table := _file()):
        named = _typed(SETTINGS["tuning_dir"], table["tuning_dir"], config_path())
    root = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    try:
        return Path(named).expanduser() if named else Path(root).expanduser() / "dsv3" / "tuning"
    except RuntimeError as error:  # ~ of a user who does not exist
        raise UsageError(f"the folder of tuning data {named or root!r}: {error}; set DSV3_TUNING_DIR to a folder") from error


def resolve(flags: Mapping[str, Any]) -> dict[str, Resolved]:
    """Every setting; flags that are None count as not given. UsageError for an unknown variable or key, or a bad value."""
    variables = _variables()
    path, table = config_path(), _file()
    found: dict[str, Resolved] = {}
    for name, setting in SETTINGS.items():
        variable = PREFIX + name.upper()
        if flags.get(name) is not None:
            found[name] = Resolved(flags[name], "flag")
        elif variable in variables:
            found[name] = Resolved(_converted(setting, variables[variable], variable), variable)
        elif name in table:
            found[name] = Resolved(_typed(setting, table[name], path), str(path))
        else:
            found[name] = Resolved(setting.default, "default")
    return found


def variable(name: str) -> Any:
    """A setting as its variable alone has it, else its default: for the library, which reads no file. UsageError for a bad
    value."""
    setting, key = SETTINGS[name], PREFIX + name.upper()
    text = os.environ.get(key)
    return _converted(setting, text, key) if text else setting.default


def _variables() -> dict[str, str]:
    known = {PREFIX + name.upper() for name in SETTINGS} | OTHER_VARIABLES.keys()
    # An empty variable counts as unset, as in a shell.
    present = {k: v for k, v in os.environ.items() if k.startswith(PREFIX) and v}
    for name in present:
        if name not in known:
            words = {k.removeprefix(PREFIX): k for k in known}
            hint = nearest(name.removeprefix(PREFIX), words).replace("mean '", f"mean '{PREFIX}")
            raise UsageError(f"environment variable {name} is not a setting of dsv3{hint}; unset it")
    return present


def _file() -> dict[str, Any]:
    path = config_path()
    if not path.exists():
        if os.environ.get("DSV3_CONFIG"):
            raise UsageError(f"DSV3_CONFIG names {path}, which does not exist; create it or unset the variable")
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}; correct the file or move it away") from error
    for key in table:
        if key not in SETTINGS:
            raise UsageError(f"{path}: unknown key {key!r}{nearest(key, SETTINGS)}")
    return table


def _converted(setting: Setting, text: str, where: str) -> Any:
    try:
        return setting.convert(text)
    except ValueError as error:
        raise UsageError(f"{where}={text!r}: {error}; it sets {setting.name}: {setting.help}") from error


def _typed(setting: Setting, value: Any, path: Path) -> Any:
    if not isinstance(value, str | int | float):
        raise UsageError(f"{path}: {setting.name} is {value!r}; expected one value; it sets: {setting.help}")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return _converted(setting, text, f"{path}: {setting.name}")
