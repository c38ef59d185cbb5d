"""What a run cost: device-hours, and energy where NVML can read it."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pynvml
import torch


class CostMeter:
    """Counts from its making; add what an earlier part of a resumed run had cost."""

    def __init__(self, device: torch.device, earlier_seconds: float = 0.0) -> None:
        self._device = device
        self._start = time.perf_counter() - earlier_seconds
        self._handle = _nvml_handle(device)
        self._start_energy = self._energy()

    def read(self) -> dict[str, float]:
        """Seconds, device-hours (GPU, or CPU threads), and GPU energy in watt-hours where it is known."""
        seconds = time.perf_counter() - self._start
        if self._device.type == "cuda":
            cost = {"seconds": seconds, "gpu_hours": seconds / 3600}
            energy = self._energy()
            if energy is not None and self._start_energy is not None:
                cost["gpu_watt_hours"] = (energy - self._start_energy) / 3.6e6
            return cost
        return {"seconds": seconds, "cpu_core_hours": seconds / 3600 * torch.get_num_threads()}

    def _energy(self) -> float | None:
        """Millijoules since the driver was loaded."""
        if self._handle is None:
            return None
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except pynvml.NVMLError:
            return None


def _nvml_handle(device: torch.device) -> object | None:
    if device.type != "cuda":
        return None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None


def device_name(device: torch.device) -> str:
    """What a result should name: the GPU, or the CPU's model and its threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def cpu_name() -> str:
    """The CPU's model as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
