"""Numbers brought into the order of planes and back, against torch's own reshaping and rounding."""

from __future__ import annotations

import numpy as np
import torch

from dsv3_cpu.kernels.order import pack, spread
from dsv3_cpu.processor import LANES
from dsv3_cpu.programs import Kernel

_WORK = 0  # one thread
_of_two, _of_four, _of_four_real = spread(2, True), spread(4, True), spread(4, False)


def _reorder(team, me, crew, half, real, two, four, four_real, factor, packed):  # type: ignore[no-untyped-def]
    _of_two(half.ctypes.data, half.shape[0], two.ctypes.data)
    _of_four(half.ctypes.data, half.shape[0], four.ctypes.data)
    _of_four_real(real.ctypes.data, real.shape[0], four_real.ctypes.data)
    pack(two.ctypes.data, np.float32(factor), two.shape[0], packed.ctypes.data)


def _planes(x: torch.Tensor, shared: int) -> torch.Tensor:
    return x.view(-1, LANES, shared).transpose(1, 2).reshape(-1)


def test_planes_and_back() -> None:
    """All bits of bfloat16, infinities and NaN among them, come back as they were; others are rounded as torch rounds."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    two, four, four_real = (np.empty(bits.size, np.float32) for _ in range(3))
    packed = np.empty_like(bits)
    kernel = Kernel("test_order.reorder", _reorder)
    kernel(_WORK, bits, values.numpy(), two, four, four_real, 1.0, packed)
    for found, shared in ((two, 2), (four, 4), (four_real, 4)):
        torch.testing.assert_close(torch.from_numpy(found), _planes(values, shared), rtol=0, atol=0, equal_nan=True)
    quiet = torch.where(values.isnan(), torch.from_numpy(bits.astype(np.int32)) | 0x40, torch.from_numpy(bits.astype(np.int32)))
    assert np.array_equal(packed, quiet.numpy().astype(np.uint16))
    kernel(_WORK, bits, values.numpy(), two, four, four_real, 1.0 / 3, packed)
    wanted = (values * np.float32(1.0 / 3)).to(torch.bfloat16)
    torch.testing.assert_close(
        torch.from_numpy(packed.view(np.int16)).view(torch.bfloat16), wanted, rtol=0, atol=0, equal_nan=True
    )
