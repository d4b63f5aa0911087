#!/usr/bin/env bash
# FFmpeg's scaler, as PyAV 18.1.0 ships it, is one level too dark at even widths.
#
# A white 4:2:0 picture (Y 235, the white of the limited range) is made smaller and converted to RGB
# in one call. Right is 255 at every width.
# Seen on 2026-11-29 (av 18.1.0, numpy 2.4.6, Python 3.11, x86_64):
#     interpolation AREA                    width 90: 253    width 91: 255
#     AREA | FULL_CHR_H_INT | ACCURATE_RND  width 90: 255    width 91: 255
# With AREA alone the chroma of even widths is scaled at half the width, too. The script fails if
# any of these values changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

frame = av.VideoFrame(320, 240, "yuv420p")
for plane, value in zip(frame.planes, (235, 128, 128)):
    plane.update(bytes([value]) * plane.buffer_size)
exact = Interpolation.AREA | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
found = {}
for name, flags in (("AREA", int(Interpolation.AREA)), ("exact", int(exact))):
    for width in (90, 91):
        small = VideoReformatter().reformat(frame, width, 68, "rgb24", interpolation=flags)
        found[name, width] = int(np.median(small.to_ndarray()))
print(found)
assert found == {("AREA", 90): 253, ("AREA", 91): 255, ("exact", 90): 255, ("exact", 91): 255}
PY
