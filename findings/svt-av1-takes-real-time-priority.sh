#!/usr/bin/env bash
# SVT-AV1 (in PyAV 18.1.0) gives root's process a real-time priority and leaves it there.
#
# Opening the AV1 encoder as root (the user of most containers) moves the calling thread from the
# normal scheduler to SCHED_FIFO with priority 99, and closing it does not move it back. Processes
# that are started afterwards inherit that: spinning threads of theirs then keep all others from the
# cores. os.sched_setscheduler with what was in force before undoes it.
# Seen on 2026-11-30 (av 18.1.0, numpy 2.4.6, Python 3.11, x86_64, root):
#     libx264: normal
#     libsvtav1: SCHED_FIFO, priority 99
# The script needs root, and fails if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
for encoder in libx264 libsvtav1; do
    "$folder/env/bin/python" - "$folder/$encoder.mkv" "$encoder" <<'PY'
import os
import sys

import av
import numpy as np

path, encoder = sys.argv[1:]
assert os.geteuid() == 0, "run this as root"
assert os.sched_getscheduler(0) == os.SCHED_OTHER
with av.open(path, "w") as out:
    stream = out.add_stream(encoder, rate=10, width=64, height=64, pix_fmt="yuv420p")
    frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
    out.mux(stream.encode(frame) + stream.encode(None))
normal = os.sched_getscheduler(0) == os.SCHED_OTHER
priority = os.sched_getparam(0).sched_priority
assert normal if encoder == "libx264" else os.sched_getscheduler(0) == os.SCHED_FIFO
print(f"{encoder}: {'normal' if normal else f'SCHED_FIFO, priority {priority}'}")
assert normal or priority == 99
PY
done
