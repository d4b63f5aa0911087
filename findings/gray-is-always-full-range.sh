#!/usr/bin/env bash
# FFmpeg's swscale (PyAV 18.1.0) takes gray pictures for full range, also if marked as limited.
#
# The same black (16) and white (235) of limited range, stored without loss (FFV1 in Matroska), once
# with colours and once in gray. Both files say limited range, and both decoders report it. With
# colours the conversion to RGB gives 0 and 255. In gray it gives 16 and 235: a washed-out picture.
# Seen on 2026-11-30 (av 18.1.0, numpy 2.4.6, Python 3.11, x86_64):
#     yuv444p, range 1: 0 and 255
#     yuv444p, range 2: 16 and 235
#     gray, range 1: 16 and 235
#     gray, range 2: 16 and 235
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
"$folder/env/bin/python" - "$folder" <<'PY'
import sys

import av
import numpy as np

luma = np.full((64, 64), 235, np.uint8)
luma[:, :32] = 16
planes = [luma, *[np.full((64, 64), 128, np.uint8)] * 2]
found = {}
for form in ("yuv444p", "gray"):
    for color_range in (1, 2):                                  # limited, full
        path = f"{sys.argv[1]}/{form}-{color_range}.mkv"
        with av.open(path, "w") as out:
            stream = out.add_stream("ffv1", rate=10, width=64, height=64, pix_fmt=form)
            stream.codec_context.color_range = color_range
            frame = av.VideoFrame(64, 64, form)
            frame.color_range = color_range
            for plane, content in zip(frame.planes, planes):
                plane.update(content.tobytes())
            out.mux(stream.encode(frame) + stream.encode(None))
        with av.open(path) as container:
            picture = next(container.decode(video=0))
        assert (picture.format.name, picture.color_range) == (form, color_range)
        shown = picture.to_ndarray(format="rgb24")
        found[form, color_range] = int(shown[8, 8, 0]), int(shown[8, 56, 0])
        black, white = found[form, color_range]
        print(f"{form}, range {color_range}: {black} and {white}")
assert found == {("yuv444p", 1): (0, 255), ("yuv444p", 2): (16, 235),
                 ("gray", 1): (16, 235), ("gray", 2): (16, 235)}
PY
