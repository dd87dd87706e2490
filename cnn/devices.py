"""The hardware of this machine: processor cores, GPUs, fast arithmetic."""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def resolve_device(name: str) -> str:
    """Return the device that `auto` means, or check that the named one exists.

    Raises:
        ValueError: there is no such device; the message lists those there are.
    """
    import torch

    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return "cuda" if len(available) > 1 else "cpu"
    if name in available or (name == "cuda" and len(available) > 1):
        return name
    raise ValueError(f"device {name!r} is not here: choose auto, or one of {', '.join(available)}")


def resolve_precision(name: str, device: str) -> str:
    """Return the precision that `auto` means on a device: bfloat16 where that is faster.

    It is faster on GPUs since Ampere and on processors with bfloat16 units (AMX, AVX-512).
    """
    import torch

    from cnn.config import PRECISIONS, check_choice

    if name != "auto":
        check_choice("precision", name, ["auto", *PRECISIONS])
        return name
    if device.startswith("cuda"):
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = any(bfloat16_units().values())
    return "bfloat16" if fast else "float32"


def num_cores() -> int:
    """Return how many cores this process may use, by its affinity and its quota.

    A fraction of a core counts as one core.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cpu_quota())))


def _cpu_quota() -> float:
    """Return the CPU quota of this process in cores, set by Linux control groups (containers).

    It is the minimum over its group and the visible parents. A container may see its own group as
    the top of the mount, whatever the path says. (Kernel documentation: admin-guide/cgroup-v2,
    `cpu.max`; scheduler/sched-bwc, `cpu.cfs_quota_us`.)
    """
    try:
        groups = [line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return math.inf
    least = math.inf
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mounted in (controllers or ".", "cpu" if controllers else "unified"):
            group = _CGROUPS / mounted / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(_CGROUPS):
                    least = min(least, _quota_in(folder))
    return least


def _quota_in(group: Path) -> float:
    """Return the quota of one control group in cores, from its files of either version."""
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if int(quota) < 0 else int(quota) / int(period)
    return math.inf


def bfloat16_units() -> dict[str, bool]:
    """Return whether this processor has each unit for fast bfloat16 products, by name."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return {
        "AMX": bool(capabilities.get("amx_tile")),
        "AVX-512 bfloat16": bool(capabilities.get("avx512_bf16")),
    }


def machine() -> str:
    """Return the parts of this machine that matter for speed, as text."""
    import torch

    return f"{num_cores()} cores of {processor()}, PyTorch {torch.__version__}"


def processor(device: str = "cpu") -> str:
    """Return the name of the processor or GPU that computes, with its units for bfloat16."""
    import torch

    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    units = bfloat16_units().items()
    has = ", ".join(unit if there else f"no {unit}" for unit, there in units)
    return f"{name} ({has})"
