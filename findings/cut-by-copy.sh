#!/usr/bin/env bash
# An mp4 that `ffmpeg -ss T -c copy` has cut shows its pictures early beside its sound (PyAV 18.1.0).
#
# The film (25 pictures per s, one keyframe a second) turns white at 1.0 s, where its sound begins
# too. Cut at T, white and sound should both come at 1 - T. FFmpeg applies the edit list of the cut
# file by moving the first picture that is not hidden to time 0, so all pictures come up to one
# picture (0.04 s) early. With the option advanced_editlist=0 they keep their time; hidden ones then
# come out too, with negative stamps.
# Seen on 2026-11-29 (av 18.1.0, imageio-ffmpeg 0.6.0, numpy 2.4.6, Python 3.11, x86_64):
#     cut at 0.213 s, white at 0.787 is right: by default 0.760, with advanced_editlist=0 0.787
# The script fails if either value changes by more than 2 ms.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet av==18.1.0 imageio-ffmpeg==0.6.0 numpy==2.4.6
"$folder/env/bin/python" - "$folder" <<'PY'
import subprocess
import sys

import av
import imageio_ffmpeg
import numpy as np

whole, cut = f"{sys.argv[1]}/whole.mp4", f"{sys.argv[1]}/cut.mp4"
with av.open(whole, "w") as out:
    video = out.add_stream("libx264", rate=25, width=64, height=48, pix_fmt="yuv420p",
                           options={"g": "25", "bf": "0"})
    audio = out.add_stream("aac", rate=44100, layout="mono")
    for n in range(75):
        level = 255 if n >= 25 else 0
        frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), "rgb24")
        out.mux(video.encode(frame))
    out.mux(video.encode(None))
    wave = np.where(np.arange(3 * 44100) < 44100, 0, 0.5).astype(np.float32)
    sound = av.AudioFrame.from_ndarray(wave[None], "fltp", "mono")
    sound.sample_rate, sound.pts = 44100, 0
    for piece in av.AudioResampler("fltp", "mono", 44100, frame_size=1024).resample(sound):
        out.mux(audio.encode(piece))
    out.mux(audio.encode(None))
subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-ss", "0.213", "-i", whole,
                "-c", "copy", cut], check=True)
found = {}
for name, options in (("default", {}), ("advanced_editlist=0", {"advanced_editlist": "0"})):
    with av.open(cut, options=options) as container:
        white = [frame.time for frame in container.decode(video=0)
                 if frame.to_ndarray(format="gray").mean() > 128]
    found[name] = round(min(white), 3)
print(found)
assert abs(found["default"] - 0.760) < 0.002 and abs(found["advanced_editlist=0"] - 0.787) < 0.002
PY
