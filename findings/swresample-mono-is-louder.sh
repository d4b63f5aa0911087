#!/usr/bin/env bash
# PyAV 18.1.0's AudioResampler to mono makes a float stereo sound 3 dB louder, and 5.1 10.7 dB.
#
# The same samples stand on all channels. Right, for who expects the mean of the channels, is the
# peak of one channel. FFmpeg mixes by power (0.7071 for each of two channels) and normalises the
# weights only for integer samples; for float output the mix may pass full scale.
# Seen on 2026-11-29 (av 18.1.0, numpy 2.4.6, Python 3.11, x86_64): a peak of 0.5 becomes
#     mono 0.500    stereo 0.707    5.1 1.707
# The script fails if one of these changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
import av
import numpy as np

found = {}
for layout, channels in (("mono", 1), ("stereo", 2), ("5.1", 6)):
    sound = np.full((channels, 4800), 0.5, np.float32)
    frame = av.AudioFrame.from_ndarray(sound, "fltp", layout)
    frame.sample_rate = 48000
    resampler = av.AudioResampler("fltp", "mono", 48000)
    pieces = resampler.resample(frame) + resampler.resample(None)
    mono = np.concatenate([piece.to_ndarray()[0] for piece in pieces])
    found[layout] = round(float(np.abs(mono).max()), 3)
print(found)
assert found == {"mono": 0.5, "stereo": 0.707, "5.1": 1.707}
PY
