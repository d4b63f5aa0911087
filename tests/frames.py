"""Films of 50 kinds of containers and codecs, and whether the reader returns the right frames.

Each frame of these films shows its own number as a barcode. A frame is wrong if it is not one of
those whose time stamps are nearest to the time asked for, within TIE.
"""

import os
import random
from collections import namedtuple
from fractions import Fraction

import av
import numpy as np

from support.reading import RATE, read

os.environ.setdefault("SVT_LOG", "1")                   # the AV1 encoder prints only errors
BITS = 9                                                # of a barcode
SIZE = 128, 96                                          # width, height; one of H.263's few sizes
SECONDS = 6                                             # length of a film
TIE = 2e-3                                              # s
PLACES, FRAMES = 20, 12                                 # per film: places, and frames at each place

# sound: codec and sampling rate. options: of the video codec. pixels: pixel format. muxer: options
# of the container. start: first time stamp, s. ticks: stamps of the frames in units of 1 / fps.
# format: the container, if the suffix of the name does not tell it.
Film = namedtuple("Film", "name codec fps sound options pixels muxer start ticks format",
                  defaults=(30, ("aac", 44100), {}, "yuv420p", {}, 0, None, None))
NTSC = Fraction(30000, 1001)
CINEMA = Fraction(24000, 1001)
MP2, MP3, AC3 = ("mp2", 48000), ("libmp3lame", 44100), ("ac3", 48000)
OPUS, PCM, AMR = ("libopus", 48000), ("pcm_s16le", 44100), ("libopencore_amrnb", 8000)


def x264(b=3, params="", g=48, **more):
    """Return options of libx264: b B-frames, a keyframe every g frames, x264's own params."""
    options = {"preset": "veryfast", "bf": str(b), "g": str(g), "b_strategy": "0"}
    return options | ({"x264-params": params} if params else {}) | more


def x265(params="keyint=48"):
    """Return options of libx265: 3 B-frames, x265's own params."""
    params = f"log-level=none:bframes=3:b-adapt=0:{params}"
    return {"preset": "ultrafast", "x265-params": params}


def uneven(seed):
    """Return the stamps of 52 frames, 1 to 6 units of 1 / fps apart."""
    return np.cumsum(np.random.default_rng(seed).integers(1, 7, 52)).tolist()


AV1 = {"preset": "12", "svtav1-params": "keyint=48"}
VPX = {"deadline": "realtime", "cpu-used": "8", "g": "48"}
FILMS = [
    Film("h264_b0.mp4", "libx264", 30, options=x264(0)),
    Film("h264_b3.mp4", "libx264", 25, options=x264(3, g=250)),
    Film("h264_b5_pyramid.mp4", "libx264", NTSC, options=x264(5, "b-pyramid=normal")),
    Film("h264_open_gop.mp4", "libx264", 30, options=x264(3, "open-gop=1", g=24)),
    Film("h264_444.mp4", "libx264", 24, options=x264(3), pixels="yuv444p"),
    Film("h264_10_bit.mp4", "libx264", 30, options=x264(3), pixels="yuv420p10le"),
    Film("h264_fragmented.mp4", "libx264", 30, options=x264(3),
         muxer={"movflags": "frag_keyframe+empty_moov"}),
    Film("h264_uneven.mp4", "libx264", 30, options=x264(3), ticks=uneven(0)),
    Film("h264_late.mp4", "libx264", 30, options=x264(3), start=1.5),
    Film("h264_silent.mp4", "libx264", 50, None, x264(3)),
    Film("h264_intra_refresh.mp4", "libx264", 30, options=x264(0, "intra-refresh=1")),
    Film("hevc.mp4", "libx265", 30, options=x265("open-gop=0:keyint=48")),
    Film("hevc_open_gop.mp4", "libx265", 25, options=x265("open-gop=1:keyint=24")),
    Film("hevc_layers.mp4", "libx265", 30, options=x265("temporal-layers=3:keyint=48")),
    Film("av1.mp4", "libsvtav1", 30, options=AV1),
    Film("vp9.mp4", "libvpx-vp9", 30, OPUS, VPX),
    Film("mpeg4_b2.mp4", "mpeg4", 25, options={"bf": "2", "g": "30"}),
    Film("h264_b3.mov", "libx264", CINEMA, PCM, x264(3)),
    Film("prores.mov", "prores_ks", 25, PCM, pixels="yuv422p10le"),
    Film("mjpeg.mov", "mjpeg", 15, PCM, pixels="yuvj420p"),
    Film("h264_uneven.mkv", "libx264", 30, ("flac", 48000), x264(3), ticks=uneven(1)),
    Film("hevc_10_bit.mkv", "libx265", 30, AC3, x265(), "yuv420p10le"),
    Film("av1.mkv", "libsvtav1", CINEMA, OPUS, AV1, start=0.7),
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
    Film("ts_inside.mp4", "libx264", 30, options=x264(3, "open-gop=1", g=60), format="mpegts"),
    Film("h264_interlaced.ts", "libx264", 25, MP2, x264(2, flags="+ildct+ilme")),
    Film("h264_b3.flv", "libx264", 30, options=x264(3)),
    Film("flv1.flv", "flv", 15, MP3),
    Film("h263.3gp", "h263", 15, AMR, {"g": "30"}),
    Film("mpeg4.3gp", "mpeg4", 12, AMR, {"g": "48"}),
    Film("wmv2.wmv", "wmv2", 25, ("wmav2", 44100), {"g": "50"}),
]


def barcode(n, size=SIZE):
    """Draw the number n as BITS black or white columns, (H, W, 3) uint8."""
    width, height = size
    bits = (n >> np.arange(BITS)) & 1                                           # (BITS,)
    line = (235 * bits[np.arange(width) * BITS // width]).astype(np.uint8)      # (W,)
    return np.tile(line[None, :, None], (height, 1, 3))


def read_barcode(images):
    """Read the numbers off images: (..., H, W, 3) -> (...)."""
    images = np.asarray(images)
    W = images.shape[-2]
    columns = [(2 * b + 1) * W // (2 * BITS) for b in range(BITS)]
    bits = images[..., columns, :].mean((-3, -1)) > 120                         # (..., BITS)
    return (bits * 2 ** np.arange(BITS)).sum(-1)


def beep(t):
    """Return the samples at the times t of a sound that beeps for 20 ms at 0.5 s, 1.5 s, ..."""
    return 0.9 * np.sin(2 * np.pi * 1500 * t) * ((t % 1 >= 0.5) & (t % 1 < 0.52))


def make(film, folder):
    """Write one film into the folder, and return its path."""
    path, fps = folder / film.name, Fraction(film.fps)
    priority = os.sched_getscheduler(0), os.sched_getparam(0)
    ticks = film.ticks or range(round(SECONDS * film.fps))
    with av.open(str(path), "w", format=film.format, options=film.muxer) as out:
        video = out.add_stream(film.codec, rate=fps, width=SIZE[0], height=SIZE[1],
                               pix_fmt=film.pixels, options=film.options, bit_rate=2_000_000)
        video.codec_context.thread_count = 1
        codec, rate = film.sound or (None, None)
        audio = film.sound and out.add_stream(codec, rate=rate, layout="mono", bit_rate=64000)
        offset = round(film.start * fps)
        palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 4, 1)
        for n, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(barcode(n), "rgb24")
            if film.pixels == "pal8":
                frame = av.VideoFrame.from_ndarray((barcode(n)[..., 0], palette), "pal8")
            frame.pts, frame.time_base = tick + offset, 1 / fps
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if audio is not None:
            t = np.arange(round((ticks[-1] + 1) / fps * rate)) / rate
            frame = av.AudioFrame.from_ndarray(beep(t).astype(np.float32)[None], "fltp", "mono")
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = round(offset / fps * rate)
            for part in av.AudioResampler(audio.format.name, "mono", rate).resample(frame):
                out.mux(audio.encode(part))
            out.mux(audio.encode(None))
    # The AV1 encoder gives root's process real-time priority, which later processes would inherit.
    os.sched_setscheduler(0, *priority)
    return path


def truth(path):
    """Decode a whole film from its beginning.

    Returns the times in s and the numbers of its frames in the order of display, and a list of the
    times at which its streams begin: first the pictures, then the sound if the film has any.
    """
    with av.open(str(path)) as container:
        streams = [container.streams.video[0], *container.streams.audio[:1]]
        begins = [float((stream.start_time or 0) * stream.time_base) for stream in streams]
        times, numbers = [], []
        for frame in container.decode(streams[0]):
            times.append(frame.time)
            numbers.append(read_barcode(frame.to_ndarray(format="rgb24")))
    return np.sort(times), np.array(numbers), begins


def ask(path, times, numbers, begins):
    """Ask the reader for FRAMES frames, at a random frame rate, at each of PLACES random places.

    Sound is read at every other place of a film that has it. times, numbers, begins: as `truth`
    returns them. Returns how many frames were wrong.
    """
    rng, wrong = random.Random(path.name), 0
    for n in range(PLACES):
        sound = n % 2 == 1 and len(begins) > 1
        clock = times - (max(begins) if sound else begins[0])
        fps = rng.choice((4, 10, 16, 25, 30, 60))
        t0 = 0.0 if n < 2 else rng.uniform(0, max(0.0, clock[-1] - FRAMES / fps))
        asked = t0 + np.arange(FRAMES) / fps
        distance = abs(clock - asked[:, None])          # (FRAMES, number of frames in the film)
        right = distance <= distance.min(1, keepdims=True) + TIE
        found = shown(path, asked, sound)
        wrong += sum(number not in numbers[near] for number, near in zip(found, right))
    return wrong


def shown(path, times, sound=False):
    """Return the numbers of the frames that the reader gives for the times."""
    samples = round((times[-1] - times[0] + 0.1) * RATE) if sound else 0
    return read_barcode(np.stack(read(path, times, samples, size=48)[0]))


def beeps_of(path, t0, seconds):
    """Return when the beeps of a clip begin, in s after zero, but not a beep that the clip cuts."""
    _, wave = read(path, [t0], round(seconds * RATE), size=48)
    loud = np.flatnonzero(abs(wave) > 0.3)
    beeps = loud[np.diff(loud, prepend=-RATE) > RATE / 5] / RATE
    return t0 + beeps[beeps > 0.025]
