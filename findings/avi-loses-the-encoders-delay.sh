#!/usr/bin/env bash
# In AVI written by PyAV 18.1.0 the sound lies late by the delay of its encoder.
#
# A tone begins at 0.5 s beside pictures that begin at 0. AAC and MP3 encoders put some samples of
# their own before the sound. mp4, mkv and ts store that, and the decoded tone begins at 0.5 s to
# within 1 ms. AVI has no place for it, so the tone begins late, by one AAC frame or 1,105 samples
# of MP3, and no property of the stream tells it.
# Seen on 2026-11-30 (av 18.1.0, numpy 2.4.6, Python 3.11, x86_64):
#     aac: mp4 0 ms, mkv 0 ms, ts 0 ms, avi 21 ms
#     libmp3lame: mp4 0 ms, mkv 0 ms, ts 0 ms, avi 23 ms
# The script fails if that changes by a millisecond.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
"$folder/env/bin/python" - "$folder" <<'PY'
import sys
from fractions import Fraction

import av
import numpy as np

RATE = 48000
time = np.arange(2 * RATE) / RATE
wave = (0.8 * np.sin(2 * np.pi * 1000 * time) * (time >= 0.5)).astype(np.float32)
black = np.zeros((64, 64, 3), np.uint8)


def write(path, codec):
    with av.open(path, "w") as out:
        video = out.add_stream("mpeg4", rate=25, width=64, height=64, pix_fmt="yuv420p")
        audio = out.add_stream(codec, rate=RATE, layout="mono")
        for _ in range(50):
            out.mux(video.encode(av.VideoFrame.from_ndarray(black, "rgb24")))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        out.mux(audio.encode(sound) + audio.encode(None))


def late(path):
    """How many ms after 0.5 s, on the clock of the pictures, the tone begins."""
    with av.open(path) as container:
        begin = min(p.pts * p.time_base for p in container.demux(video=0) if p.pts is not None)
    with av.open(path) as container:
        for frame in container.decode(audio=0):
            loud = np.flatnonzero(abs(frame.to_ndarray()[0]) > 0.3)
            if len(loud):
                return 1000 * (frame.time + loud[0] / RATE - 0.5 - float(begin))


for codec, expected in (("aac", 21.4), ("libmp3lame", 23.1)):
    found = {}
    for ending in ("mp4", "mkv", "ts", "avi"):
        path = f"{sys.argv[1]}/{codec}.{ending}"
        write(path, codec)
        found[ending] = late(path)
    print(f"{codec}: " + ", ".join(f"{ending} {ms:.0f} ms" for ending, ms in found.items()))
    for ending, ms in found.items():
        assert abs(ms - (expected if ending == "avi" else 0)) < 1, (codec, ending, ms)
PY
