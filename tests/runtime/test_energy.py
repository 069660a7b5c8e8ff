"""The energy of GPUs, by a stand-in for the driver's library."""

from types import SimpleNamespace

import jax
import pytest

from cosmos3_jax.runtime import energy


class Library:
    """NVML of three boards that have drawn 1, 2 and 3 kJ."""

    drawn = {"0": 1_000_000, "1": 2_000_000, "2": 3_000_000, "GPU-b": 2_000_000}

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        return self._handle(str(index), handle)

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        return self._handle(name.decode(), handle)

    def _handle(self, name, handle):
        if name not in self.drawn:
            return 2  # an invalid argument
        handle._obj.value = 1 + list(self.drawn).index(name)
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, found):
        found._obj.value = list(self.drawn.values())[handle.value - 1]
        return 0


class OldLibrary(Library):
    nvmlDeviceGetTotalEnergyConsumption = property()  # AttributeError, as of a missing function


def gpu(index):
    return SimpleNamespace(platform="gpu", local_hardware_id=index)


@pytest.mark.parametrize(
    "visible, devices, expected",
    [
        (None, [0], 1000), ("", [1], 2000), (None, [0, 2], 4000), ("2,0", [0], 3000),
        ("2, 0", [0, 1], 4000), ("GPU-b", [0], 2000), ("7", [0], None), (None, [0, 5], None),
        (None, [], None),
    ],
)  # fmt: skip
def test_the_boards_of_our_devices_are_read(monkeypatch, visible, devices, expected):
    monkeypatch.setattr(energy, "nvml", Library)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert energy.joules(map(gpu, devices)) == expected


def test_where_nobody_counts_there_is_none(monkeypatch):
    assert energy.joules(jax.local_devices()) is None
    monkeypatch.setattr(energy, "nvml", OldLibrary)
    assert energy.joules([gpu(0)]) is None
    monkeypatch.undo()
    monkeypatch.setattr(energy, "LIBRARY", "no-such-library.so")
    energy.nvml.cache_clear()
    assert energy.joules([gpu(0)]) is None
    energy.nvml.cache_clear()
