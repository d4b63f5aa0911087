"""Reads the right pictures and sound of a file, from any container and codec (paper silent).

    pictures, wave = read("film.avi", times=[2.0, 2.1, 2.2], samples=24000, short_side=160)

The picture at time t is the one whose time stamp is nearest to t. It is turned and mirrored as a
player shows it. Time 0 is the time at which the pictures begin or, if sound is read too, at which
both have begun. `read` refuses a file that it cannot read exactly; it never approximates.

How `read` works:
1. Open the file, and seek to a keyframe before the clip.
2. Collect the packets from this keyframe to the end of the clip, without decoding them.
3. Choose the wanted pictures by the time stamps of their packets.
4. Decode from the keyframe to the last wanted picture.
If the seek came too late, or if a wanted picture did not come out, `read` opens the file again and
begins earlier. The last resort is to decode from the file's first packet on without a seek, which
is always right.

A packet is compressed, a frame is decoded. A time stamp, in short a stamp, counts the ticks of its
stream; all other times are in s. `damaged` is always a Damage, to which a function adds the times
of the packets that it could not decode.
"""

import re
from bisect import bisect_right
from collections import deque
from heapq import heappop, heappush
from itertools import chain

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter

RATE = 24000                            # Hz, mono (paper silent; GDT)
WARM_UP = 0.2                           # s; decoding of the sound begins so much earlier
SEAM = 0.01                             # s; a smaller gap in the sound is a rounded time stamp
REORDER = {"h264": 16, "hevc": 16}      # pictures that a decoder may hold back; others: 4
UNORDERED = {"avi", "asf"}              # these containers do not store when a picture is shown
SKIPS = {"h264", "mpeg4", "mpeg1video", "mpeg2video"}   # decoders that let skip_frame change
UPRIGHT = 65536, 0, 0, 65536            # the display matrix of most files


# ---- functions that the scan and the transcoder use too

def open_streams(container, sound=True):
    """Return the best video stream and the best audio stream of an open file.

    With sound=False the audio stream is None. Raises ValueError if a stream or its decoder is
    missing.
    """
    video = container.streams.best("video")
    audio = container.streams.best("audio") if sound else None
    if video is None or video.disposition & av.stream.Disposition.attached_pic:
        raise ValueError("no video stream")             # the cover picture of a song is no video
    if sound and audio is None:
        raise ValueError("no audio stream")
    for stream in (video, audio):
        if stream is not None and stream.codec_context is None:
            raise ValueError(f"no decoder for its {stream.type} stream")
    if not video.codec_context.is_open:
        video.codec_context.thread_count = 1            # a threaded decoder hangs if left early
    return video, audio


def begin(stream):
    """Return the time of the stream's first picture or sample, on the container's clock."""
    return float((stream.start_time or 0) * stream.time_base)


def end(container, stream):
    """Return when the stream ends, by the file's header or by Matroska's tags, or None."""
    if stream.duration:
        return begin(stream) + float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag is None:
        return None
    hours, minutes, seconds = map(float, tag.groups())
    by_mkvmerge = "_STATISTICS_TAGS" in stream.metadata     # mkvmerge counts from its beginning
    return begin(stream) * by_mkvmerge + 3600 * hours + 60 * minutes + seconds


def demux(container, streams):
    """Yield the packets of the streams up to the end of the file."""
    try:
        yield from container.demux(streams)
    except IndexError:      # PyAV raises it at the end if a stream has appeared in mid-file (FLV)
        return


class Damage(list):
    """The times of the packets of a stream that do not decode."""

    last = tick = None          # the stamp of the last packet so far, and the time base in s

    def forget_before(self, first):
        """Drop the damage before `first`, the time of the first frame: nothing is read before it.

        Later damage stays: a decoder that holds frames back may meet it before its first frame.
        """
        self[:] = [time for time in self if time > first]

    def inside(self):
        """Return the damage that is not in the last packet, a list.

        Many recordings end within a packet. Such a file is read as if it ended before this packet.
        """
        end = None if self.last is None else float(self.last * self.tick)
        return [time for time in self if time != end]


def decode(stream, packets, damaged):
    """Yield the frames of the packets. The packet None asks for the frames still held back."""
    damaged.tick, is_wmv3 = stream.time_base, stream.codec_context.name == "wmv3"
    for packet in packets:
        try:
            if packet is not None and packet.size:
                damaged.last = packet.pts
                if packet.is_corrupt and stream.container.format.name not in ("mpegts", "mpeg"):
                    # The file ends within the packet, which not all decoders notice. In MPEG-TS and
                    # MPEG-PS the flag is about larger pieces, most of whose packets are whole.
                    raise av.error.InvalidDataError(0, "cut off")
                if is_wmv3:
                    packet = padded(packet)
            yield from stream.decode(packet)
        except av.error.FFmpegError:
            if packet is not None and packet.pts is not None:
                damaged.append(float(packet.pts * damaged.tick))


def padded(packet):
    """Return a copy of the packet with a zero byte behind its data.

    Encoders of WMV3 may drop a picture's last byte if it is zero. Without it FFmpeg's decoder takes
    the picture for damaged, and draws over good parts of it. What is really cut off is still found.
    """
    copy = av.Packet(bytes(packet) + b"\0")
    copy.stream, copy.is_keyframe, copy.time_base = (packet.stream, packet.is_keyframe,
                                                     packet.time_base)
    copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
    return copy


def held_back(video):
    """Return how many pictures the decoder may hold back to put them in the order of display."""
    return REORDER.get(video.codec_context.name, 4)


def in_order(video, packets, damaged):
    """Yield (stamp, frame) in the order of display.

    A decoder returns the frames in this order, but their stamps may be out of order (UNORDERED),
    so each frame gets the smallest stamp that is left. Raises ValueError if a frame has no stamp.
    """
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


@classmethod
def unnamed(cls, value):
    """Return a member of Type for a type of side data that PyAV does not know, such as EXIF."""
    member = object.__new__(cls)
    member._name_, member._value_ = str(value), value
    return member


Type._missing_ = unnamed                # else frame.side_data raises ValueError on such a frame


def display_matrix(frame):
    """Return (a, b, c, d): a player moves pixel (x, y) to (a x + c y, b x + d y) / 65536."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    return tuple(np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].tolist())


def upright(image, matrix):
    """Return the pixels (H, W, ...) turned and mirrored by the display matrix (a, b, c, d)."""
    a, b, c, d = matrix
    if abs(b) > abs(a):                                 # a quarter turn exchanges x and y
        image, a, d = image.swapaxes(0, 1), c, b
    return image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


class Shape:
    """Checks that all frames have the shape of the first: the pictures of a clip have one shape."""

    first = None

    def check(self, frame):
        """Return (width, height) of the first frame.

        Raises ValueError if this frame is turned in another way, or if its aspect differs by more
        than 1 %.
        """
        self.first = self.first or (frame.width, frame.height, frame.rotation)
        width, height, rotation = self.first
        aspect = frame.width / frame.height / (width / height)
        if frame.rotation != rotation or abs(aspect - 1) > 0.01:
            raise ValueError("its pictures change their shape")
        return width, height


class MonoResampler:
    """Turns frames of sound into AudioFrames that are mono, float32, 24 kHz, called pieces.

    The format of the frames may change in mid-stream.
    """

    resampler = format = None

    def __call__(self, frame):
        """Return the pieces that the frame completes, a list. None asks for those held back."""
        new = frame and (frame.format.name, frame.layout.name, frame.sample_rate)
        pieces = self.resampler.resample(None) if self.resampler and new != self.format else []
        if frame is not None:
            if new != self.format:
                self.resampler, self.format = av.AudioResampler("fltp", "mono", RATE), new
            pieces += self.resampler.resample(frame)
        return pieces


# ---- one clip

def read(path, times, samples=0, short_side=160):
    """Read the pictures at `times`, and the sound from the first of these times on.

    Args:
        times: ascending, in s. Past the end of the file the last picture is repeated.
        samples: length of the sound in samples at 24 kHz. With 0 no sound is read. Gaps in the
            file's sound, and the time past its end, are silent.
        short_side: shorter side of the pictures in pixels; the longer side keeps the aspect.
    Returns:
        A list with an array (H, W, 3) uint8 for each time, and the sound (samples,) float32.
        Raises ValueError, OSError or av.error.FFmpegError if the file does not give them exactly.
    """
    reader, clip = Reader(times, samples, short_side), None
    while clip is None:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            clip = reader.attempt(container)
    return clip


def read_sound(path):
    """Read all sound of a file, which need not have pictures.

    The whole sound is decoded from its first packet on, without a seek, and is held in memory: 6 MB
    for a minute. Returns the sound (samples,) float32, mono at 24 kHz, from its beginning on, and
    the times in s at which it is damaged. Gaps in it are silent. It may end before the file's
    header says, which for an mp3 is often a guess. Raises ValueError, OSError or
    av.error.FFmpegError if it is missing.
    """
    with av.open(f"file:{path}", metadata_errors="replace") as container:
        audio, damaged = container.streams.best("audio"), Damage()
        if audio is None or audio.codec_context is None:
            raise ValueError("no audio stream" if audio is None else "no decoder for its sound")
        packets = [packet for packet in demux(container, audio) if packet.size]
        stops = [float((packet.pts + (packet.duration or 0)) * packet.time_base)
                 for packet in packets if packet.pts is not None]
        start = begin(audio)
        wave = np.zeros(max(0, round((max(stops, default=start) - start) * RATE)), np.float32)
        if not len(wave) or not hear(audio, packets, wave, start, damaged):
            raise ValueError("no sound decodes")
        return wave, [t - start for t in damaged.inside()]


class Reader:
    """Reads one clip in attempts. After a failed attempt the next one begins earlier."""

    def __init__(self, times, samples, short_side):
        self.times, self.samples, self.short_side = times, samples, short_side
        self.early = 0.0        # s from the beginning of decoding to the first wanted picture
        self.back = WARM_UP     # s from the target of the seek to the beginning of decoding
        self.sort = False       # stamps may be missing or out of order: decode all, sort the stamps
        self.trouble = None     # (stamp of the first packet, missing, damaged) of the last attempt

    def attempt(self, container):
        """Return what `read` returns, or None if another attempt is needed."""
        clip = Clip(container, self.times, self.samples)
        kind = container.format.name
        self.sort = self.sort or kind in UNORDERED and clip.video.codec_context.has_b_frames
        if self.sort or kind == "mpeg":                 # the first stamps after a seek are wrong
            self.early = max(1.0, self.early)
        first = clip.wanted[0] - self.early             # decode from a keyframe not after this time
        fresh = first - self.back <= begin(clip.video)      # read from the file's first packet on
        if not fresh and not seek(container, clip.video, first - self.back):
            self.back = np.inf
            return None
        packets = collect(clip, first, fresh, self.sort)
        if packets is None:                             # the seek came too late
            self.back = max(1.0, 2 * self.back)
            return None
        if not self.sort and any(packet.pts is None for packet in packets[0]):
            self.sort = True
            return None
        result = decode_clip(clip, *packets, self.short_side, self.sort)
        return self.judge(clip, result, packets[0][0].pts, fresh)

    def judge(self, clip, result, begun, fresh):
        """Return what `read` returns, or None after preparing another attempt.

        begun is the stamp of the first packet. Raises ValueError if no other attempt can help.
        """
        images, wave, missing, damaged, fault = result
        if images and wave is not None and not missing and not damaged:
            if not fault or fresh and fault != "order":
                return images, wave
        # If two attempts from different packets have the same trouble, or if one attempt from the
        # file's first packet on has it, the trouble is in the file.
        again = self.trouble and self.trouble[0] != begun and self.trouble[1:] == (missing, damaged)
        self.trouble = begun, missing, damaged
        if fault == "order":
            self.sort = True
        elif fresh or again and not fault:
            if damaged:
                raise ValueError(f"damaged at {min(damaged) - clip.zero:.2f} s")
            if fresh and not (images and wave is not None):
                cause = "sound" if images else "picture"
                raise ValueError(f"no {cause} decodes at {self.times[0]:.2f} s")
            self.sort = True                            # choose among the pictures that come out
        self.early = max(1.0, 2 * self.early)
        return None


class Clip:
    """The wanted part of an open file. Its times count on the container's clock."""

    def __init__(self, container, times, samples):
        self.container, self.samples = container, samples
        self.ended = False      # whether its last packets are the last of the file
        self.video, self.audio = open_streams(container, sound=samples > 0)
        self.streams = [stream for stream in (self.video, self.audio) if stream is not None]
        self.tick = float(self.video.time_base)         # s
        self.zero = max(begin(stream) for stream in self.streams)
        self.wanted = [self.zero + time for time in times]      # times of the wanted pictures
        self.stop = self.wanted[0] + samples / RATE     # end of the sound


def seek(container, video, time):
    """Seek to the last keyframe before `time` by the container's index. Return False on failure."""
    if re.search("pal8|444", video.codec_context.pix_fmt or ""):
        # only the first packet has the palette, or the version of x264, that the decoder needs
        first = next(demux(container, video))
        list(decode(video, [first], Damage()))
    try:
        container.seek(int(time // video.time_base), stream=video)
    except av.error.FFmpegError:
        return False
    return True


def collect(clip, first, fresh, sort):
    """Return the packets of a clip, (pictures, sound), or None if the seek came too late.

    The packets of the pictures reach from the last keyframe not after the time `first` to
    `held_back` packets behind the last wanted time. The packets of the sound reach from WARM_UP
    before the first wanted time to the end of the clip. Raises ValueError if the file ends within
    the clip, and more than 1 s earlier than its header says.
    """
    video, audio, wanted = clip.video, clip.audio, clip.wanted
    pictures, sound, first_sound = [], [], np.inf
    behind, enough = 0, held_back(video)                # pictures behind the last wanted time
    ticks = {stream: float(stream.time_base) for stream in clip.streams}
    reached = dict.fromkeys(clip.streams, -np.inf)      # where the packets so far end, s
    for packet in demux(clip.container, clip.streams):
        if not packet.size:                             # PyAV ends each stream with an empty packet
            continue
        stream, tick = packet.stream, ticks[packet.stream]
        time = None if packet.pts is None else packet.pts * tick
        if time is not None:
            reached[stream] = max(reached[stream], time + (packet.duration or 0) * tick)
        if stream is audio:
            first_sound = min(first_sound, np.inf if time is None else time)
            if time is None or reached[audio] >= wanted[0] - WARM_UP:
                sound.append(packet)
            if behind >= enough and time is not None and time > clip.stop + 0.1:
                break                                   # 0.1 s: decoder and resampler hold back
        elif behind < enough and (pictures or fresh or packet.is_keyframe):
            if packet.is_keyframe and not fresh and time is not None:
                if time > first and not pictures:
                    return None
                if time <= first and not sort:          # the packets before this one are not needed
                    pictures.clear()
            pictures.append(packet)
            behind += time is not None and time > wanted[-1]
            if behind >= enough and audio is None:
                break
    else:
        clip.ended = True
    late = audio is not None and first_sound > max(begin(audio), wanted[0] - WARM_UP) + 1e-3
    nothing = all(packet.is_discard for packet in pictures)     # an edit list hides them
    if not fresh and (late or nothing):
        return None
    if nothing:
        raise ValueError("no picture decodes")
    for stream, last in zip(clip.streams, (wanted[-1], clip.stop)):
        stated = end(clip.container, stream)
        if stated is not None and reached[stream] < min(last, stated - 1):
            raise ValueError(f"its {stream.type} ends at {reached[stream]:.2f} s of {stated:.2f} s")
    return pictures, sound


def decode_clip(clip, pictures, sound, short_side, sort):
    """Decode the packets of a clip, and return (images, wave, missing, damaged, fault).

    images: a list of arrays (H, W, 3). wave: (samples,), or None if no sound decodes. missing: the
    stamps of the wanted pictures that did not come out. damaged: the times of the damage that
    matters. fault: see `decode_wanted` and `decode_all`.
    """
    decode_pictures = decode_all if sort else decode_wanted
    wave, start, damaged_sound = np.zeros(clip.samples, np.float32), clip.wanted[0], Damage()
    keys = [p.pts * clip.tick for p in pictures if p.is_keyframe and p.pts is not None]
    key = max((time for time in keys if time <= start), default=min(keys, default=0.0))
    # If there is damage, and these packets are the last of the file, the file may end within its
    # last picture, so try without it.
    for packets in (pictures, pictures[:-1])[:1 + clip.ended]:
        damaged = Damage()
        images, missing, fault = decode_pictures(clip, packets, Converter(short_side), damaged)
        damaged = [time for time in damaged if time >= key]     # earlier ones are not needed
        if not damaged and not missing:
            break
        clip.video.codec_context.flush_buffers()
    if clip.audio is not None and not hear(clip.audio, sound, wave, start, damaged_sound):
        wave = None
    heard = damaged_sound.inside() if clip.ended else damaged_sound
    damaged += [time for time in heard if start <= time < clip.stop]
    return images, wave, missing, damaged, fault


def nearest(stamps, times):
    """Return for each time the nearest of the ascending stamps, the later of two equally near."""
    middles = [(a + b) / 2 for a, b in zip(stamps, stamps[1:])]
    return [stamps[bisect_right(middles, time)] for time in times]


def decode_wanted(clip, pictures, convert, damaged):
    """Choose the wanted pictures by the stamps of their packets, and decode up to the last one.

    Returns a list of arrays, the set of the stamps that did not come out, and a fault: "key" if the
    first packet did not come out as a keyframe, "order" if the frames came in another order than
    their stamps, else "".
    """
    context, images, before, fault = clip.video.codec_context, {}, -np.inf, "key"
    stamps = sorted({packet.pts for packet in pictures if not packet.is_discard})
    chosen = nearest(stamps, [time / clip.tick for time in clip.wanted])
    missing = set(chosen)
    last = max(n for n, packet in enumerate(pictures) if packet.pts in missing)
    skips = context.name in SKIPS

    def packets():
        for packet in pictures[:last + 1]:
            if skips:                                   # skip what no other picture refers to
                context.skip_frame = "DEFAULT" if packet.pts in missing else "NONREF"
            yield packet
        yield None

    for frame in decode(clip.video, packets(), damaged):
        if frame.pts is None or frame.pts < before:
            return [], set(), "order"
        before = frame.pts
        if frame.pts == pictures[0].pts and frame.key_frame:
            fault = ""
        if frame.pts in missing and not frame.is_corrupt:
            images[frame.pts] = convert(frame)
            missing.discard(frame.pts)
    return [images.get(stamp) for stamp in chosen], missing, fault


def decode_all(clip, pictures, convert, damaged):
    """Decode all packets, sort the stamps, and choose among the pictures that come out.

    Returns a list of arrays, an empty set as no stamp is known in advance, and a fault: "late" if
    the first picture comes after the first wanted time, else "".
    """
    wanted, images, start = clip.wanted, [], np.inf
    before, shown, image = None, np.inf, None           # the frame before, its time, its array
    frames = in_order(clip.video, [*pictures, None], damaged)
    for stamp, frame in chain(frames, [(np.inf, None)]):    # the last frame is shown for ever
        time = stamp * clip.tick
        start = min(start, time)
        while before and len(images) < len(wanted) and wanted[len(images)] < (shown + time) / 2:
            if image is None:
                damaged += [shown] * before.is_corrupt
                image = convert(before)
            images.append(image)
        if len(images) == len(wanted):
            break
        before, shown, image = frame, time, None
    return images, set(), "late" if start > wanted[0] else ""


class Converter:
    """Turns frames into arrays (H, W, 3) uint8 as a player shows them."""

    def __init__(self, short_side):
        self.short_side, self.shape, self.matrix = short_side, Shape(), None
        self.reformatter = VideoReformatter()           # all frames share it: it keeps its tables

    def __call__(self, frame):
        width, height = self.shape.check(frame)
        scale = self.short_side / min(width, height)
        size = round(width * scale), round(height * scale)
        small = self.reformatter.reformat(frame, *size, "rgb24", interpolation="AREA", threads=1)
        # ask `small`, because PyAV would keep `frame` in memory if it were asked for its matrix
        self.matrix = self.matrix or display_matrix(small)
        return upright(small.to_ndarray(), self.matrix)


def hear(audio, packets, wave, start, damaged):
    """Decode the packets into `wave` (samples,), which begins at the time `start`.

    Returns False if no packet decodes. Raises ValueError if the first frame has no stamp.
    """
    position, resample = None, MonoResampler()          # place in the wave of the next sample
    frames = chain(decode(audio, packets, damaged), [None])
    for piece in (piece for frame in frames for piece in resample(frame)):
        if piece.pts is None and position is None:
            raise ValueError("its sound has no time stamps")
        stamped = position if piece.pts is None else (piece.time - start) * RATE
        if position is None:                            # a fragment after a seek is no damage
            damaged.forget_before(piece.time)
        if position is None or abs(stamped - position) > SEAM * RATE:
            position = round(stamped)
        low, high = max(position, 0), min(position + piece.samples, len(wave))
        if low < high:
            samples = np.frombuffer(piece.planes[0], np.float32, piece.samples)
            wave[low:high] = samples[low - position:high - position]
        position += piece.samples
        if position >= len(wave):
            break
    return position is not None
