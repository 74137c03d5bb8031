"""What a backend author sees: the only part of dsv3 with a stability promise. Importing it costs no torch."""

from dsv3.plugin.backend import ABI, ENTRY_POINT_GROUP, Backend, BackendBase
from dsv3.plugin.device import Capability, Device, Probe
from dsv3.plugin.kernel import Call, Kernel
from dsv3.plugin.needs import Arch, AtLeast, AtMost, Divides, DType, Feature, Scheme
from dsv3.plugin.weights import CacheSpec, KvDType, KvEncoding, LatentCache, Prepared, Quant

__all__ = [
    "ABI",
    "ENTRY_POINT_GROUP",
    "Arch",
    "AtLeast",
    "AtMost",
    "Backend",
    "BackendBase",
    "CacheSpec",
    "Call",
    "Capability",
    "DType",
    "Device",
    "Divides",
    "Feature",
    "Kernel",
    "KvDType",
    "KvEncoding",
    "LatentCache",
    "Prepared",
    "Probe",
    "Quant",
    "Scheme",
]
