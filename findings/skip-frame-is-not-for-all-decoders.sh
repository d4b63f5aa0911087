#!/usr/bin/env bash
# PyAV 18.1.0: skip_frame is ignored by FFmpeg's VP9 decoder, and by dav1d once decoding has begun.
#
# codec_context.skip_frame = "NONKEY" asks a decoder for keyframes alone. Of a film of 50 pictures
# with one keyframe H.264 and HEVC then give 1, and VP9 gives all 50, without a warning. AV1 (dav1d)
# gives 1 if it is set before the first packet. Set after 10 packets H.264 and HEVC stop there; dav1d
# goes on to 50, although the property reads "NONKEY". So who skips pictures to save time has to ask
# which decoder it is.
# Seen on 2026-11-30 (av 18.1.0, numpy 2.4.6, Python 3.11, x86_64):
#     h264: 1 from the start, 10 if set after 10 packets
#     hevc: 1 from the start, 10 if set after 10 packets
#     libdav1d: 1 from the start, 50 if set after 10 packets
#     vp9: 50 from the start, 50 if set after 10 packets
# The script fails if that changes. (The encoders of HEVC and AV1 print lines of their own.)
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
"$folder/env/bin/python" - "$folder" <<'PY'
import sys

import av
import numpy as np


def pictures(path, begin):
    """Count the pictures that a decoder gives, which is asked for keyframes after some packets."""
    with av.open(path) as container:
        stream, count = container.streams.video[0], 0
        for number, packet in enumerate(container.demux(stream)):
            if number == begin:
                stream.codec_context.skip_frame = "NONKEY"
            count += len(packet.decode())
        assert stream.codec_context.skip_frame == "NONKEY"
        return stream.codec_context.codec.name, count


found = {}
stripes = np.tile(np.arange(128, dtype=np.uint8)[None, :, None], (96, 1, 3))
for encoder in ("libx264", "libx265", "libsvtav1", "libvpx-vp9"):
    path = f"{sys.argv[1]}/{encoder}.mkv"
    with av.open(path, "w") as out:
        stream = out.add_stream(encoder, rate=25, width=128, height=96, pix_fmt="yuv420p")
        for n in range(50):
            image = np.ascontiguousarray(np.roll(stripes, 3 * n, 1))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(stream.encode(None))
    (name, first), (_, later) = pictures(path, 0), pictures(path, 10)
    found[name] = first, later
for name, (first, later) in found.items():
    print(f"{name}: {first} from the start, {later} if set after 10 packets")
assert found == {"h264": (1, 10), "hevc": (1, 10), "libdav1d": (1, 50), "vp9": (50, 50)}
PY
