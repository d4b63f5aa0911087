"""The right pictures and sound of a file, whatever its container and codec (this project's).

    pictures, wave = read("film.avi", times=[2.0, 2.1, 2.2], samples=24000, short_side=160)

The picture at time t is the one whose time stamp is nearest to t, turned and mirrored as a player
shows it. Time 0 is where the pictures begin or, if sound is read too, where both have begun. A file
that cannot be read exactly is refused; nothing is shown approximately.

How a clip is read: seek to a keyframe before it; collect the packets up to its end; choose the
wanted ones by their time stamps; decode from the keyframe to the last wanted one. If the seek came
too late, or if a wanted picture did not come out, open the file again and begin earlier. The last
resort is to decode from the file's first packet on without a seek, which is always right.

Times are in s. A tick is the unit of a stream's time stamps. `damaged` is a list to which the times
of packets that do not decode are added.
"""

import re
from bisect import bisect_right
from collections import deque
from heapq import heappop, heappush
from itertools import chain

import av
import numpy as np
from av.video.reformatter import VideoReformatter

RATE = 24000                            # Hz, mono (paper silent; GDT)
WARM_UP = 0.2                           # s of sound decoded before a clip: codecs overlap packets
SEAM = 0.01                             # s; smaller gaps in the sound are rounded time stamps
REORDER = {"h264": 16, "hevc": 16}      # pictures that a decoder may hold back; others: at most 4
UNORDERED = {"avi", "asf"}              # containers that do not store when reordered pictures show
SKIPS = {"h264", "mpeg4", "mpeg1video", "mpeg2video"}   # decoders whose skip_frame may change
UPRIGHT = 65536, 0, 0, 65536            # the display matrix of most files


# ---- what the scan, the transcoder and the reader of clips share

def open_streams(container, sound=True):
    """The best video stream, and the best audio stream (None unless sound). Raises ValueError."""
    video = container.streams.best("video")
    audio = container.streams.best("audio") if sound else None
    if video is None or video.disposition & av.stream.Disposition.attached_pic:
        raise ValueError("no video stream")             # the cover of a piece of music is none
    if sound and audio is None:
        raise ValueError("no audio stream")
    for stream in (video, audio):
        if stream is not None and stream.codec_context is None:
            raise ValueError(f"no decoder for its {stream.type} stream")
    if not video.codec_context.is_open:
        video.codec_context.thread_count = 1            # a threaded decoder hangs if left early
    return video, audio


def begin(stream):
    """When the stream's first picture or sample is due, on the container's clock."""
    return float((stream.start_time or 0) * stream.time_base)


def end(container, stream):
    """When the stream ends by the file's header or by Matroska's tags; None if neither tells."""
    if stream.duration:
        return begin(stream) + float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag is None:
        return None
    hours, minutes, seconds = map(float, tag.groups())
    by_mkvmerge = "_STATISTICS_TAGS" in stream.metadata     # it counts from the stream's beginning
    return begin(stream) * by_mkvmerge + 3600 * hours + 60 * minutes + seconds


def decode(stream, packets, damaged):
    """The frames of the packets; a packet None stands for what the decoder still holds back."""
    for packet in packets:
        try:
            yield from stream.decode(packet)
        except av.error.FFmpegError:
            if packet is not None and packet.pts is not None:
                damaged.append(float(packet.pts * stream.time_base))


def forget_before(damaged, first):
    """Drop the damage before `first`, the time of the first frame that came out: there is nothing to
    read before it. A decoder that holds frames back may have met later damage already; that stays."""
    damaged[:] = [time for time in damaged if time > first]


def held_back(video):
    """How many pictures the decoder may hold back to put them in the order of presentation."""
    return REORDER.get(video.codec_context.name, 4)


def in_order(video, packets, damaged):
    """(time stamp, frame) in the order of presentation. A decoder puts the frames in this order,
    but their stamps may be out of order (UNORDERED). Raises ValueError if a frame has no stamp."""
    waiting, stamps, depth = deque(), [], held_back(video)
    for frame in decode(video, packets, damaged):
        if frame.pts is None:
            raise ValueError("its pictures have no time stamps")
        waiting.append(frame)
        heappush(stamps, frame.pts)
        if len(waiting) > depth:
            yield heappop(stamps), waiting.popleft()
    while waiting:
        yield heappop(stamps), waiting.popleft()


def display_matrix(frame):
    """(a, b, c, d): a player shows the pixel (x, y) at (a x + c y, b x + d y), times 1 / 65536."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    return tuple(np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].tolist())


def upright(image, matrix):
    """The pixels (H, W, ...) turned and mirrored by the display matrix (a, b, c, d)."""
    a, b, c, d = matrix
    if abs(b) > abs(a):                                 # a quarter turn exchanges x and y
        image, a, d = image.swapaxes(0, 1), c, b
    return image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


class Shape:
    """Checks that all frames have the shape of the first: the pictures of a clip have one shape."""

    first = None

    def check(self, frame):
        """Return (width, height) of the first frame. Raises ValueError if this frame is turned in
        another way, or if its aspect differs by more than 1 %."""
        now = frame.width, frame.height, frame.rotation
        self.first = width, height, rotation = self.first or now
        aspect = frame.width / frame.height / (width / height)
        if now != self.first and (frame.rotation != rotation or abs(aspect - 1) > 0.01):
            raise ValueError("its pictures change their shape")
        return width, height


class MonoResampler:
    """Frames of sound -> pieces: AudioFrames, mono, float32, 24 kHz. The format may change."""

    resampler = format = None

    def __call__(self, frame):
        """The pieces that the frame completes, a list; for None those that are still held back."""
        kind = frame and (frame.format.name, frame.layout.name, frame.sample_rate)
        pieces = self.resampler.resample(None) if self.resampler and kind != self.format else []
        if frame is not None:
            if kind != self.format:
                self.resampler, self.format = av.AudioResampler("fltp", "mono", RATE), kind
            pieces += self.resampler.resample(frame)
        return pieces


# ---- one clip

def read(path, times, samples=0, short_side=160):
    """Read the pictures at `times`, and the sound from the first of these times on.

    Args:
        times: ascending, in s after zero. Past the end of the file the last picture stands.
        samples: length of the sound in samples at 24 kHz. 0: no sound is read. The sound is silent
            past its end, and where the file has none.
        short_side: shorter side of the pictures in pixels; the longer one keeps the aspect.
    Returns:
        A list of arrays (H, W, 3) uint8, one for each time, and the sound (samples,) float32.
        Raises ValueError, OSError or av.error.FFmpegError if the file does not give them exactly.
    """
    back, early, sort, trouble = WARM_UP, 0.0, False, None
    while True:                                         # each round begins earlier than the last
        with av.open(str(path), metadata_errors="replace") as container:
            video, audio = open_streams(container, sound=samples > 0)
            tick = float(video.time_base)
            zero = max(begin(stream) for stream in (video, audio) if stream is not None)
            wanted = [zero + time for time in times]
            stop = wanted[0] + samples / RATE
            kind = container.format.name
            sort = sort or kind in UNORDERED and video.codec_context.has_b_frames
            early = max(early, 1.0 if sort or kind == "mpeg" else 0.0)
            first = wanted[0] - early                   # decode from a keyframe not after this time
            fresh = first - back <= begin(video)        # read from the first packet on
            if not fresh and not seek(container, video, first - back):
                back = np.inf
                continue
            packets = collect(container, video, audio, first, wanted, stop, fresh, sort)
            if packets is None:
                back = max(1.0, 2 * back)
                continue
            pictures, sound = packets
            if not sort and any(packet.pts is None for packet in pictures):
                sort = True
                continue

            damaged, damaged_sound, convert = [], [], Converter(short_side)
            if sort:
                images, fault = decode_all(video, pictures, wanted, convert, damaged)
                missing = set()
            else:
                images, missing, fault = decode_wanted(video, pictures, wanted, convert, damaged)
            wave = np.zeros(samples, np.float32)
            heard = audio is None or hear(audio, sound, wave, wanted[0], damaged_sound)
            keys = [p.pts * tick for p in pictures if p.is_keyframe and p.pts is not None]
            key = max((time for time in keys if time <= wanted[0]), default=min(keys, default=0.0))
            damaged = [time for time in damaged if time >= key]
            damaged += [time for time in damaged_sound if wanted[0] <= time < stop]
            whole = images and heard and not missing and not damaged
            if whole and (not fault or fresh and fault != "order"):
                return images, wave

            # what is missing from two keyframes on, or from the first packet on, is missing
            again = trouble and trouble[0] != pictures[0].pts and trouble[1:] == (missing, damaged)
            trouble = pictures[0].pts, missing, damaged
            if fault == "order":
                sort = True
            elif fresh or again and not fault:
                if damaged:
                    raise ValueError(f"damaged at {min(damaged) - zero:.2f} s")
                if fresh and not (images and heard):
                    cause = "sound" if images else "picture"
                    raise ValueError(f"no {cause} decodes at {times[0]:.2f} s")
                sort = True                             # choose among the pictures that come out
            early = max(1.0, 2 * early)


def seek(container, video, time):
    """Go to the last keyframe before `time`, as the container sees it. False if it cannot."""
    if re.search("pal8|444", video.codec_context.pix_fmt or ""):
        first = next(container.demux(video))            # only it has the palette, x264's version
        list(decode(video, [first], []))
    try:
        container.seek(int(time // video.time_base), stream=video)
    except av.error.FFmpegError:
        return False
    return True


def collect(container, video, audio, first, wanted, stop, fresh, sort):
    """The packets of a clip: (pictures, sound), or None if the container gives only later ones.

    Those of the pictures go from the last keyframe not after `first` to `held_back` behind the last
    wanted time, those of the sound from WARM_UP before the first wanted time to past `stop`.
    Raises ValueError if the file ends in the clip, over 1 s before its header says.
    """
    pictures, sound, behind, most, opening = [], [], 0, held_back(video), np.inf
    ticks = {stream: float(stream.time_base) for stream in (video, audio) if stream is not None}
    reached = dict.fromkeys(ticks, -np.inf)
    for packet in container.demux(list(ticks)):
        if not packet.size:                             # PyAV ends each stream with an empty packet
            continue
        stream, tick = packet.stream, ticks[packet.stream]
        time = None if packet.pts is None else packet.pts * tick
        if time is not None:
            reached[stream] = max(reached[stream], time + (packet.duration or 0) * tick)
        if stream is audio:
            opening = min(opening, np.inf if time is None else time)
            if time is None or reached[audio] >= wanted[0] - WARM_UP:
                sound.append(packet)
            if behind >= most and time is not None and time > stop + 0.1:
                break                                   # 0.1 s: decoder and resampler hold back
        elif behind < most and (pictures or fresh or packet.is_keyframe):
            if packet.is_keyframe and not fresh and time is not None:
                if time > first and not pictures:
                    return None
                if time <= first and not sort:          # what came before is not needed
                    pictures.clear()
            pictures.append(packet)
            behind += time is not None and time > wanted[-1]
            if behind >= most and audio is None:
                break
    late = audio is not None and opening > max(begin(audio), wanted[0] - WARM_UP) + 1e-3
    nothing = all(packet.is_discard for packet in pictures)     # an edit list cuts them off
    if not fresh and (late or nothing):
        return None
    if nothing:
        raise ValueError("no picture decodes")
    for stream, last in ((video, wanted[-1]), (audio, stop)):
        if stream is not None and reached[stream] < min(last, (end(container, stream) or 0) - 1):
            raise ValueError(f"its {stream.type} ends at {reached[stream]:.2f} s of "
                             f"{end(container, stream):.2f} s")
    return pictures, sound


def nearest(stamps, times):
    """For each time the nearest of the ascending stamps, of two equally near ones the later."""
    middles = [(a + b) / 2 for a, b in zip(stamps, stamps[1:])]
    return [stamps[bisect_right(middles, time)] for time in times]


def decode_wanted(video, pictures, wanted, convert, damaged):
    """Choose the wanted pictures by the stamps of their packets, and decode what they need.

    Returns a list of arrays, the set of the stamps that did not come out, and a fault: "key" if the
    first packet did not come out as a keyframe, "order" if the frames came in another order than
    their stamps, else "".
    """
    tick, images, before, fault = float(video.time_base), {}, -np.inf, "key"
    stamps = sorted({packet.pts for packet in pictures if not packet.is_discard})
    chosen = nearest(stamps, [time / tick for time in wanted])
    missing = set(chosen)
    last = max(n for n, packet in enumerate(pictures) if packet.pts in missing)
    skips = video.codec_context.name in SKIPS

    def packets():
        for packet in pictures[:last + 1]:
            if skips:                                   # what no other picture refers to
                video.codec_context.skip_frame = "DEFAULT" if packet.pts in missing else "NONREF"
            yield packet
        yield None

    for frame in decode(video, packets(), damaged):
        if frame.pts is None or frame.pts < before:
            return [], set(), "order"
        before = frame.pts
        if frame.pts == pictures[0].pts and frame.key_frame:
            fault = ""
        if frame.pts in missing and not frame.is_corrupt:
            images[frame.pts] = convert(frame)
            missing.discard(frame.pts)
    return [images.get(stamp) for stamp in chosen], missing, fault


def decode_all(video, pictures, wanted, convert, damaged):
    """Decode all, sort the stamps, and choose among the pictures that come out.

    Returns a list of arrays, and the fault "late" if the first picture comes after the first wanted
    time, else "".
    """
    tick, images, start = float(video.time_base), [], np.inf
    before, shown, image = None, start, None            # the last frame, its time, its array
    frames = in_order(video, [*pictures, None], damaged)
    for stamp, frame in chain(frames, [(np.inf, None)]):
        time = stamp * tick
        start = min(start, time)
        while before and len(images) < len(wanted) and wanted[len(images)] < (shown + time) / 2:
            if image is None:
                damaged += [shown] * before.is_corrupt
                image = convert(before)
            images.append(image)
        if len(images) == len(wanted):
            break
        before, shown, image = frame, time, None
    return images, "late" if start > wanted[0] else ""


class Converter:
    """Frames -> arrays (H, W, 3) uint8 as a player shows them; short_side: in pixels."""

    def __init__(self, short_side):
        self.short_side, self.shape, self.matrix = short_side, Shape(), None
        self.reformatter = VideoReformatter()           # shared by the frames: it keeps its tables

    def __call__(self, frame):
        width, height = self.shape.check(frame)
        scale = self.short_side / min(width, height)
        size = round(width * scale), round(height * scale)
        small = self.reformatter.reformat(frame, *size, "rgb24", interpolation="AREA", threads=1)
        # not the matrix of `frame`, which PyAV would keep in memory if it were asked for it
        self.matrix = self.matrix or display_matrix(small)
        return upright(small.to_ndarray(), self.matrix)


def hear(audio, packets, wave, start, damaged):
    """Decode the packets into wave (samples,) from time `start` on. False if none decodes."""
    at, resample = None, MonoResampler()
    frames = chain(decode(audio, packets, damaged), [None])
    for piece in (piece for frame in frames for piece in resample(frame)):
        if piece.pts is None and at is None:
            raise ValueError("its sound has no time stamps")
        due = at if piece.pts is None else (piece.time - start) * RATE  # its place in the wave
        if at is None:                                  # the first after a seek may be a fragment
            forget_before(damaged, piece.time)
        if at is None or abs(due - at) > SEAM * RATE:
            at = round(due)
        low, high = max(at, 0), min(at + piece.samples, len(wave))
        if low < high:
            samples = np.frombuffer(piece.planes[0], np.float32, piece.samples)
            wave[low:high] = samples[low - at:high - at]
        at += piece.samples
        if at >= len(wave):
            break
    return at is not None
