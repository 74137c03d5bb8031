"""A checkpoint folder's configuration, and the presets that ship with dsv3. No torch."""

from __future__ import annotations

from pathlib import Path

from dsv3.checkpoint.layout import read_json
from dsv3.errors import CheckpointError, UsageError, nearest
from dsv3.graph.config import ModelConfig
from dsv3.graph.config_demo import from_demo, is_demo
from dsv3.graph.config_hf import from_hf
from dsv3.resources import resources

DEMO = "demo"


def presets() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(p.stem for p in resources("configs", "models").glob("*.json"))


def preset_config(name: str) -> ModelConfig:
    return _parse(resources("configs", "models", f"{name}.json"))


def model_folder(model: str, meta: bool) -> Path | None:
    """The folder that `model` names; None for a preset, which has a configuration but no weights.

    UsageError for a preset without device "meta", or a name that is neither.
    """
    if model == DEMO:
        return resources("configs", "demo")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name too long, a NUL byte
        raise UsageError(f"model {model!r}: {error}") from error
    if model in presets():
        if not meta:
            hint = f"`dsv3 explain --model {model}` or load(..., device='meta') plan it"
            raise UsageError(f"{model!r} is a configuration without weights; name a checkpoint's folder to run it; {hint}")
        return None
    if path.is_file():
        raise UsageError(f"{model!r} is a file; name the folder that holds config.json and the weights")
    names = [DEMO, *presets()]
    raise UsageError(f"model {model!r} is neither a folder nor one of {', '.join(names)}{nearest(model, names)}")


def folder_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint: config.json in Hugging Face's or the demo's form, or a lone config_*.json of
    the demo."""
    path = folder / "config.json"
    if not path.exists() and not path.is_symlink():
        demos = [p for p in sorted(folder.glob("config*.json")) if is_demo(read_json(p))]
        if len(demos) != 1:
            raise CheckpointError(f"{folder}: no config.json; copy the model's configuration into the folder")
        path = demos[0]
    return _parse(path)


def _parse(path: Path) -> ModelConfig:
    values = read_json(path)
    return from_demo(values, path.name) if is_demo(values) else from_hf(values, path.name)
