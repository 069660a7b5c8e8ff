"""The energy that NVIDIA GPUs draw, by the counter of the driver's management library (NVML)."""

import ctypes
import functools
import os
from collections.abc import Iterable

import jax

LIBRARY = "libnvidia-ml.so.1"  # comes with the driver
SUCCESS = 0


def joules(devices: Iterable[jax.Device]) -> float | None:
    """What this process's devices have drawn together since the driver was loaded; the difference
    of two calls is the energy of what ran between.

    The counter is the board's, so it includes memory and whatever else runs there. It is renewed
    some times a second: what takes less than a second is measured roughly.

    Returns:
        Joules, or None where a device is no GPU, or has no such counter (before Volta).
    """
    read = [_millijoules(device) for device in devices]
    return None if None in read or not read else sum(read) / 1e3


@functools.cache
def nvml() -> ctypes.CDLL | None:
    """The library, ready; None where there is none."""
    try:
        library = ctypes.CDLL(LIBRARY)
        return library if library.nvmlInit_v2() == SUCCESS else None
    except (OSError, AttributeError):
        return None


def _millijoules(device: jax.Device) -> int | None:
    library = nvml() if device.platform == "gpu" else None
    if library is None:
        return None
    handle, found = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = visible_name(device.local_hardware_id, os.environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        if name.isdecimal():
            asked = library.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(handle))
        else:
            asked = library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        if asked != SUCCESS:
            return None
        read = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(found))
    except AttributeError:  # a driver without the counter
        return None
    return found.value if read == SUCCESS else None


def visible_name(index: int, visible: str | None) -> str:
    """The number or identity by which NVML knows CUDA's device `index`.

    CUDA counts the GPUs that `visible` (`CUDA_VISIBLE_DEVICES`) names, and NVML all of them. Both
    go by the places on the bus if the GPUs are alike, or if `CUDA_DEVICE_ORDER` is `PCI_BUS_ID`.
    """
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    return names[index] if index < len(names) else str(index)
