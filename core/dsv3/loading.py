"""The one path from a folder to a Model: configuration, checks, backend, binding, weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from dsv3.checkpoint.folder import folder_config, model_folder, preset_config
from dsv3.checkpoint.layout import has_weights, open_checkpoint
from dsv3.checkpoint.reader import Reader, check_plan
from dsv3.checkpoint.validate import LoadPlan, plan_load
from dsv3.engine.text import Tokenizer
from dsv3.errors import BackendUnavailable, UsageError, nearest
from dsv3.graph.config import ModelConfig
from dsv3.plugin import KvDType, Prepared, Quant
from dsv3.settings import tuning_folder, variable

if TYPE_CHECKING:
    import torch

    from dsv3.dispatch.choose import Source
    from dsv3.dispatch.decision import Binding, Layout
    from dsv3.dispatch.placement import Placement
    from dsv3.dispatch.site import Sites
    from dsv3.engine.model import Model
    from dsv3.graph.weights import ModelWeights

DTYPES = ("float64", "float32", "bfloat16")
# Below this size all contents are checked before torch is imported: a damaged small checkpoint is reported at once.
EARLY_CHECK_BYTES = 256 << 20


@dataclass
class _Formats:
    dtype: str
    quant: Quant
    kv_dtype: KvDType
    mtp_quant: Quant


def load(
    model: str,
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    quant: Quant | None = None,
    kv_dtype: KvDType | None = None,
    pins: Mapping[str, str] = {},
    strict: bool = False,
    mtp: bool = True,
    emulate: bool | str = False,
    threads: int | None = None,
    progress: bool | None = None,
    check: bool | None = None,
    selection: Mapping[str, Any] | None = None,
    graphs: bool | None = None,
) -> Model:
    """Load a checkpoint and bind its operators to kernels.

    model: a folder in Hugging Face's or DeepSeek's demo layout, "demo" for the bundled checkpoint, or a preset's name
    (only with device "meta"). backend: a name, or "auto". device: "cpu", "cuda:1", "npu:0"; "meta" builds everything
    in shapes only. dtype: of activations and unquantised weights ("float64", "float32", "bfloat16"; default: the
    checkpoint's). quant: how linears and experts are kept; None as stored, an FP8 checkpoint as fp8-w8a8 where the
    device has FP8 units, else fp8-w8a16. kv_dtype: of the latent cache (default: dtype). pins: operator ->
    "backend.kernel". strict: a fallback to the reference is an error. mtp: load the MTP modules. emulate: True or an
    architecture's name. threads: torch's CPU threads. progress: None shows it on a terminal.
    check: compare every call with its reference, see `Model.check_report`; None asks the variable DSV3_CHECK.
    selection: what `Placement.selection()` gave in another process: the same kernels are bound, and nothing is selected.
    graphs: capture decode steps and replay them: None where backend and kernels allow it, False never; a note in the placement
    says what stands against it. A checked model never does.

    Raises UsageError, BackendUnavailable, CheckpointError, UnsupportedModel.
    """
    checked = variable("check") if check is None else check
    asked = _Request(
        model, backend, device, dtype, quant, kv_dtype, pins, strict, mtp, emulate, bool(checked), selection, graphs=graphs
    )
    asked.check(threads)
    return _load(replace(asked, device=None if device == "meta" else device), device == "meta", threads, progress)


def place(
    model: str,
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    quant: Quant | None = None,
    kv_dtype: KvDType | None = None,
    pins: Mapping[str, str] = {},
    strict: bool = False,
    emulate: bool | str = False,
) -> Placement:
    """The placement that `load` with the same arguments would give, without reading weights: what `dsv3 explain` shows."""
    asked = _Request(model, backend, device, dtype, quant, kv_dtype, pins, strict, True, emulate)
    asked.check(None)
    return _load(asked, True, None, False).placement()


def load_on(
    source: Source,
    model: str,
    *,
    dtype: str | None = None,
    quant: Quant | None = None,
    kv_dtype: KvDType | None = None,
    strict: bool = False,
    mtp: bool = True,
    check: bool = False,
    graphs: bool | None = None,
) -> Model:
    """`load` on a backend and device that are at hand, which need not be installed: what the conformance suite calls."""
    asked = _Request(
        model, source.name, None, dtype, quant, kv_dtype, {}, strict, mtp, False, check, source=source, graphs=graphs
    )  # fmt: skip
    asked.check(None)
    return _load(asked, False, None, False)


def calls(
    model: str,
    *,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    quant: Quant | None = None,
    kv_dtype: KvDType | None = None,
    emulate: bool | str = False,
) -> tuple[Source, Sites]:
    """The source that `load` with the same arguments would choose, and the calls the model makes, without reading weights: what
    `dsv3 tune` measures. Raises as `load` does."""
    from dsv3.dispatch.choose import choose
    from dsv3.engine.trace import traced

    asked = _Request(model, backend, device, dtype, quant, kv_dtype, {}, False, True, emulate)
    asked.check(None)
    folder = model_folder(os.fspath(model), True)
    config = preset_config(model) if folder is None else folder_config(folder)
    plan = LoadPlan()
    if folder is not None and has_weights(folder):
        plan = plan_load(config, open_checkpoint(folder), folder, True)
    source = choose(backend, device, asked.emulated)
    chosen = _formats(config, source, dtype, quant, kv_dtype, plan)
    return source, traced(config, source, chosen.dtype, chosen.quant, chosen.kv_dtype, chosen.mtp_quant, True).sites


@dataclass(frozen=True)
class _Request:
    """What a caller asks for."""

    model: str
    backend: str
    device: str | None
    dtype: str | None
    quant: Quant | None
    kv_dtype: KvDType | None
    pins: Mapping[str, str]
    strict: bool
    mtp: bool
    emulate: bool | str
    compare: bool = False
    selection: Mapping[str, Any] | None = None
    source: Source | None = None  # a backend that is at hand already
    graphs: bool | None = None

    @property
    def emulated(self) -> str | None:
        """What `Backend.devices` gets."""
        return "default" if self.emulate is True else self.emulate or None

    def check(self, threads: int | None) -> None:
        """UsageError for an argument of the wrong type, or a word that is not known."""
        if not isinstance(self.model, str | os.PathLike):
            raise UsageError(f"model is {self.model!r}; expected a folder or a name")
        for name in ("backend", "device", "emulate"):
            value = getattr(self, name)
            optional = (name == "device" and value is None) or (name == "emulate" and isinstance(value, bool))
            if not optional and not isinstance(value, str):
                raise UsageError(f"{name} is {value!r}; expected a string")
        if not isinstance(self.pins, Mapping) or not all(isinstance(t, str) for pin in self.pins.items() for t in pin):
            raise UsageError(f"pins is {self.pins!r}; expected a mapping of operator to 'backend.kernel'")
        for what, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("quant", self.quant, get_args(Quant)),
            ("kv_dtype", self.kv_dtype, get_args(KvDType)),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{what} {value!r} is not one of {', '.join(known)}{nearest(str(value), known)}")
        if self.graphs not in (None, True, False):
            raise UsageError(f"graphs is {self.graphs!r}; expected True, False or nothing")
        if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= 4096):
            raise UsageError(f"threads is {threads!r}; expected an integer from 1 to 4096")


def _load(asked: _Request, meta: bool, threads: int | None, progress: bool | None) -> Model:
    model = os.fspath(asked.model)
    folder = model_folder(model, meta)
    config = preset_config(model) if folder is None else folder_config(folder)
    reader, plan, checked, tokenizer = Reader(), LoadPlan(), False, None
    if folder is not None:
        if not meta or has_weights(folder):
            plan = plan_load(config, open_checkpoint(folder), folder, asked.mtp)
        if not meta and (checked := plan.nbytes <= EARLY_CHECK_BYTES):
            check_plan(plan, reader)
        tokenizer = Tokenizer.from_folder(folder)

    import torch

    from dsv3.dispatch.choose import choose, torch_device
    from dsv3.dispatch.registration import BadRegistration
    from dsv3.dispatch.selection import selected_backend

    if threads is not None:
        torch.set_num_threads(threads)
    name = folder.name if folder is not None and model != "demo" else model
    rejected: dict[str, str] = {}
    if asked.selection is not None:
        asked = replace(asked, backend=selected_backend(asked.selection, asked.backend))
    while True:
        source = asked.source or choose(asked.backend, asked.device, asked.emulated, rejected)
        source.notes += [f"{name}: {reason}" for name, reason in rejected.items()]
        try:
            formats = _formats(config, source, asked.dtype, asked.quant, asked.kv_dtype, plan)
            device = torch.device("meta") if meta else torch_device(source)
            built, weights, binding, paths = _build(config, source, formats, asked, device, name)
            break
        except BadRegistration as error:
            if asked.backend != "auto" or source.name == "reference" or asked.source is not None:
                raise
            rejected[source.name] = str(error)
    built.tokenizer = tokenizer
    if not meta:
        _fill(config, weights, plan, reader, device, source, binding, paths, checked, progress)
    return built


def _formats(
    c: ModelConfig, source: Source, dtype: str | None, quant: Quant | None, kv: KvDType | None, plan: LoadPlan
) -> _Formats:
    """What was asked for, else what is stored. MTP modules that an FP8 checkpoint leaves in bf16 stay so."""
    chosen = dtype or c.torch_dtype
    stored: Quant = "none"
    if c.quant_method == "fp8":
        stored = "fp8-w8a8" if "fp8_mma" in source.capability.features else "fp8-w8a16"
    elif c.quant_method == "int4":
        stored = "int4-w4a16"
    elif c.quant_method != "none":
        stored = "int8-w8a8" if c.quant_activations else "int8-w8a16"
    mtp: Quant = "none" if plan.stored_real(c.num_hidden_layers) else stored
    return _Formats(chosen, quant or stored, kv or chosen, quant or mtp)  # type: ignore[arg-type]


def _build(
    config: ModelConfig, source: Source, formats: _Formats, asked: _Request, place: torch.device, name: str
) -> tuple[Model, ModelWeights, Binding, dict[int, str]]:
    """The model over meta weights, with every call site bound."""
    from dsv3.dispatch.bind import Binder
    from dsv3.dispatch.placement import Placement
    from dsv3.dispatch.select import Catalogue
    from dsv3.dispatch.selection import same_as
    from dsv3.engine.model import Model
    from dsv3.engine.trace import traced
    from dsv3.graph.weights import walk

    seen = traced(config, source, formats.dtype, formats.quant, formats.kv_dtype, formats.mtp_quant, asked.mtp)
    weights, spec, torch_dtype = seen.weights, seen.spec, seen.dtype
    chosen = Catalogue(source, tuning_folder())
    reference = chosen if source.name == "reference" else Catalogue(_reference_on(source))
    pinned = _pinned(asked, source, chosen, reference)
    binding = Binder(chosen, reference, pinned, asked.strict, asked.compare).bind(seen.sites, asked.selection)
    notes = binding.notes  # shared: what happens while running is added to it
    notes[:0] = [*source.notes, *(chosen.tuned.notes if chosen.tuned is not None else [])]
    if source.device.emulated:
        notes.append("emulated: values and indexing as on the device, neither its rounding in matrix units nor its speed")
    if spec.kv_dtype != formats.kv_dtype:
        text = f"backend {source.name!r} keeps its cache in {spec.kv_dtype}, not {formats.kv_dtype}"
        if asked.kv_dtype is not None:
            raise BackendUnavailable(f"{text}, as was asked for; leave kv_dtype out, or choose another backend")
        notes.append(text)
    placement = Placement(source.name, source.device, binding, name, formats.dtype, formats.quant, spec.kv_dtype, notes)
    if asked.selection is not None:
        same_as(placement, asked.selection)
    if asked.strict and (fallbacks := placement.fallbacks()):
        reasons = {d.op: "; ".join(f"{k}: {r}" for k, r in d.rejected) for _, _, d in placement.decisions() if d.fallback}
        listed = "; ".join(f"{op} ({reasons[op]})" for op in fallbacks)
        raise BackendUnavailable(
            f"strict: backend {source.name!r} leaves {len(fallbacks)} operators to the reference: {listed}"
        )
    paths = {id(value): path for path, _, _, value in walk(weights)}
    model = Model(
        config, seen.graph, seen.sample, placement, spec, source, place, torch_dtype, seen.decode, asked.graphs
    )  # fmt: skip
    return model, weights, binding, paths


def _reference_on(source: Source) -> Source:
    """The reference's kernels on the chosen device's tensors."""
    from dsv3.dispatch.choose import Source, named

    reference = named("reference", "cpu", None)
    return Source(reference.backend, source.device, reference.capability, reference.origin)


def _pinned(asked: _Request, source: Source, chosen: Any, reference: Any) -> dict[str, tuple[Any, str]]:
    """operator -> (catalogue, kernel name). UsageError for an unknown operator, BackendUnavailable for an unknown kernel."""
    from dsv3.dispatch.choose import named
    from dsv3.dispatch.registration import unknown_operator
    from dsv3.dispatch.select import Catalogue
    from dsv3.ops import names

    catalogues = {source.name: chosen, "reference": reference}
    found = {}
    for op, pin in asked.pins.items():
        if op not in names():
            raise unknown_operator(op)
        m = re.fullmatch(r"([\w-]+)\.(.+)", str(pin))
        if m is None:
            raise UsageError(f"pin {op}={pin!r} is not BACKEND.KERNEL")
        backend, kernel = m.groups()
        if backend not in catalogues:
            here = source.device
            other = named(backend, f"{here.family}:{here.index}", asked.emulated)
            if (here.emulated or other.device.emulated) and other.device.arch != here.arch:
                raise BackendUnavailable(f"pin {op}={pin}: backend {backend!r} is on {other.device}, this model on {here}")
            catalogues[backend] = Catalogue(other)
        offered = [k.name for k in catalogues[backend].kernels.get(op, ())]
        if kernel not in offered:
            listed = ", ".join(offered) or "none"
            raise BackendUnavailable(f"backend {backend!r} has no kernel {kernel!r} for {op}; it has {listed}")
        found[op] = (catalogues[backend], kernel)
    return found


def _fill(
    config: ModelConfig,
    weights: ModelWeights,
    plan: LoadPlan,
    reader: Reader,
    place: torch.device,
    source: Source,
    binding: Binding,
    paths: Mapping[int, str],
    checked: bool,
    progress: bool | None,
) -> None:
    """Stream the weights into the tree, each prepared in the layout that binding fixed."""
    from dsv3.checkpoint.loader import load_weights
    from dsv3.dispatch.choose import named
    from dsv3.dispatch.guard import root_cause
    from dsv3.dispatch.wellformed import prepared_mistake
    from dsv3.graph.weights import absorbed
    from dsv3.graph.yarn import cos_sin_table

    layouts: dict[str, Layout] = {paths[i]: layout for i, layout in binding.layouts.items() if i in paths}
    views: dict[str, tuple[Any, Any]] = {}

    def prepare(path: str, weight: Prepared) -> Prepared:
        if path.endswith(".kv_b"):
            views[path.rpartition(".")[0]] = absorbed(config, weight.tensors["weight"])
        layout = layouts.get(path)
        if layout is None:
            return weight
        owner = source.backend if layout.backend == source.name else named(layout.backend, None, None).backend
        what = f"preparing {path} {list(weight.shape)} {weight.quant} as {layout.name!r} by backend {layout.backend!r}"
        try:
            prepared = owner.prepare(weight, layout.name, source.device)
        except Exception as error:
            raise BackendUnavailable(f"{root_cause(error)} ({what})") from error
        if mistake := prepared_mistake(prepared, weight, layout.name):
            raise BackendUnavailable(f"{what} gave {mistake}")
        return prepared

    weights.cos_sin = cos_sin_table(config, place)
    load_weights(weights, plan, reader, place, prepare, checked, progress)
    layers = {f"layers.{i}.attn": layer for i, layer in enumerate(weights.layers)}
    layers |= {f"mtp.{k}.layer.attn": m.layer for k, m in enumerate(weights.mtp)}
    for path, layer in layers.items():
        layer.attn.w_uk, layer.attn.w_uv = views[path]
