"""Backends with one fault each that level L0 must find."""

from __future__ import annotations

KERNEL = "def kernels(self, device):\n    return [Kernel({})]\n"
RMS = "def rms_norm(x, weight, eps):\n    return x\n"
LAYOUT = KERNEL.format("'quant_linear', 'k', 'made_kernels:f', layouts={'w': 'turned'}, needs=(Scheme('none'),)") + (
    "def prepare(self, w, layout, device):\n    import dataclasses\n"
    "    return dataclasses.replace(w, layout=layout, tensors={'weight': w.tensors['weight'].T.contiguous()})\n"
)
LINEAR = "def f(x, w):\n    return x\n"
# name -> (body of the backend, its kernel module, the case that must fail, words of its message)
FAULTS: dict[str, tuple[str, str, str, str]] = {
    "devices_raise": ("def devices(self, emulate=None):\n    1 / 0", "", "l0/devices", "ZeroDivisionError"),
    "devices_exit": ("def devices(self, emulate=None):\n    raise SystemExit(4)", "", "l0/devices", "SystemExit: 4"),
    "devices_differ": (
        "n = 0\ndef devices(self, emulate=None):\n    Made.n += 1\n    return [Device('cpu', f'arch{self.n}')]",
        "", "l0/devices", "cpu (arch1) first and cpu (arch2) the second time",
    ),
    "devices_text": ("def devices(self, emulate=None):\n    return ['cpu']", "", "l0/devices", "no dsv3.plugin.Device"),
    "emulates_real": (
        "def devices(self, emulate=None):\n    return [Device('x', 'y')] if emulate else []", "", "l0/devices", "emulated=True",
    ),
    "probe_raises": ("def probe(self, device):\n    raise OSError('no driver')", "", "l0/probe", "OSError: no driver"),
    "probe_state": ("def probe(self, device):\n    return Probe('usabel')", "", "l0/probe", "did you mean 'usable'"),
    "probe_differs": (
        "n = 0\ndef probe(self, device):\n    Made.n += 1\n"
        "    return Probe('usable', Capability(frozenset({'float32'}), limits={'n': self.n}))",
        "", "l0/probe", "does not answer the same",
    ),
    "dtype_word": (
        "def probe(self, device):\n    return Probe('usable', Capability(frozenset({'float32', 'bfloat61'})))",
        "", "l0/capability", "did you mean 'bfloat16'",
    ),
    "no_activation": (
        "def probe(self, device):\n    return Probe('usable', Capability(frozenset({'int8'})))",
        "", "l0/capability", "takes no activations",
    ),
    "limit_text": (
        "def probe(self, device):\n    return Probe('usable', Capability(frozenset({'float32'}), limits={'shared': '64k'}))",
        "", "l0/capability", "'64k', not a whole number",
    ),
    "kernels_differ": (
        "n = 0\ndef kernels(self, device):\n    Made.n += 1\n"
        "    return [Kernel('rms_norm', f'k{self.n}', 'made_kernels:rms_norm')]",
        RMS, "l0/kernels-metadata", "not list the same",
    ),
    "kernels_hang": (
        "def kernels(self, device):\n    import time; time.sleep(9)", "", "l0/kernels-metadata", "no answer within 2 s",
    ),
    "unknown_op": (KERNEL.format("'rms_nrom', 'k', 'made_kernels:f'"), "", "l0/registration", "did you mean 'rms_norm'"),
    "numerics": (
        KERNEL.format("'rms_norm', 'k', 'made_kernels:rms_norm', numerics='bf16'"), RMS,
        "l0/registration", "has numerics 'bf16'",
    ),
    "no_module": (KERNEL.format("'rms_norm', 'k', 'no_such_module_x:f'"), "", "l0/targets", "No module named"),
    "target_raises": (
        KERNEL.format("'rms_norm', 'k', 'made_kernels:rms_norm'"), "raise SystemExit('licence')",
        "l0/targets", "SystemExit: licence",
    ),
    "no_function": (KERNEL.format("'rms_norm', 'k', 'made_kernels:rms'"), RMS, "l0/targets", "AttributeError"),
    "not_callable": (KERNEL.format("'rms_norm', 'k', 'made_kernels:f'"), "f = 3", "l0/targets", "not callable"),
    "signature": (
        KERNEL.format("'rms_norm', 'k', 'made_kernels:f'"), "def f(x, gamma, eps):\n    return x", "l0/signatures",
        "does not take the arguments of rms_norm",
    ),
    "positional": (
        KERNEL.format("'rms_norm', 'k', 'made_kernels:f'"), "def f(x, weight, eps, /):\n    return x", "l0/signatures",
        "does not take the arguments",
    ),
    "accepts_raises": (
        KERNEL.format("'quant_linear', 'k', 'made_kernels:f', accepts='made_kernels:a'"),
        LINEAR + "def a(call):\n    return call.dims['Q']", "l0/accepts", "KeyError",
    ),
    "accepts_bool": (
        KERNEL.format("'quant_linear', 'k', 'made_kernels:f', accepts='made_kernels:a'"),
        LINEAR + "def a(call):\n    return False", "l0/accepts", "neither None nor a reason",
    ),
    "accepts_moody": (
        KERNEL.format("'quant_linear', 'k', 'made_kernels:f', accepts='made_kernels:a'"),
        LINEAR + "seen = []\ndef a(call):\n    seen.append(1)\n    return 'odd' if len(seen) % 2 else None",
        "l0/accepts", "then None",
    ),
    "no_unprepare": (LAYOUT, LINEAR, "l0/layouts", "cannot undo layout 'turned'"),
    "inexact": (
        LAYOUT + "def unprepare(self, w):\n    import dataclasses\n    t = w.tensors['weight'].T.contiguous() * (1 + 2e-7)\n"
        "    return dataclasses.replace(w, layout='canonical', tensors={'weight': t})",
        LINEAR, "l0/layouts", "not the inverse of prepare: weight differs in",
    ),
    "transposed": (
        LAYOUT + "def unprepare(self, w):\n    import dataclasses\n    return dataclasses.replace(w, layout='canonical')",
        LINEAR, "l0/layouts", "expected torch.float",
    ),
    "all_schemes": (
        LAYOUT.replace(", needs=(Scheme('none'),)", "") + "def unprepare(self, w):\n    import dataclasses\n"
        "    return dataclasses.replace(w, layout='canonical', tensors={'weight': w.tensors['weight'].T.contiguous()})",
        LINEAR, "l0/layouts", "tensors weight; expected scale, weight",
    ),
    "changes_weight": (
        LAYOUT.replace("    return dataclasses", "    w.tensors['weight'].mul_(2)\n    return dataclasses"),
        LINEAR, "l0/layouts", "changes the weight it is given",
    ),
    "torch_device": ("def torch_device(self, device):\n    return 'nowhere'", "", "l0/torch-device", "nowhere"),
    "synchronize": (
        "def synchronize(self, device):\n    raise RuntimeError('lost')", "", "l0/torch-device", "RuntimeError: lost",
    ),
    "cache_spec": ("def cache_spec(self, device, kv):\n    return CacheSpec(0, kv)", "", "l0/cache-spec", "page_size 0"),
    "capture_text": ("def capture(self, step, device):\n    return 'graph'", "", "l0/capture", "neither None nor a callable"),
    "capture_stale": (
        "def capture(self, step, device):\n    step()\n    return lambda: None", "",
        "l0/capture", "gave 0 where its input makes it 6",
    ),
    "no_method": ("probe = None", "", "l0/interface", "its probe is NoneType, not a method"),
    "bad_name": ("name = 'made.up'", "", "l0/interface", "a pin OP=BACKEND.KERNEL could not name it"),
}  # fmt: skip
