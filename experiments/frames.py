"""Does a reader show the right frame? Small films of the containers and codecs in use, each frame with its number.

    python -m experiments.bench frames                  # frames wrong per film, for this project's reader and others

A frame is wrong if it is not the one whose time stamp is nearest to the time asked for. The truth comes from decoding
the whole film from its beginning: a decoder puts the frames in the order of presentation, and their sorted stamps are
their times. Two equally near frames, within TIE, are both right.
"""

import random
from collections import namedtuple
from fractions import Fraction

import av
import numpy as np

BITS = 9
SIZE = 128, 96                                          # H.263 knows few sizes, this is one of them
SECONDS = 6
TIE = 2e-3                                              # s
PLACES, FRAMES = 20, 12                                 # asked of each film

# name: suffix and what is special. sound: codec and rate. muxer: options of the container. start: first stamp, s.
Film = namedtuple("Film", "name codec fps sound options pixels muxer start ticks format",
                  defaults=(30, ("aac", 44100), {}, "yuv420p", {}, 0, None, None))
NTSC = Fraction(30000, 1001)
FILM = Fraction(24000, 1001)
FAST = {"preset": "ultrafast"}                          # x264, x265: no B-frames unless asked for
MP2, MP3, OPUS, PCM, AC3 = ("mp2", 48000), ("libmp3lame", 44100), ("libopus", 48000), ("pcm_s16le", 44100), ("ac3", 48000)


def x264(b=3, **more):
    return {"preset": "veryfast", "bf": str(b), "g": "48", "b_strategy": "0"} | {k: str(v) for k, v in more.items()}


def x265(**more):
    return {"preset": "ultrafast", "x265-params": ":".join(
        ["log-level=none:bframes=3:b-adapt=0:keyint=48", *(f"{k}={v}" for k, v in more.items())])}


def uneven(n, seed=0):
    """Stamps of n frames in units of 1/30 s, 1 to 6 units apart."""
    return np.cumsum(np.random.default_rng(seed).integers(1, 7, n)).tolist()


AV1 = {"preset": "12", "svtav1-params": "keyint=48"}
VPX = {"deadline": "realtime", "cpu-used": "8", "g": "48"}
FILMS = [
    Film("h264_b0.mp4", "libx264", 30, options=x264(0)),
    Film("h264_b3.mp4", "libx264", 25, options=x264(3, g=250)),
    Film("h264_b5_pyramid.mp4", "libx264", NTSC, options=x264(5, **{"x264-params": "b-pyramid=normal"})),
    Film("h264_open_gop.mp4", "libx264", 30, options=x264(3, g=24, **{"x264-params": "open-gop=1"})),
    Film("h264_444.mp4", "libx264", 24, options=x264(3), pixels="yuv444p"),
    Film("h264_10_bit.mp4", "libx264", 30, options=x264(3), pixels="yuv420p10le"),
    Film("h264_fragmented.mp4", "libx264", 30, options=x264(3), muxer={"movflags": "frag_keyframe+empty_moov"}),
    Film("h264_uneven.mp4", "libx264", 30, options=x264(3), ticks=uneven(52)),
    Film("h264_late.mp4", "libx264", 30, options=x264(3), start=1.5),
    Film("h264_silent.mp4", "libx264", 50, None, x264(3)),
    Film("h264_intra_refresh.mp4", "libx264", 30, options=x264(0, **{"x264-params": "intra-refresh=1"})),
    Film("hevc.mp4", "libx265", 30, options=x265(**{"open-gop": 0})),
    Film("hevc_open_gop.mp4", "libx265", 25, options=x265(**{"open-gop": 1, "keyint": 24})),
    Film("hevc_layers.mp4", "libx265", 30, options=x265(**{"temporal-layers": 3})),
    Film("av1.mp4", "libsvtav1", 30, options=AV1),
    Film("vp9.mp4", "libvpx-vp9", 30, OPUS, VPX),
    Film("mpeg4_b2.mp4", "mpeg4", 25, options={"bf": "2", "g": "30"}),
    Film("h264_b3.mov", "libx264", FILM, PCM, x264(3)),
    Film("prores.mov", "prores_ks", 25, PCM, pixels="yuv422p10le"),
    Film("mjpeg.mov", "mjpeg", 15, PCM, pixels="yuvj420p"),
    Film("h264_uneven.mkv", "libx264", 30, ("flac", 48000), x264(3), ticks=uneven(52, 1)),
    Film("hevc_10_bit.mkv", "libx265", 30, AC3, x265(), "yuv420p10le"),
    Film("av1.mkv", "libsvtav1", FILM, OPUS, AV1, start=0.7),
    Film("ffv1.mkv", "ffv1", 25, ("flac", 44100)),
    Film("mpeg4_b2.mkv", "mpeg4", 30, MP3, {"bf": "2", "g": "60"}),
    Film("msmpeg4.mkv", "msmpeg4", 25, MP3, {"mbd": "rd"}),
    Film("mpeg2_b2.mkv", "mpeg2video", 25, AC3, {"bf": "2", "g": "15"}),
    Film("vp8.webm", "libvpx", 30, OPUS, VPX),
    Film("vp8_silent_late.webm", "libvpx", 25, None, VPX, start=2),
    Film("vp9.webm", "libvpx-vp9", 50, OPUS, VPX),
    Film("av1.webm", "libsvtav1", 25, OPUS, AV1),
    Film("mpeg4_b2.avi", "mpeg4", 25, MP3, {"bf": "2", "g": "48"}),
    Film("mpeg4_b0.avi", "mpeg4", 25, MP3, {"g": "48"}),
    Film("h264_b3.avi", "libx264", 25, PCM, x264(3)),
    Film("msmpeg4v2.avi", "msmpeg4v2", 30, MP3, {"mbd": "rd"}),
    Film("mjpeg.avi", "mjpeg", 25, PCM, pixels="yuvj420p"),
    Film("palette.avi", "rawvideo", 15, PCM, pixels="pal8"),
    Film("mpeg1_b2.mpg", "mpeg1video", 25, MP2, {"bf": "2", "g": "12"}),
    Film("mpeg2_b2.mpg", "mpeg2video", NTSC, MP2, {"bf": "2", "g": "15"}),
    Film("mpeg2_b2.vob", "mpeg2video", 25, AC3, {"bf": "2", "g": "12"}),
    Film("h264_b3.ts", "libx264", 30, ("aac", 48000), x264(3)),
    Film("hevc.ts", "libx265", 25, ("aac", 48000), x265()),
    Film("mpeg2_b2.ts", "mpeg2video", 25, MP2, {"bf": "2", "g": "15"}),
    Film("ts_inside.mp4", "libx264", 30, ("aac", 44100), x264(3, g=60, **{"x264-params": "open-gop=1"}), format="mpegts"),
    Film("h264_interlaced.ts", "libx264", 25, MP2, x264(2, flags="+ildct+ilme")),
    Film("h264_b3.flv", "libx264", 30, options=x264(3)),
    Film("flv1.flv", "flv", 15, MP3),
    Film("h263.3gp", "h263", 15, ("libopencore_amrnb", 8000), {"g": "30"}),
    Film("mpeg4.3gp", "mpeg4", 12, ("libopencore_amrnb", 8000), {"g": "48"}),
    Film("wmv2.wmv", "wmv2", 25, ("wmav2", 44100), {"g": "50"}),
]


def barcode(n, size=SIZE):
    """The number n as 9 black or white columns, (H, W, 3) uint8."""
    width, height = size
    bits = (n >> np.arange(BITS)) & 1
    return np.tile((235 * bits[np.arange(width) * BITS // width])[None, :, None], (height, 1, 3)).astype(np.uint8)


def read_barcode(images):
    """(..., H, W, 3) -> (...) the numbers."""
    images = np.asarray(images)
    W = images.shape[-2]
    columns = [(2 * b + 1) * W // (2 * BITS) for b in range(BITS)]
    bits = images[..., columns, :].mean((-3, -1)) > 120                             # (..., BITS)
    return (bits * 2 ** np.arange(BITS)).sum(-1)


def beep(t):
    """A beep of 20 ms in the middle of each second, samples at the times t."""
    return 0.9 * np.sin(2 * np.pi * 1500 * t) * ((t % 1 >= 0.5) & (t % 1 < 0.52))


def make(film, folder):
    """Write one film. Returns its path."""
    path, fps = folder / film.name, Fraction(film.fps)
    ticks = film.ticks or range(round(SECONDS * film.fps))
    with av.open(str(path), "w", format=film.format, options=film.muxer) as out:
        video = out.add_stream(film.codec, rate=fps, width=SIZE[0], height=SIZE[1], pix_fmt=film.pixels,
                               options=film.options)
        video.bit_rate = 2_000_000
        video.codec_context.thread_count = 1
        codec, rate = film.sound or (None, None)
        audio = out.add_stream(codec, rate=rate, layout="mono", bit_rate=64000) if film.sound else None
        offset = round(film.start * fps)
        for n, tick in enumerate(ticks):
            if film.pixels == "pal8":
                palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, 1)
                frame = av.VideoFrame.from_ndarray((barcode(n)[..., 0], palette), "pal8")
            else:
                frame = av.VideoFrame.from_ndarray(barcode(n), "rgb24")
            frame.pts, frame.time_base = tick + offset, 1 / fps
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if audio is not None:
            t = np.arange(round((ticks[-1] + 1) / fps * rate)) / rate
            frame = av.AudioFrame.from_ndarray(beep(t).astype(np.float32)[None], "fltp", "mono")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(offset / fps * rate)
            for part in av.AudioResampler(audio.format.name, "mono", rate).resample(frame):
                out.mux(audio.encode(part))
            out.mux(audio.encode(None))
    return path


def truth(path):
    """The films' frames in the order of presentation, by decoding all from the beginning: their times in s and their
    numbers; and where the streams begin, the pictures and, if there is any, the sound."""
    with av.open(str(path)) as container:
        streams = [container.streams.video[0], *container.streams.audio[:1]]
        begins = [float((stream.start_time or 0) * stream.time_base) for stream in streams]
        frames = [(frame.time, read_barcode(frame.to_ndarray(format="rgb24"))) for frame in container.decode(streams[0])]
    return np.sort([time for time, _ in frames]), np.array([number for _, number in frames]), begins


def ask(path, reader, times, numbers, begins, seed=0):
    """Ask a reader for FRAMES pictures at each of PLACES random places and at a random rate each. Returns how many were
    wrong and how many were asked for. reader(path, times, sound) -> the numbers that it shows."""
    rng, wrong = random.Random(f"{path.name} {seed}"), 0
    for place in range(PLACES):
        sound = place % 2 == 1 and len(begins) > 1
        clock = times - (max(begins) if sound else begins[0])                       # s after zero
        fps = rng.choice((4, 10, 16, 25, 30, 60))
        t0 = 0.0 if place < 2 else rng.uniform(0, max(0.0, clock[-1] - FRAMES / fps))
        asked = t0 + np.arange(FRAMES) / fps
        shown = reader(path, asked.tolist(), sound)
        distance = abs(clock - asked[:, None])                                      # (FRAMES, frames of the film)
        right = distance <= distance.min(1, keepdims=True) + TIE
        wrong += sum(number not in numbers[near] for number, near in zip(shown, right))
    return wrong, PLACES * FRAMES


def onsets(wave, rate):
    """When the beeps of a waveform begin, s from its start."""
    loud = np.flatnonzero(abs(np.asarray(wave)) > 0.3)
    return loud[np.diff(loud, prepend=-rate) > rate / 5] / rate
