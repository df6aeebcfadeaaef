"""What this process computes on, by what torch says: for the worker."""

from __future__ import annotations

from shared.gpu.interrupt import imported
from shared.gpu.machine import on_cpu, ram
from shared.gpu.offload_engines import has_mmgp
from shared.gpu.planner import Machine

#: kind of quantized weights -> the operation in shared/gpu/kernels.py that multiplies them as they are
KERNELS = {"int8": "int8_linear", "svdq-int4": "svdq_int4_linear", "svdq-fp4": "svdq_fp4_linear"}


def read() -> Machine:
    """The card this process computes on, else the CPU. Raises Cancelled."""
    imported("torch")
    import torch

    if not torch.cuda.is_available():
        return on_cpu(bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    from shared.gpu import kernels

    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    ram_total, ram_free = ram()
    return Machine(
        name=properties.name,
        ram_total=ram_total,
        ram_free=ram_free,
        vram_total=total,
        # what this process holds already makes room for the next plan
        vram_free=free + torch.cuda.memory_reserved(device),
        capability=(properties.major, properties.minor),
        kernels=frozenset(kind for kind, op in KERNELS.items() if kernels.find(op, device)),
        mmgp=has_mmgp(),
    )
