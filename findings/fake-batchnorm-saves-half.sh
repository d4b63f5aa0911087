#!/usr/bin/env bash
# A fake BatchNorm holds other bytes for the backward pass than a real one.
#
# torch counts memory without values by fake tensors (FakeTensorMode). Under autocast to float16 on
# a CPU, BatchNorm keeps mean and inverse deviation of the batch in float32, but its fake twin says
# float16. So what is counted is a bit too small: 4 bytes for each channel of each BatchNorm.
# In float32 both agree.
#
# Seen with torch 2.14.1, numpy 2.4.6, Python 3.11, Linux x86-64, on 2026-11-30:
#     float32 real 16704 bytes, fake 16704 bytes
#     float16 real 8512 bytes, fake 8448 bytes
# It installs 6 GB into a temporary folder, and fails if the two become equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def held(mode, dtype):
    """Bytes that one BatchNorm of 16 channels keeps for its backward pass."""
    kept = []

    def keep(x):
        kept.append(x.nbytes)
        return x

    with mode:
        norm = torch.nn.BatchNorm2d(16)
        x = torch.randn(4, 16, 8, 8, requires_grad=True).to(dtype)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
                norm(x)
    return sum(kept)


found = {}
for dtype in (torch.float32, torch.float16):
    found[dtype] = held(nullcontext(), dtype), held(FakeTensorMode(), dtype)
    print(str(dtype)[6:], "real %d bytes, fake %d bytes" % found[dtype])
assert found[torch.float32][0] == found[torch.float32][1]
assert found[torch.float16][0] - found[torch.float16][1] == 2 * 2 * 16
PYTHON
