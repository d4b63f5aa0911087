"""The right pictures and sound of a file, whatever its container and codec (paper silent; this project's).

    pictures, wave = read("film.avi", t0=2.0, times=[2.0, 2.1, 2.2], samples=24000, short_side=160)

The picture at time t is the one whose time stamp is nearest to t, in the order in which a player shows the pictures,
turned and mirrored as the file tells a player to. Time 0 is where the pictures begin or, if sound is read too, where
both have begun. A file that cannot be read exactly is refused by name, never shown approximately.

How a window is read: seek to a keyframe before it, collect the packets up to its end, choose the wanted ones by their
time stamps, and decode from the keyframe to the last wanted one. If the seek landed too late, or if what was wanted
did not come out, open the file again and begin earlier. The last resort is to decode from the first packet on without
a seek, which is always right. Times are in s, `tick` is the length of one unit of a stream's time stamps in s.
"""

import re
from bisect import bisect_right
from collections import deque
from heapq import heappop, heappush
from itertools import chain

import av
import numpy as np
from av.video.reformatter import VideoReformatter

RATE = 24000                                            # Hz, mono (paper silent; GDT)
WARM_UP = 0.2                                           # s of sound decoded before the window: codecs overlap packets
SEAM = 0.01                                             # s; smaller gaps in the sound are rounded time stamps
REORDER = 16                                            # pictures that a codec may hold back (H.264, HEVC: at most 16)
UNORDERED = {"avi", "asf"}                              # containers without the time stamps of reordered pictures
SKIPS = {"h264", "mpeg4", "mpeg1video", "mpeg2video"}   # decoders whose skip_frame may change at any packet


def open_streams(container, sound=True):
    """The best video stream and, with sound, the best audio stream (else None). ValueError names what is missing."""
    video, audio = container.streams.best("video"), container.streams.best("audio") if sound else None
    if video is None or video.disposition & av.stream.Disposition.attached_pic:     # a cover is no video
        raise ValueError("no video stream")
    if sound and audio is None:
        raise ValueError("no audio stream")
    for stream in (video, audio):
        if stream is not None and stream.codec_context is None:
            raise ValueError(f"no decoder for its {stream.type} stream")
    if not video.codec_context.is_open:
        video.codec_context.thread_count = 1            # a threaded decoder hangs when it is left early
    return video, audio


def begin(stream):
    """The time of a stream's first picture or sample on the container's clock, s."""
    return float((stream.start_time or 0) * stream.time_base)


def end(container, stream):
    """The time at which the stream ends by the file's header or by Matroska's tags, s; None where neither tells."""
    if stream.duration:
        return begin(stream) + float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag:
        hours, minutes, seconds = map(float, tag.groups())
        counted_from = begin(stream) if "_STATISTICS_TAGS" in stream.metadata else 0.0      # mkvmerge, FFmpeg
        return counted_from + 3600 * hours + 60 * minutes + seconds
    return None


def decode(stream, packets, damaged):
    """The frames of the packets. The time of each packet that does not decode is added to the list `damaged`."""
    for packet in packets:
        try:
            yield from stream.decode(packet)
        except av.error.FFmpegError:
            if packet is not None and packet.pts is not None:
                damaged.append(float(packet.pts * stream.time_base))


def in_order(frames):
    """(time stamp, frame) in the order of presentation. A decoder always puts the frames in this order; their stamps may
    need sorting (UNORDERED). Raises ValueError where a frame has no stamp."""
    waiting, stamps = deque(), []
    for frame in frames:
        if frame.pts is None:
            raise ValueError("its pictures have no time stamps")
        waiting.append(frame)
        heappush(stamps, frame.pts)
        if len(waiting) > REORDER:
            yield heappop(stamps), waiting.popleft()
    while waiting:
        yield heappop(stamps), waiting.popleft()


UPRIGHT = 65536, 0, 0, 65536                            # the display matrix of most files


def display_matrix(frame):
    """(a, b, c, d): a player shows the pixel (x, y) at (a x + c y, b x + d y), in units of 1 / 65536."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return UPRIGHT if matrix is None else tuple(np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].tolist())


def upright(image, matrix):
    """The pixels (H, W, ...) as a player shows them by the display matrix (a, b, c, d): turned, mirrored."""
    a, b, c, d = matrix
    if abs(b) > abs(a):                                 # a quarter turn exchanges x and y
        image, a, d = image.swapaxes(0, 1), c, b
    return image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


class Shape:
    """Checks that all frames have the shape of the first: the pictures of a clip have one."""

    def __init__(self):
        self.first = None

    def check(self, frame):
        """(width, height) of the first frame. ValueError if this frame's aspect (by over 1 %) or rotation is another."""
        now = frame.width, frame.height, frame.rotation
        self.first = width, height, rotation = self.first or now
        if now != self.first and (now[2] != rotation or abs(now[0] / now[1] * height / width - 1) > 0.01):
            raise ValueError("its pictures change their shape")
        return width, height


class Converter:
    """Frames -> arrays (H, W, 3) uint8 as a player shows them, the shorter side short_side pixels, the aspect kept."""

    def __init__(self, short_side):
        self.short_side, self.reformatter, self.shape, self.matrix = short_side, VideoReformatter(), Shape(), None

    def __call__(self, frame):
        width, height = self.shape.check(frame)
        scale = self.short_side / min(width, height)
        size = round(width * scale), round(height * scale)
        small = self.reformatter.reformat(frame, *size, "rgb24", interpolation="AREA", threads=1)
        self.matrix = self.matrix or display_matrix(small)      # asked for the frame's, PyAV would keep the frame alive
        return upright(small.to_ndarray(), self.matrix)


class MonoResampler:
    """Frames of sound -> AudioFrames, mono, float32, 24 kHz. Where the format changes, a new resampler goes on."""

    def __init__(self):
        self.resampler = self.format = None

    def __call__(self, frame):
        """The pieces that the frame gives, a list; for None those that are still held back."""
        kind = None if frame is None else (frame.format.name, frame.layout.name, frame.sample_rate)
        pieces = self.resampler.resample(None) if self.resampler and kind != self.format else []
        if frame is not None:
            if kind != self.format:
                self.resampler, self.format = av.AudioResampler("fltp", "mono", RATE), kind
            pieces += self.resampler.resample(frame)
        return pieces


def hear(audio, packets, start, samples, damaged):
    """`samples` samples of sound from time `start` on, float32, silent where there is none; None if nothing decodes."""
    wave, at, resample = np.zeros(samples, np.float32), None, MonoResampler()
    for piece in (p for frame in chain(decode(audio, packets, damaged), [None]) for p in resample(frame)):
        if piece.pts is None and at is None:
            raise ValueError("its sound has no time stamps")
        due = at if piece.pts is None else (piece.time - start) * RATE      # where the piece belongs, in samples
        if at is None:
            damaged.clear()                             # after a seek the first packet may be a fragment
        if at is None or abs(due - at) > SEAM * RATE:
            at = round(due)
        low, high = max(at, 0), min(at + piece.samples, samples)
        if low < high:
            wave[low:high] = np.frombuffer(piece.planes[0], np.float32, piece.samples)[low - at:high - at]
        at += piece.samples
        if at >= samples:
            break
    return wave if at is not None else None


def collect(container, video, audio, first, wanted, stop, fresh, sort):
    """The packets of the pictures from a keyframe not after `first` to REORDER behind the last wanted time, and those of
    the sound from WARM_UP before the first wanted time until past `stop`. None if the container gives only later ones.

    Raises ValueError where the file ends in the middle of what is wanted, over 1 s before its header says."""
    pictures, sound, behind, opening = [], [], 0, np.inf
    ticks = {stream: float(stream.time_base) for stream in (video, audio) if stream is not None}
    reached = dict.fromkeys(ticks, -np.inf)
    for packet in container.demux(list(ticks)):
        if not packet.size:                             # PyAV ends each stream with an empty packet
            continue
        time, tick = None if packet.pts is None else packet.pts * ticks[packet.stream], ticks[packet.stream]
        if time is not None:
            reached[packet.stream] = max(reached[packet.stream], time + (packet.duration or 0) * tick)
        if packet.stream is audio:
            opening = min(opening, np.inf if time is None else time)
            if time is None or reached[audio] >= wanted[0] - WARM_UP:
                sound.append(packet)
            if behind >= REORDER and time is not None and time > stop:
                break
        elif behind < REORDER and (pictures or fresh or packet.is_keyframe):
            if packet.is_keyframe and not fresh and time is not None:
                if time > first and not pictures:
                    return None
                if time <= first and not sort:          # what came before this keyframe is not needed
                    pictures.clear()
            pictures.append(packet)
            behind += time is not None and time > wanted[-1]
            if behind >= REORDER and audio is None:
                break
    late = audio is not None and opening > max(begin(audio), wanted[0] - WARM_UP) + 1e-3
    if not fresh and (late or not pictures):
        return None
    for stream, last in ((video, wanted[-1]), (audio, stop)):
        if stream is not None and reached[stream] < min(last, (end(container, stream) or 0) - 1):
            raise ValueError(f"its {stream.type} ends at {reached[stream]:.2f} s of {end(container, stream):.2f} s")
    return pictures, sound


def nearest(stamps, times):
    """For each time the stamp nearest to it, of two equally near ones the later. stamps, times: of one unit, ascending."""
    middles = [(a + b) / 2 for a, b in zip(stamps, stamps[1:])]
    return [stamps[bisect_right(middles, time)] for time in times]


def decode_wanted(video, pictures, times, convert, damaged):
    """The pictures whose stamps are nearest to the times (in ticks). Pictures that are neither wanted nor needed by
    others are not decoded.

    Returns {stamp: array}, the stamp for each time, and what was wrong: "unkeyed" if the first packet did not come out
    as a keyframe, "unordered" if frames came in another order than their stamps, else "".
    """
    chosen = nearest(sorted({p.pts for p in pictures if not p.is_discard}), times)  # is_discard: cut off by an edit list
    images, wanted, before, wrong = {}, set(chosen), -np.inf, "unkeyed"
    last = max(n for n, packet in enumerate(pictures) if packet.pts in wanted)

    def packets():
        for packet in pictures[:last + 1]:
            if video.codec_context.name in SKIPS:
                video.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield packet
        yield None                                      # the pictures that the decoder still holds back

    for frame in decode(video, packets(), damaged):
        if frame.pts is None or frame.pts < before:
            return images, chosen, "unordered"
        before = frame.pts
        if frame.pts == pictures[0].pts and frame.key_frame:
            wrong = ""
        if frame.pts in wanted and not frame.is_corrupt:
            images[frame.pts] = convert(frame)
    return images, chosen, wrong


def decode_sorted(video, pictures, wanted, convert, damaged):
    """The picture nearest to each wanted time among all that come out, a list of arrays, and the time of the first."""
    images, first, before, image, tick = [], None, None, None, float(video.time_base)
    for stamp, frame in chain(in_order(decode(video, [*pictures, None], damaged)), [(np.inf, None)]):
        time = stamp * tick
        first = time if first is None else first
        while before and len(images) < len(wanted) and wanted[len(images)] < (before_time + time) / 2:
            if image is None:
                damaged += [before_time] * before.is_corrupt
                image = convert(before)
            images.append(image)
        if len(images) == len(wanted):
            break
        before, before_time, image = frame, time, None
    return images, first


def read(path, times, samples=0, short_side=160):
    """Read one clip: the pictures at `times`, and the sound from the first of these times on.

    Args:
        times: ascending, in s after zero (see above). Past the end the last picture stands.
        samples: how much sound to read, in samples at 24 kHz; 0: none, then zero is where the pictures begin. Past the
            end, and in gaps, the sound is silent.
        short_side: of the pictures, in pixels.
    Returns:
        A list of arrays (H, W, 3) uint8, one for each time, and the sound, (samples,) float32 in [-1, 1].
        Raises ValueError, OSError or av.error.FFmpegError with the cause where the file does not give them exactly.
    """
    back, early, sort, trouble = WARM_UP, 0.0, False, None
    while True:                                         # each round opens the file again and begins earlier
        with av.open(str(path), metadata_errors="replace") as container:
            video, audio = open_streams(container, sound=samples > 0)
            tick, zero = float(video.time_base), max(begin(x) for x in (video, audio) if x is not None)
            wanted = [zero + time for time in times]
            sort = sort or container.format.name in UNORDERED and video.codec_context.has_b_frames
            early = max(early, 1.0 if sort or container.format.name == "mpeg" else 0.0)
            first = wanted[0] - early                   # decode from a keyframe not after this time
            fresh = first - back <= begin(video)        # read from the file's first packet on
            if not fresh:
                if re.search("pal8|444", video.codec_context.pix_fmt or ""):
                    list(decode(video, [next(container.demux(video))], []))     # only it tells palette or x264's version
                try:
                    container.seek(int((first - back) / tick), stream=video)
                except av.error.FFmpegError:
                    back = np.inf
                    continue
            packets = collect(container, video, audio, first, wanted, wanted[0] + samples / RATE + 0.1, fresh, sort)
            if packets is None:
                back = max(1.0, 2 * back)
                continue
            pictures, sound = packets
            if not sort and any(packet.pts is None for packet in pictures):
                sort = True
                continue
            if not pictures:
                raise ValueError("no picture decodes")
            convert, missing, damaged, cracks = Converter(short_side), set(), [], []
            if sort:
                images, start = decode_sorted(video, pictures, wanted, convert, damaged)
                wrong = "" if images and start <= wanted[0] else "late"
            else:
                found, chosen, wrong = decode_wanted(video, pictures, [t / tick for t in wanted], convert, damaged)
                images, missing = [found.get(stamp) for stamp in chosen], set(chosen) - found.keys()
            wave = hear(audio, sound, wanted[0], samples, cracks) if audio is not None else np.zeros(0, np.float32)
            keys = [p.pts * tick for p in pictures if p.is_keyframe and p.pts is not None]
            key = max((time for time in keys if time <= wanted[0]), default=min(keys, default=-np.inf))
            damaged = [t for t in damaged if t >= key] + [t for t in cracks if 0 <= t - wanted[0] < samples / RATE]
            again = trouble and trouble[0] != pictures[0].pts and trouble[1:] == (missing, damaged)
            trouble = pictures[0].pts, missing, damaged
            if wrong == "unordered":
                sort = True
            elif images and wave is not None and not missing and not damaged and (fresh or not wrong):
                return images, wave
            elif fresh or again and not wrong:          # beginning earlier does not help
                if damaged:
                    raise ValueError(f"damaged at {min(damaged) - zero:.2f} s")
                if fresh and (not images or wave is None):
                    raise ValueError(f"no {'sound' if images else 'picture'} decodes at {times[0]:.2f} s")
                sort = True
            early = max(1.0, 2 * early)
