"""What machine this is, as far as it matters for speed and results."""

from __future__ import annotations

import platform
from pathlib import Path

from tracking.ahead import num_cores


def machine() -> str:
    """Return what this machine is, as far as it matters for speed."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    fast = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX-512 bfloat16": torch.cpu._is_avx512_bf16_supported(),
    }
    has = ", ".join(feature if there else f"no {feature}" for feature, there in fast.items())
    return f"{num_cores()} cores of {name} ({has}), PyTorch {torch.__version__}"
