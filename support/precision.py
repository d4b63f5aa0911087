"""The precision of the encoders, by what the hardware can compute."""

import torch


def choose_precision(choice, device):
    """Choose the dtype for autocast and say why: (dtype, reason).

    choice: "auto" | "bf16" | "fp16" | "fp32". "auto" takes bfloat16 on GPUs from SM 8.0 on and on
    CPUs with bf16 arithmetic, float16 on older GPUs, and float32 on other CPUs.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if choice in dtypes:
        return dtypes[choice], "as asked"
    if device.type == "cuda":
        # We do not ask torch.cuda.is_bf16_supported(): it says yes on V100, where bf16 is emulated.
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"{torch.cuda.get_device_name(device)}, SM {major}.{minor}"
        return torch.bfloat16 if major >= 8 else torch.float16, reason
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    reason = f"no GPU is visible; CPU {'with' if bf16 else 'without'} bf16 arithmetic"
    return torch.bfloat16 if bf16 else torch.float32, reason


def autocast(device, dtype):
    """The autocast context of a dtype. It does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
