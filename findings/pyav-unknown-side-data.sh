#!/usr/bin/env bash
# PyAV 18.1.0 cannot look at any side data of a frame that has a type of side data it does not know.
#
# A motion JPEG whose pictures carry EXIF (as cameras write them) decodes without an error. But
# FFmpeg attaches EXIF to the frame as side data of a type that PyAV's enum lacks, and then
# frame.side_data raises ValueError, also for who asks for another type, such as DISPLAYMATRIX.
# Seen on 2026-11-29 (av 18.1.0, numpy 2.4.6, Python 3.11, x86_64):
#     without EXIF: None
#     with EXIF: ValueError: 31 is not a valid Type
# The script fails if that changes. (Only the words before the number are compared.)
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
"$folder/env/bin/python" - "$folder" <<'PY'
import struct
import sys

import av
import numpy as np

tags = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x112, 3, 1, 1, 0)     # one tag: upright
exif = b"\xff\xe1" + struct.pack(">H", len(tags) + 8) + b"Exif\0\0" + tags
found = {}
for name in ("without EXIF", "with EXIF"):
    path = f"{sys.argv[1]}/{name}.mov"
    with av.open(path, "w") as out:
        stream = out.add_stream("mjpeg", rate=10, width=64, height=48, pix_fmt="yuvj420p")
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 99, np.uint8), "rgb24")
        for packet in stream.encode(frame.reformat(format="yuvj420p")) + stream.encode(None):
            data = bytes(packet)
            copy = av.Packet(data[:2] + exif + data[2:] if name == "with EXIF" else data)
            copy.stream, copy.pts, copy.dts, copy.time_base = stream, 0, 0, packet.time_base
            out.mux(copy)
    with av.open(path) as container:
        picture = next(container.decode(video=0))
        try:
            found[name] = str(picture.side_data.get("DISPLAYMATRIX"))
        except ValueError as error:
            found[name] = f"ValueError: {error}"
    print(f"{name}: {found[name]}")
assert found["without EXIF"] == "None"
assert found["with EXIF"].startswith("ValueError") and "is not a valid Type" in found["with EXIF"]
PY
