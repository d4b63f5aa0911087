"""Checks that the right pictures and sound come out of every container.

Most films here show the number of each frame as a barcode.
"""

import itertools
import os
import re
import struct
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import make_video, peak_hz, remux
from frames import UNEVEN, beep, beeps_of, read_barcode, shown, truth

from data import read_manifest
from prepare import scan, transcode
from support.reading import (EXACT, RATE, Damage, lead_in, open_file, open_streams, padded,
                             place_sound, read, read_sound)

os.environ.setdefault("SVT_LOG", "1")       # the AV1 encoder prints only errors

MP3 = "libmp3lame"
TWO_B = {"bf": "2", "g": "12"}
OPEN = {"x264-params": "open-gop=1"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=24"}
LAYERS = {"x265-params": "log-level=none:keyint=48:open-gop=0:temporal-layers=3"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "48"}
AV1 = dict(codec="libsvtav1", options={"preset": "12", "svtav1-params": "keyint=48"})
FILMS = {       # {name: arguments of make_video}
    "h264_late.mp4": dict(fps=25, gop=250, start=1.6),
    "h264_b_pyramid.mp4": dict(fps=30000 / 1001, options={"bf": "5", "b_strategy": "0"}),
    "h264_open_gop.mp4": dict(gop=24, options=OPEN),
    "h264_444_silent.mp4": dict(fps=50, tone=None, settings={"pix_fmt": "yuv444p"}),
    "h264_10_bit.mp4": dict(settings={"pix_fmt": "yuv420p10le"}),
    "h264_fragmented.mp4": dict(ticks=UNEVEN, muxer={"movflags": "frag_keyframe+empty_moov"}),
    "h264_b0.mp4": dict(options={"bf": "0", "x264-params": "intra-refresh=1"}),
    "h264_uneven.mkv": dict(audio_codec="flac", ticks=UNEVEN),
    "h264.mov": dict(fps=24000 / 1001, audio_codec="pcm_s16le"),
    "h264.avi": dict(fps=25, audio_codec="pcm_s16le"),
    "h264.flv": {},
    "h264_open_gop.ts": dict(options=OPEN),
    "h264_interlaced.ts": dict(fps=25, options={"flags": "+ildct+ilme"}),
    "hevc.mp4": dict(codec="libx265", fps=25, options=X265),
    "hevc_open_gop.mp4": dict(codec="libx265", fps=25, options=X265 | {
        "x265-params": X265["x265-params"] + ":open-gop=1"}),
    "hevc_layers.mp4": dict(codec="libx265", options=X265 | LAYERS),
    "hevc_10_bit.ts": dict(codec="libx265", options=X265, settings={"pix_fmt": "yuv420p10le"}),
    "av1.mp4": AV1,
    "av1_late.mkv": AV1 | dict(audio_codec="libopus", rate=12000, start=0.7),
    "vp9.mp4": dict(codec="libvpx-vp9", audio_codec="libopus", rate=24000, options=VP9),
    "vp9.webm": dict(codec="libvpx-vp9", fps=50, audio_codec="libopus", rate=48000, options=VP9),
    "vp8_live.webm": dict(codec="libvpx", audio_codec="libopus", rate=48000, muxer={"live": "1"}),
    "vp8_silent_late.webm": dict(codec="libvpx", fps=25, tone=None, start=2),
    "mpeg4_b2.mp4": dict(codec="mpeg4", fps=25, options=TWO_B),
    "mpeg4_b2.mkv": dict(codec="mpeg4", audio_codec=MP3, options=TWO_B),
    "mpeg4.3gp": dict(codec="mpeg4", fps=12, audio_codec="libopencore_amrnb", rate=8000),
    "mpeg4_b2.avi": dict(codec="mpeg4", fps=25, audio_codec=MP3, options=TWO_B),
    "mpeg4_b0.avi": dict(codec="mpeg4", audio_codec=MP3, options={"g": "48"}),
    "msmpeg4.mkv": dict(codec="msmpeg4", fps=25, audio_codec=MP3),
    "msmpeg4v2.avi": dict(codec="msmpeg4v2", audio_codec=MP3),
    "mjpeg.avi": dict(codec="mjpeg", fps=25, settings={"pix_fmt": "yuvj420p"}),
    "ffv1.mkv": dict(codec="ffv1", fps=25, audio_codec="flac"),
    "flv1.flv": dict(codec="flv", fps=15, audio_codec=MP3),
    "mpeg2_b2.mkv": dict(codec="mpeg2video", fps=25, audio_codec="ac3", options=TWO_B),
    "prores.mov": dict(codec="prores_ks", fps=25, audio_codec="pcm_s16le",
                       settings={"pix_fmt": "yuv422p10le"}),
    "mpeg1_b2.mpg": dict(codec="mpeg1video", fps=25, audio_codec="mp2", options=TWO_B),
    "mpeg2_b2.vob": dict(codec="mpeg2video", fps=30000 / 1001, audio_codec="ac3", options=TWO_B),
    "mpeg2_b2.ts": dict(codec="mpeg2video", fps=25, audio_codec="mp2", options=TWO_B),
    "h263.3gp": dict(codec="h263", fps=15, audio_codec="libopencore_amrnb", rate=8000),
    "wmv2.wmv": dict(codec="wmv2", fps=25, audio_codec="wmav2", options={"g": "50"}),
}


def with_copy(path):
    """Transcode a film. Return its row and both paths. The scan finds no fault in either."""
    row, copy = scan.probe((path, "c", ""), verify=True), path.with_name("copy.mp4")
    transcode.encode(path, copy, 48, 15, row["has_audio"])
    for found in (row, scan.probe((copy, "c", ""), verify=True)):
        assert found["reason"] + found["note"] == "" and found["has_audio"] == row["has_audio"]
    return row, (path, copy)


def wrong_frames(path, row, times, numbers, begins):
    """Read 12 frames at each of 20 places, at every other with sound if there is any. Return how
    many are not among the nearest in time, within 2 ms. row: of the scan. times, numbers, begins:
    see `truth`."""
    rng, wrong = np.random.default_rng(list(path.name.encode())), 0
    given = 0, 0, 0.45, 0.5, 1.1    # mpg and vob have wrong stamps after a seek to the last
    for n in range(20):
        sound = n % 2 == 1 and len(begins) > 1
        clock = times - (max(begins) if sound else begins[0])
        fps = rng.choice((4, 10, 16, 25, 30, 60))
        last = max(0, row["duration" if sound else "video_duration"] - 12 / fps)
        asked = (given[n] if n < 5 else rng.uniform(0, last)) + np.arange(12) / fps
        distance = abs(clock - asked[:, None])    # (12, frames in the film)
        right = distance <= distance.min(1, keepdims=True) + 2e-3
        found = shown(path, asked, sound)
        wrong += sum(number not in numbers[near] for number, near in zip(found, right))
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", FILMS)
def test_matrix(name, tmp_path):
    """The film and its copy pass --verify. All 240 frames and all beeps are right."""
    priority = os.sched_getscheduler(0), os.sched_getparam(0)
    # 6 s, with 5 s of sound that beeps for 20 ms at 0.5 s, 1.5 s, ...
    film = dict(size=(128, 96), gop=48, sound_seconds=5, bit_rate=64000) | FILMS[name]
    path = make_video(tmp_path / name, **film, wave=beep)
    # The AV1 encoder gives root's process real-time priority, which later ones would inherit.
    os.sched_setscheduler(0, *priority)
    times, numbers, begins = truth(path)
    # The clock of the film, by which it beeps, shows `zero` at time 0.
    zero = max(begins) - times[0] + film.get("ticks", [0])[0] / 30
    row, both = with_copy(path)
    for found in (row, scan.probe((path, "c", ""))):
        assert found["reason"] + found["note"] == ""
        assert found["has_audio"] == ("silent" not in name)
        assert abs(found["video_duration"] + begins[0] - times[-1]) < 0.1
        assert not found["has_audio"] or abs(found["duration"] + zero - 5) < 0.1
    for source in both:
        assert wrong_frames(source, row, times, numbers, begins) == 0
    if "silent" in name:
        return
    whole = beeps_of(path, 0, 5) + zero
    assert len(whole) >= 4
    # avi and 3gp do not store the delay of the sound encoder.
    tolerance = 0.05 if path.suffix in (".avi", ".3gp") else 0.003
    assert abs(whole - np.arange(len(whole)) - 0.5).max() < tolerance
    for source in both:
        for t0 in (0, 0.37, 0.51, 1.4, 2.26, 2.9):
            beeps = beeps_of(source, t0, 1.5) + zero
            assert len(beeps) and abs(whole[:, None] - beeps).min(0).max() < 0.003, t0


# ---- still pictures

# The colours of the quarters: top left, top right, bottom left, bottom right.
YUV = [(60, 90, 200), (200, 60, 110), (126, 128, 128), (235, 128, 128)]
RGB = [(200, 30, 60), (20, 180, 240), (128, 128, 128), (255, 255, 255)]


def still(path, frame, codec="ffv1", **film):
    """Write a film that shows a frame at 0, 0.1 and 0.2 s."""
    return make_video(path, 0.3, 10, tone=None, codec=codec, image=frame, **film)


def quarters(colours, width=160, height=96):
    """Return an image (height, width, n) of four colours (4, n)."""
    lower, right = (np.arange(side) * 2 // side for side in (height, width))
    return np.uint8(colours)[lower[:, None] * 2 + right]


def frame_of(image, pixels="yuv420p"):
    """Return the frame of an image (H, W, 3) of Y, Cb and Cr."""
    frame = av.VideoFrame(*image.shape[1::-1], pixels)
    bits = frame.format.components[0].bits
    for n, plane in enumerate(frame.planes):
        samples = np.frombuffer(plane, np.uint8 if bits == 8 else np.uint16)
        step_y, step_x = -(-frame.height // plane.height), -(-frame.width // plane.width)
        values = image[::step_y, ::step_x, n].astype(samples.dtype) << (bits - 8)
        samples.reshape(plane.height, -1)[:, :plane.width] = values
    return frame


def rgb(y, cb, cr, matrix, full):
    """Return the colour of 8-bit YCbCr by BT.601 (5), BT.709 (1) or BT.2020 (9)."""
    red, blue = {5: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}[matrix]
    y, cb, cr = ((y / 255, (cb - 128) / 255, (cr - 128) / 255) if full else
                 ((y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224))
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return np.clip(255 * np.array([r, (y - red * r - blue * b) / (1 - red - blue), b]), 0, 255)


def check_quarters(path, colours, tolerance, short_sides=(20, 33, 47, 48, 51, 96, 131), aspect=5/3):
    """Assert that a film and its copy show the four colours. aspect: W / H."""
    expected = np.reshape(colours, (2, 2, 3))
    for source in with_copy(path)[1]:
        for short_side in short_sides:
            (image,), _ = read(source, [0.1], 0, short_side)
            H, W = image.shape[:2]
            assert min(H, W) == short_side and abs(W / H / aspect - 1) < 0.03
            found = image[H // 4::H // 2, W // 4::W // 2][:2, :2]
            assert abs(found - expected).max() <= tolerance, (source, short_side)
    # Windows at the edges, in shares of W and H, and their quarters.
    for share, quarter in (((0.55, 0.05, 0.4, 0.4), 1), ((0, 0, 1e-5, 1e-5), 0),
                           ((-1e-9, 0.55, 0.45, 0.45), 2), ((0.995, 0.9, 0.005, 0.1 + 1e-9), 3)):
        (part,), _ = read(path, [0.1], 0, (40, 30), lambda W, H: np.multiply(share, (W, H, W, H)))
        assert part.shape == (40, 30, 3) and abs(part - colours[quarter]).max() <= tolerance, share


@pytest.mark.parametrize("pixels,matrix,full", [
    ("yuv420p", 5, False), ("yuv420p", 9, False), ("yuv420p", 1, True), ("yuv444p", 1, False),
    ("yuv410p", 5, False), ("yuv422p10le", 9, False), ("gray", 5, True), ("gray10le", 5, False)])
@pytest.mark.parametrize("size", [(160, 96), (75, 51)])
def test_colours(tmp_path, pixels, matrix, full, size):
    colours = [rgb(y, *((128, 128) if pixels.startswith("gray") else chroma), matrix, full)
               for y, *chroma in YUV]
    settings = {"colorspace": matrix, "color_range": 2 if full else 1}
    path = still(tmp_path / "a.mkv", frame_of(quarters(YUV, *size), pixels), settings=settings)
    check_quarters(path, colours, 1, aspect=size[0] / size[1])
    if size == (160, 96) and pixels != "yuv410p":     # at half the size, edges stay sharp
        (image,), _ = read(path, [0.1], 0, 48)
        assert abs(image - quarters(colours, 80, 48).astype(int)).max() <= 6


@pytest.mark.parametrize("name,codec,pixels", [
    ("a.mov", "png", "rgb24"), ("a.avi", "rawvideo", "bgr24"), ("a.mkv", "ffv1", "bgr0"),
    ("a.mkv", "ffv1", "gbrp10le"), ("a.avi", "rawvideo", "pal8"), ("a.nut", "rawvideo", "nv12")])
def test_colours_that_are_not_stored_as_planes_of_yuv(tmp_path, name, codec, pixels):
    if pixels == "pal8":
        palette = np.full((256, 4), 255, np.uint8)
        palette[:4, 1:] = RGB
        number = quarters([[0], [1], [2], [3]])[..., 0]
        frame = av.VideoFrame.from_ndarray((number, palette), "pal8")
    else:
        frame = av.VideoFrame.from_ndarray(quarters(RGB), "rgb24").reformat(format=pixels)
    # The copy is made of YUV, which is rounded.
    check_quarters(still(tmp_path / name, frame, codec), RGB, 2)


@pytest.mark.parametrize("exif,turned,corners", [
    (1, (0, False, False), "abcd"), (2, (0, True, False), "badc"), (3, (180, False, False), "dcba"),
    (4, (0, False, True), "cdab"), (5, (90, False, True), "acbd"), (6, (-90, False, False), "cadb"),
    (7, (90, True, False), "dbca"), (8, (90, False, False), "bdac")])
def test_turned_pictures(tmp_path, exif, turned, corners):
    """A display matrix asks for eight turns and mirror images, or EXIF in each picture of motion
    JPEG. A player stretches pixels that are not square."""
    tags = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x112, 3, 1, exif, 0)
    mark = b"\xff\xe1" + struct.pack(">H", len(tags) + 8) + b"Exif\0\0" + tags
    jpeg = still(tmp_path / "plain.mov", frame_of(quarters(YUV), "yuvj420p"), "mjpeg")
    jpeg = remux(jpeg, tmp_path / f"a.{('mov', 'avi', 'mkv')[exif % 3]}", ["video"],
                 lambda data: data[:2] + mark + data[2:])
    pixel = (Fraction(1), Fraction(64, 45), Fraction(8, 9))[exif % 3]
    film = still(tmp_path / "a.mp4", frame_of(quarters(YUV)), "libx264", turned=turned,
                 settings={"sample_aspect_ratio": pixel})
    for path, full, aspect in ((jpeg, True, 5 / 3), (film, False, 5 / 3 * pixel)):
        colours = [rgb(*YUV["abcd".index(corner)], 5, full) for corner in corners]
        check_quarters(path, colours, 10, (48, 64), aspect if exif < 5 else 1 / aspect)


@pytest.mark.parametrize("degrees", [0, 90])
def test_a_window_is_cut_from_the_picture(tmp_path, degrees):
    """A window is cut out of the whole picture, as FFmpeg converts it. Its edges are rounded to
    whole samples of chroma, here 2 pixels."""
    y, x, n = np.ogrid[:96, :144, :3]
    wave = np.sin(2 * np.pi * x / 48 + n) + np.sin(2 * np.pi * (x + 2 * y) / 96)
    texture = frame_of((128 + np.array((30, 15, 15)) * wave).round())
    path = still(tmp_path / "a.mp4", texture, "libx264", turned=(degrees, False, False))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    rng = np.random.default_rng(0)
    for scale in (Fraction(1, 2), Fraction(1), Fraction(3, 2)):
        size = int(144 * scale), int(96 * scale)
        whole = frame.reformat(*size, "rgb24", interpolation=EXACT).to_ndarray().astype(int)
        whole = np.rot90(whole, degrees // 90)
        (found,), _ = read(path, [0.1], 0, int(96 * scale))
        assert abs(found - whole).max() <= 1, scale
        for _ in range(10):
            box = [6 * int(n) for n in rng.integers((0, 0, 3, 3), (9, 9, 8, 8))]
            x, y, wide, high = (int(n * scale) for n in box)
            (found,), _ = read(path, [0.1], 0, (high, wide), lambda W, H: box)
            apart = abs(found - whole[y:y + high, x:x + wide])
            assert apart[2:-2, 2:-2].max() <= 2 and apart.max() <= 16, scale
            nearby = np.add(box, (0.4, -0.3, 0.3, -0.4))
            (again,), _ = read(path, [0.1], 0, (high, wide), lambda W, H: nearby)
            assert (again == found).all()


# ---- files with faults

def joined(path, codec="libx264", sound="aac", start=3.0, **second):
    """Write two films of 3 s into one file, whose format or stamps change between them."""
    film = dict(seconds=3, fps=25, codec=codec, audio_codec=sound)
    data = make_video(path, **film).read_bytes()
    path.write_bytes(data + make_video(path, start=start, **film | second).read_bytes())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("second", [{"rate": 32000, "layout": "stereo"}, {"size": (144, 108)}])
def test_the_format_may_change(tmp_path, second):
    row, both = with_copy(joined(tmp_path / "a.ts", **second))
    assert row["has_audio"] == 1 and abs(row["duration"] - 6) < 0.2
    for source in both:
        for t0 in (0.5, 2.5, 3.7):
            images, wave = read(source, [t0, t0 + 0.9], RATE, 48)
            assert [image.shape for image in images] == [(48, 64, 3)] * 2
            for part in np.split(wave, 4):
                assert abs(peak_hz(part) - 400) < 8 and part.std() > 0.25, (source, t0)


def packets_of(path, kind="video"):
    """Return the place and the size in the file of each packet of a stream."""
    with av.open(str(path)) as container:
        stream = container.streams.best(kind)
        return [(p.pos, p.size) for p in container.demux(stream) if p.size and p.pos]


def damaged(path, first, last, kind="video", seconds=5, **film):
    """Write a film, and overwrite its packets number `first` to `last` of a kind."""
    data = bytearray(make_video(path, seconds, 25, gop=25, **film).read_bytes())
    for pos, size in packets_of(path, kind)[first:last + 1]:
        data[pos:pos + size] = b"\xff" * size
    path.write_bytes(data)


def cut(path):
    """Write the first half of a film of 6 s."""
    data = make_video(path, 6, 25, muxer={"movflags": "faststart"}).read_bytes()
    path.write_bytes(data[:len(data) // 2])


def without_keyframe(path):
    """Write a film of 6 s without its first 5 pictures."""
    make_video(path, 6, 25)
    path.write_bytes(path.read_bytes()[packets_of(path)[5][0] // 188 * 188:])


def in_two_parts(path):
    """Write a late film, and change its edit list to show two parts of it."""
    data = bytearray(make_video(path, 5, 25, start=1).read_bytes())
    at = data.index(b"elst") + 16    # the first of two entries: show nothing for 1 s
    assert data[at:at + 4] == b"\xff" * 4
    data[at:at + 4] = (3000).to_bytes(4)
    path.write_bytes(data)


JOINED = "time stamps go from .* to .* as in joined recordings"


@pytest.mark.parametrize("name,make,words,fine,bad", [
    # Pictures that do not decode spoil the others up to the next keyframe.
    ("a.mp4", partial(damaged, first=40, last=45),
     r"damaged frames \(first at 1\.|damaged at 1\.", (0.2, 2, 3.3), (1.4, 1.7)),
    ("a.mp4", partial(damaged, first=3, last=3, kind="audio"), "sound.*damaged|damaged at 0", (1,),
     (0,)),
    ("a.mp4", partial(damaged, first=60, last=60, kind="audio"), "sound.*damaged|damaged at 1",
     (0, 1.5), (1.2,)),
    ("a.mp4", partial(damaged, first=0, last=0, seconds=0.04, codec="mpeg4", sound_seconds=1),
     "damaged at 0.00 s|it does not decode|no picture decodes$", (), (0,)),
    ("a.mp4", cut, "ends? at|too early", (1,), (4,)),
    ("a.mkv", cut, "ends? at|too early", (1,), (4,)),
    # The stamps begin anew or jump where two files were joined.
    ("a.ts", partial(joined, start=0), JOINED, (0, 1), ()),
    ("a.ts", partial(joined, start=1000), JOINED, (0, 1), (2.7,)),
    ("a.mpg", partial(joined, codec="mpeg2video", sound="mp2", start=0), JOINED, (0, 1), ()),
    ("a.mkv", partial(joined, start=2), JOINED, (0, 1), (2.7,)),
    ("a.ts", partial(joined, size=(54, 72)), "its pictures change their shape", (0.4,), (2.9,)),
    ("a.ts", without_keyframe, "begin without a keyframe", (), (0, 1, 3)),
    ("a.mp4", in_two_parts, "edit list has several parts", (), (0, 1)),
    ("a.h264", lambda path: make_video(path, 2, 25, tone=None), "no time stamps", (), (0,))])
def test_refused(tmp_path, name, make, words, fine, bad):
    """The scan and the transcoder refuse the file, and the reader the clips of 0.48 s from the
    times `bad` on. Those from the times `fine` on are right."""
    path = tmp_path / name
    make(path)
    # Without --verify the scan looks at the beginning, and at all stamps of JOINABLE files.
    is_seen_at_once = not fine or words == JOINED and path.suffix != ".mkv"
    for verify in {True, not is_seen_at_once}:
        row = scan.probe((path, "c", ""), verify)
        assert re.search(words, row["reason"] + row["note"])
    has_sound, of_sound, number = path.suffix != ".h264", "sound" in words, np.arange(12)
    with pytest.raises(ValueError, match=words):
        transcode.encode(path, tmp_path / "copy.mp4", 48, 15, has_sound)
    if words == JOINED:
        with pytest.raises(ValueError, match=words):
            read_sound(path)
        for t0 in (1.8, 2.7):
            with suppress(ValueError):      # what comes out is of one part
                assert (np.diff(shown(path, t0 + number / 25, sound=True)) >= 0).all()
    for t0, sound in itertools.product(fine, (False, True)):
        assert abs(shown(path, t0 + number / 25, sound) - 25 * t0 - number).max() <= 1, t0
    for t0, sound in itertools.product(bad, {has_sound, of_sound}):
        with pytest.raises(ValueError, match=words):
            shown(path, t0 + number / 25, sound)


@pytest.mark.slow
@pytest.mark.parametrize("suffix,codec,sound", [
    ("ts", "libx264", "aac"), ("mpg", "mpeg2video", "mp2"), ("flv", "libx264", "aac"),
    ("avi", "mpeg4", "libmp3lame"), ("asf", "wmv2", "libmp3lame"), ("mp4", "libvpx-vp9", None)])
def test_files_that_end_within_a_packet(tmp_path, suffix, codec, sound):
    """Recordings end anywhere. The last whole picture is the end."""
    path = tmp_path / f"a.{suffix}"
    muxer = {"movflags": "empty_moov", "frag_duration": "200000"} if suffix == "mp4" else {}
    make_video(path, 4, 25, (72, 54), sound and 400, codec, sound, muxer=muxer)
    data, whole, (_, _, begins) = path.read_bytes(), pictures_of(path), truth(path)
    size, pos = max((size, pos) for pos, size in packets_of(path) if 0.6 < pos / len(data) < 0.9)
    length = pos + size * 2 // 3
    path.write_bytes(data[:length // 188 * 188 if suffix == "ts" else length])
    pictures = pictures_of(path)
    times = np.array([t for t, image in sorted(pictures.items()) if (image == whole[t]).all()])
    numbers = np.array([read_barcode(whole[t]) for t in times])
    assert len(times) >= len(pictures) - 1
    row, both = with_copy(path)
    for source in both:
        assert wrong_frames(source, row, times, numbers, begins) == 0
    last = times[-1] - begins[0] - 0.2
    assert shown(path, last + np.arange(12) / 25)[-1] == numbers[-1]


def pictures_of(path):
    """Return {time in s: (H, W, 3)} of all pictures, damaged or not."""
    pictures = {}
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with suppress(av.error.FFmpegError):
                for frame in packet.decode():
                    pictures[frame.time] = frame.to_ndarray(format="rgb24")
    return pictures


def test_wmv3_packets_may_lack_a_last_zero_byte(tmp_path):
    with av.open(str(make_video(tmp_path / "a.mkv", 1, 25))) as container:
        packet = next(container.demux(video=0))
        longer = padded(packet)
        assert bytes(longer) == bytes(packet) + b"\0"
        for name in ("pts", "dts", "duration", "time_base", "is_keyframe", "stream_index"):
            assert getattr(longer, name) == getattr(packet, name), name


@pytest.mark.parametrize("name", ["take-12:30.mp4", "concat:a|b.mp4"])
def test_a_name_is_no_address(tmp_path, monkeypatch, name):
    """To FFmpeg a colon ends the name of a protocol. The suffix is wrong too."""
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "film.webm", 1, 25, codec="libvpx", audio_codec="libopus",
               rate=48000).rename(name)
    for source in with_copy(Path(name))[1]:
        assert shown(source, [0.6], sound=True).tolist() == [15]
    assert len(read_sound(name)[0]) == RATE


# ---- sound

@pytest.mark.parametrize("codec,cut", [("libx264", 0.213), ("libx264", 1.733), ("mpeg4", 0.52)])
def test_a_cut_without_encoding_keeps_sight_and_sound_together(tmp_path, codec, cut):
    """The edit list of an mp4 hides what comes before time 0, here between two keyframes. The
    sound begins at 2 s of the film."""
    path = make_video(tmp_path / "a.mp4", 5, 25, codec=codec, gop=25, start=-cut,
                      time_base=Fraction(1, 1000), ticks=list(range(0, 5000, 40)),
                      wave=lambda t: 0.5 * np.sin(2 * np.pi * 1000 * t) * (t >= 2))
    row, both = with_copy(path)
    assert abs(row["duration"] - (5 - cut)) < 0.06
    for source in both:
        for t0, sound in itertools.product((0, 0.61, 2.91), (False, True)):
            expected = np.maximum(np.round(25 * (t0 + cut) + np.arange(5)), np.ceil(25 * cut))
            assert shown(source, t0 + np.arange(5) / 25, sound).tolist() == expected.tolist()
        _, wave = read(source, [0.1], 2 * RATE)
        assert abs(0.1 + np.argmax(abs(wave) > 0.2) / RATE - (2 - cut)) < 0.005, source


@pytest.mark.parametrize("suffix,codec,rate,bits,lead", [
    ("mp4", "libmp3lame", 24000, 8000, 1.0), ("3gp", "libopencore_amrnb", 8000, 4750, 1.0),
    ("mov", "pcm_s16le", 24000, None, 0.2), ("mp4", "flac", 24000, None, 0.2),
    ("mp4", "libopus", 24000, None, 0.2)])
def test_the_sound_of_a_clip_is_that_of_the_whole_decode(tmp_path, suffix, codec, rate, bits, lead):
    path = make_video(tmp_path / f"a.{suffix}", 6, 25, audio_codec=codec, rate=rate, bit_rate=bits,
                      wave=lambda t: np.random.default_rng(0).normal(0, 0.2, len(t)))
    with open_file(path) as container:
        assert lead_in(open_streams(container)[1]) == lead
    whole, _ = read_sound(path)
    assert len(whole) == 6 * RATE
    for t0 in np.random.default_rng(1).integers(1000, 4500, 8) / 1000:
        _, wave = read(path, [t0], RATE)
        error = wave - whole[round(t0 * RATE):][:RATE]
        assert np.sqrt((error ** 2).mean()) < 1e-3 * np.sqrt((wave ** 2).mean()), t0


def test_mono_is_the_mean_of_the_channels(tmp_path):
    """Each channel has a tone of its own, which keeps its share of the loudness."""
    tones = 300 + 200 * np.arange(6)
    path = make_video(tmp_path / "a.mkv", 3, 10, audio_codec="pcm_s16le", layout="5.1",
                      wave=lambda t: 0.9 * np.sin(2 * np.pi * tones[:, None] * t))
    for wave in (read_sound(path)[0], read(path, [0.5], 48000)[1]):
        part = wave[6000:30000]     # 1 s
        heard = 2 * abs(np.fft.rfft(part))[tones] / len(part)
        assert abs(heard * 6 - 0.9).max() < 0.012, heard


def test_sound_whose_first_frames_have_no_stamp_is_placed_by_the_next(tmp_path):
    path = make_video(tmp_path / "a.mkv", 2, 25, audio_codec="pcm_s16le")
    with open_file(path) as container:
        audio = container.streams.audio[0]
        packets = list(container.demux(audio))[:-1]
        places, waves = zip(*place_sound(audio, packets, Damage()))
        for packet in packets[:3]:
            packet.pts = None
        new_places, new_waves = zip(*place_sound(audio, packets, Damage()))
    assert abs(new_places[0] - places[0]) < RATE / 1000     # the clock of an mkv ticks in ms
    assert (np.concatenate(new_waves) == np.concatenate(waves)).all()


@pytest.mark.slow
def test_sound_never_decides_about_pictures(tmp_path):
    """All pictures of films are kept whose sound is damaged or has no decoder."""
    root = tmp_path / "r" / "c"
    data = make_video(root / "no_decoder.mkv", 5, 25).read_bytes()
    (root / "no_decoder.mkv").write_bytes(data.replace(b"A_AAC", b"A_ZZZ"))
    damaged(root / "damaged.mp4", 100, 100, "audio")
    scan.survey("folder", tmp_path / "r", verify=True, out=tmp_path / "m.csv")
    transcode.run(tmp_path / "m.csv", tmp_path / "copy", 48)
    for manifest in (tmp_path / "m.csv", tmp_path / "copy" / "manifest.csv"):
        rows, left_out = read_manifest(manifest)
        assert not left_out and rows[1].note == "no decoder for its sound"
        assert rows[0].note.startswith("its sound cannot be read: damaged frames (first at 2.")
        for row in rows:
            assert abs(row.video_duration - 5) < 0.05
            assert shown(row.path, [4.6, 4.8]).tolist() == [115, 120]
