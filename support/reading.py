"""Reads the right pictures and sound of a file, from any container and codec (paper silent).

    pictures, wave = read("film.avi", times=[2.0, 2.1, 2.2], samples=24000, size=160)

The picture at time t is the one whose time stamp is nearest to t, as a player shows it: turned,
mirrored and stretched to square pixels. Time 0 is when the pictures begin or, if sound is read too,
when both have begun. A file that cannot be read exactly is refused.

`read` seeks to a keyframe before the clip, and collects the packets from there to the end of the
clip. Their time stamps tell which pictures are wanted, and it decodes up to the last of these. If
the seek came too late, or if a wanted picture did not come out, it opens the file again and begins
earlier. To decode from the file's first packet on is always right.

A packet is compressed, a frame is decoded. pts, a time stamp, counts the ticks of its stream. All
other times are in s. `damaged` is a Damage, to which a function adds what it could not decode.
"""

import re
from bisect import bisect_right
from collections import deque
from contextlib import suppress
from heapq import heappop, heappush
from itertools import accumulate, chain, groupby
from statistics import median

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

RATE = 24000                            # Hz, mono (paper silent; GDT)
SEAM = 0.01                             # s; a smaller gap in the sound is a rounded time stamp
ROUGH_SEAM = 0.1                        # s; the same in asf, which stamps packets and not frames
SLACK = {"video": 0.1, "audio": 0.25}   # s by which pts may go back, as where sound changes
JUMP = 10                               # s; a larger gap in JOINABLE is a jump of the pts
JOINABLE = {"mpegts", "mpeg"}           # files that stay files if others are appended to them
# Pictures that a decoder may hold back to put them in the order of display; the others hold 4.
REORDER = {"h264": 16, "hevc": 16}
UNORDERED = {"avi", "asf"}              # these containers do not store when a picture is shown
# Decoders that let skip_frame change in mid-stream: findings/skip-frame-is-not-for-all-decoders.sh
SKIPS = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video"}
UPRIGHT = 65536, 0, 0, 65536            # the display matrix of most files
# Without the flags beside AREA swscale takes faster ways at even widths and at the film's own size,
# which darken the pictures by up to 2 levels and blur colours: findings/swscale-even-widths.sh
EXACT = int(Interpolation.AREA | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND)
# Sound decoders that are right after 0.2 s. Bit reservoirs and filters with memory need 1 s.
QUICK = re.compile("aac|e?ac3|alac|flac|mp2|(lib)?opus|(lib)?vorbis|wmav[12]|pcm_.*")

# frame.side_data raises ValueError at types such as EXIF: findings/pyav-unknown-side-data.sh
Type._missing_ = classmethod(lambda cls, value: cls.SEI_UNREGISTERED)
# glibc returns freed memory to the system above a limit, which grows with the largest block that
# was freed. Without this block it would return the pictures of each clip and fetch them again.
np.empty(16 << 20, np.uint8)


# ---- functions that the scan and the transcoder use too

def open_file(path):
    """Open a file to be read.

    If the edit list of an mp4 hides its first pictures, FFmpeg moves the next one to time 0, up to
    one picture too early beside the sound. Such a file is opened without this correction, and
    `begin` tells which pictures are hidden. Raises ValueError if the list has several parts.
    """
    url = f"file:{path}"                # or else a colon in the path would make an address of it
    container = av.open(url, metadata_errors="replace")
    video = container.streams.best("video")
    index = video.index_entries if video and "mp4" in container.format.name else ()
    if not len(index) or not index[0].is_discard:
        return container
    moved = [(entry.pos, entry.timestamp) for entry in index]
    container.close()
    container = av.open(url, metadata_errors="replace", options={"advanced_editlist": "0"})
    stored = {e.pos: e.timestamp for e in container.streams.best("video").index_entries}
    if len({stored[pos] - time for pos, time in moved}) > 1:
        container.close()
        raise ValueError("its edit list has several parts")
    return container


def open_streams(container, sound=True):
    """Return the best video stream and the best audio stream (None without `sound`) of a container.

    Raises ValueError if a stream or its decoder is missing.
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
    """Return the time of the stream's first picture or sample, by the container's clock."""
    start = (stream.start_time or 0) * float(stream.time_base)
    # With this option of open_file, an edit list hides what comes before time 0.
    return max(0.0, start) if "advanced_editlist" in stream.container.options else start


def end(container, stream):
    """Return when the stream ends, by the file's header or by Matroska's tags, or None. Some
    headers tell this of the file alone, and none tells it where files were joined."""
    kind = container.format.name
    if kind == "asf" or kind in JOINABLE or "advanced_editlist" in container.options:
        return None
    if stream.duration:
        return begin(stream) + stream.duration * float(stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag is None:
        return None
    hours, minutes, seconds = map(float, tag.groups())
    by_mkvmerge = "_STATISTICS_TAGS" in stream.metadata     # mkvmerge counts from its beginning
    return begin(stream) * by_mkvmerge + 3600 * hours + 60 * minutes + seconds


def demux(container, streams):
    """Yield the packets of the streams up to the end of the file."""
    with suppress(IndexError):      # raised at the end if a stream has appeared in mid-file (FLV)
        yield from container.demux(streams)


class Damage(list):
    """The times of the packets of a stream that do not decode."""

    last = None                     # the time of the last packet so far

    def forget_before(self, first):
        """Drop what lies before the first frame, at the time `first`: nothing is read there. A
        decoder that holds frames back may meet later damage before its first frame."""
        self[:] = [time for time in self if time > first]

    def inside(self):
        """Return what does not lie in the last packet, a list. Many recordings end within a packet
        and are read as if they ended before it."""
        return [time for time in self if time != self.last]


class StampCheck:
    """Checks that the time stamps of a stream run on. In joined files they begin anew or jump."""

    def __init__(self, stream):
        self.kind, self.tick = stream.type, float(stream.time_base)
        self.jump = JUMP if stream.container.format.name in JOINABLE else np.inf
        self.begun, self.latest = False, None

    def check(self, packet):
        """Return the stream's next packet, or raise ValueError. The first one is to be the file's
        first or a keyframe."""
        inner = self.kind == "video" and not packet.is_keyframe
        if inner and not self.begun and packet.size:
            raise ValueError("its pictures begin without a keyframe: cut off what lies before one")
        self.begun = True
        if packet.pts is not None:
            time = packet.pts * self.tick
            latest = time if self.latest is None else self.latest
            back = time < latest - SLACK[self.kind] and not inner       # B-frames go back always
            if back or time > latest + self.jump:
                raise ValueError(f"its time stamps go from {latest:.2f} to {time:.2f} s, as in "
                                 "joined recordings: split it there")
            self.latest = max(latest, time)
        return packet


def decode(stream, packets, damaged):
    """Yield the frames of the packets. The packet None asks for the frames still held back."""
    seconds, ticks = stream.time_base.as_integer_ratio()        # so many ticks are so many s
    for packet in packets:
        time = None if packet is None or packet.pts is None else packet.pts * seconds / ticks
        try:
            if packet is not None and packet.size:
                damaged.last = time
                if packet.is_corrupt and stream.container.format.name not in JOINABLE:
                    # The file ends within the packet, which not all decoders notice. In JOINABLE
                    # files the flag is about larger pieces, most of whose packets are whole.
                    raise av.error.InvalidDataError(0, "cut off")
                if stream.codec_context.name == "wmv3":
                    packet = padded(packet)
            yield from stream.decode(packet)
        except av.error.FFmpegError:
            if time is not None:
                damaged.append(time)


def padded(packet):
    """Return a copy of the packet with a zero byte behind its data. Encoders of WMV3 may drop a
    last byte of zero, and FFmpeg's decoder then takes the picture for damaged."""
    copy = av.Packet(bytes(packet) + b"\0")
    for name in ("stream", "is_keyframe", "time_base", "pts", "dts", "duration"):
        setattr(copy, name, getattr(packet, name))
    return copy


def in_order(video, packets, damaged):
    """Yield (pts, frame) in the order of display. Raises ValueError if a frame has no pts.

    A decoder returns the frames in this order, but their pts may be out of order (UNORDERED), so
    each frame gets the smallest pts that is left.
    """
    waiting, stamps, depth = deque(), [], REORDER.get(video.codec_context.name, 4)
    for frame in decode(video, packets, damaged):
        if frame.pts is None:
            raise ValueError("its pictures have no time stamps")
        waiting.append(frame)
        heappush(stamps, frame.pts)
        if len(waiting) > depth:
            yield heappop(stamps), waiting.popleft()
    while waiting:
        yield heappop(stamps), waiting.popleft()


def turns(matrix):
    """Return three booleans: whether a player exchanges x and y, and then reverses y and x.

    matrix: the display matrix (a, b, c, d). It moves pixel (x, y) to (ax + cy, bx + dy) / 65536.
    """
    a, b, c, d = matrix
    return (True, b < 0, c < 0) if abs(b) > abs(a) else (False, d < 0, a < 0)


def upright(image, matrix):
    """Return the pixels (H, W, ...) turned and mirrored by the display matrix."""
    turned, reverse_y, reverse_x = turns(matrix)
    image = image.swapaxes(0, 1) if turned else image
    return image[::-1 if reverse_y else 1, ::-1 if reverse_x else 1]


class Shape:
    """Checks that all frames of a stream have the shape of the first: a clip has one shape."""

    def __init__(self, stream):
        self.stream, self.first = stream, None

    def check(self, frame):
        """Raise ValueError if the frame is turned in another way than the first, if its pixels have
        another shape, or if its aspect differs by more than 1 %."""
        pixels = self.stream.codec_context.sample_aspect_ratio
        self.first = self.first or (frame.width / frame.height, frame.rotation, pixels)
        aspect = frame.width / frame.height / self.first[0]
        if (frame.rotation, pixels) != self.first[1:] or abs(aspect - 1) > 0.01:
            raise ValueError("its pictures change their shape")


class Cutter:
    """Cuts a window out of frames and scales it. Only the window is converted, which saves time.

    view: a function (W, H) -> ((left, top, width, height), (out_width, out_height)), from the size
    of the upright picture with square pixels to the window in it and the size to scale it to.
    docs/data.md says how the edges of the window are rounded, and its pixels averaged.
    """

    kind = matrix = None

    def __init__(self, video, view):
        self.video, self.view, self.shape = video, view, Shape(video)
        # A reformatter keeps its tables as long as its task is the same, so each task has its own.
        self.unpack, self.scale = VideoReformatter(), VideoReformatter()

    def __call__(self, frame, pixels):
        """Return the window as a frame of the pixel format `pixels`. It is not yet upright."""
        self.shape.check(frame)
        kind = frame.format.name, frame.width, frame.height, frame.color_range
        if kind != self.kind:
            self.kind = kind
            self.place(frame)
        if self.is_packed:
            frame = self.unpack.reformat(frame, format="gbrp", interpolation=EXACT, threads=1)
        for plane, (target, place) in zip(frame.planes, self.targets):
            target[:] = bytes_of(plane)[place]
        self.window.colorspace, self.window.color_range = frame.colorspace, frame.color_range
        return self.scale.reformat(self.window, *self.size, pixels, interpolation=EXACT, threads=1)

    def place(self, frame):
        """Find the window in frames of the kind of this one, and prepare a frame for its pixels."""
        copy = self.unpack.reformat(frame, 16, 16, "gray", interpolation="POINT", threads=1)
        # ask the copy, because PyAV would keep `frame` in memory if it were asked for its matrix
        matrix = copy.side_data.get("DISPLAYMATRIX")
        matrix = UPRIGHT if matrix is None else np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]]
        self.matrix = self.matrix or tuple(map(int, matrix))
        W, H, form = frame.width, frame.height, frame.format
        wide = W * float(self.video.sample_aspect_ratio or 1)
        turned, reverse_y, reverse_x = turns(self.matrix)
        shown = (H, wide) if turned else (wide, H)
        (left, top, width, height), self.size = self.view(*shown)
        x, y = left / shown[0], top / shown[1]              # shares of the picture from here on
        width, height = width / shown[0], height / shown[1]
        x, y = 1 - x - width if reverse_x else x, 1 - y - height if reverse_y else y
        if turned:
            x, y, width, height, self.size = y, x, height, width, self.size[::-1]
        planes = {component.plane for component in form.components}
        self.is_packed = form.has_palette or len(planes) < len(form.components)
        form = av.VideoFormat("gbrp") if self.is_packed else form
        step_x, step_y = 16 // form.chroma_width(16), 16 // form.chroma_height(16)
        x, width = whole_samples(x, width, W, step_x)
        y, height = whole_samples(y, height, H, step_y)
        # Limited gray gets a chroma: findings/gray-is-always-full-range.sh
        limited_gray = form.name.startswith("gray") and frame.color_range == ColorRange.MPEG
        name = form.name.replace("gray", "yuv444p") if limited_gray else form.name
        # A frame made from another one keeps what the file says of the place of the chroma. It also
        # keeps that it is interlaced, and then FFmpeg would scale each field alone.
        self.window, self.targets = av.VideoFrame(width, height, name), []
        if not frame.interlaced_frame:
            self.window = self.unpack.reformat(copy, width, height, name, interpolation="POINT",
                                                threads=1)
        bits = form.components[0].bits
        size = -(-bits // 8)                                # bytes of a sample
        for n, plane in enumerate(self.window.planes):
            target = bytes_of(plane)[:, :plane.width * size]
            target.view(f"u{size}")[:] = 1 << (bits - 1)    # no colour, if the frame has no chroma
            top, left = (y // step_y, x // step_x * size) if n in (1, 2) else (y, x * size)
            place = slice(top, top + target.shape[0]), slice(left, left + target.shape[1])
            self.targets.append((target, place))


def bytes_of(plane):
    """Return a view of the bytes of a plane, (height, bytes of a row with its padding) uint8."""
    array = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
    return array[::-1 if plane.line_size < 0 else 1]


def whole_samples(first, share, length, step):
    """Round the beginning and the length of a part, given as shares, to steps of `step` pixels."""
    steps = -(-length // step)
    count = min(max(1, round(share * steps)), steps)
    first = min(max(0, round(first * steps)), steps - count)
    return first * step, min(count * step, length - first * step)


def mono(frames):
    """Yield frames of sound of any format as AudioFrames that are mono, float32, 24 kHz: pieces.

    A piece is the mean of all channels, whatever their layout, so it is as loud as they are
    (swresample's own mono is louder: findings/swresample-mono-is-louder.sh). The format may change
    in mid-stream.
    """
    def kind(frame):
        return frame.format.name, frame.layout.name, frame.sample_rate, frame.time_base

    for (form, layout, rate, tick), group in groupby(frames, kind):
        if (form, layout, rate) == ("fltp", "mono", RATE):
            yield from group
            continue
        channels = "+".join(f"c{n}" for n in range(av.AudioLayout(layout).nb_channels))
        graph = av.filter.Graph()
        graph.link_nodes(
            graph.add_abuffer(sample_rate=rate, format=form, layout=layout, time_base=tick),
            graph.add("pan", f"mono|c0<{channels}"),            # <: the weights sum up to 1
            graph.add("aformat", f"sample_fmts=fltp:sample_rates={RATE}"),
            graph.add("abuffersink")).configure()
        for frame in chain(group, [None]):                      # None: what the graph holds back
            graph.push(frame)
            with suppress(BlockingIOError, EOFError):           # it needs more, or it is empty
                while True:
                    yield graph.pull()


# ---- one clip

def read(path, times, samples=0, size=160, window=None):
    """Read the pictures at `times`, and the sound from the first of these times on.

    Args:
        times: ascending, in s. Past the end of the file the last picture is repeated.
        samples: length of the sound in samples at 24 kHz. With 0 no sound is read. Gaps in the
            file's sound, and the time past its end, are silent.
        size: of the pictures. A number is the shorter side in pixels, and the longer side keeps the
            aspect. A pair is (height, width).
        window: the part of the picture to read, a function (W, H) -> (left, top, width, height). W
            and H are the size of the upright picture with square pixels, in any unit. None: all.
            Its edges are rounded, see `Cutter`.
    Returns:
        A list with an array (H, W, 3) uint8 for each time, and the sound (samples,) float32.
        Raises ValueError, OSError or av.error.FFmpegError if the file does not give them exactly,
        which includes sound that ends well before the first time.
    """
    reader, result = ClipReader(times, samples, size, window), None
    while result is None:
        with open_file(path) as container:
            result = reader.attempt(container)
    return result


def read_sound(path):
    """Read all sound of a file, which need not have pictures.

    It is decoded without a seek and held in memory, 6 MB for a minute. Returns (samples,) float32,
    mono at 24 kHz, and the times in s at which it is damaged. Gaps in it are silent. Raises
    ValueError, OSError or av.error.FFmpegError if it is missing or its time stamps do not run on.
    """
    with open_file(path) as container:
        audio, damaged = container.streams.best("audio"), Damage()
        if audio is None or audio.codec_context is None:
            raise ValueError("no audio stream" if audio is None else "no decoder for its sound")
        packets = map(StampCheck(audio).check, demux(container, audio))
        pieces = [(round(place), wave) for place, wave in place_sound(audio, packets, damaged)]
        if not pieces:
            raise ValueError("no sound decodes")
        start, stop = pieces[0][0], max(place + len(samples) for place, samples in pieces)
        if "mp4" in container.format.name:              # its edit list cuts off what encoders add
            start = max(start, round(begin(audio) * RATE))
            stop = min(stop, round((end(container, audio) or stop / RATE) * RATE))
    wave = np.zeros(max(0, stop - start), np.float32)
    for place, samples in pieces:
        insert(samples, wave, place - start)
    return wave, [time - start / RATE for time in damaged.inside()]


class ClipReader:
    """Reads one clip in attempts. After a failed attempt the next one begins earlier."""

    def __init__(self, times, samples, size, window):
        self.times, self.samples, self.size, self.window = times, samples, size, window
        self.early = 0.0        # s from the beginning of decoding to the first wanted picture
        self.back = 0.0         # s from the target of the seek to the beginning of decoding
        self.sort = False       # pts may be missing or out of order: decode all, sort the pts
        self.trouble = None     # (pts of the first packet, missing, damaged) of the last attempt

    def attempt(self, container):
        """Return what `read` returns, or None if another attempt is needed."""
        self.container, kind = container, container.format.name
        self.video, self.audio = open_streams(container, sound=self.samples > 0)
        self.streams = [stream for stream in (self.video, self.audio) if stream is not None]
        self.tick = float(self.video.time_base)         # s
        self.first = begin(self.video) / self.tick      # the first pts that is not hidden
        self.zero = max(map(begin, self.streams))       # by the container's clock, as what follows
        self.wanted = [self.zero + time for time in self.times]     # times of the wanted pictures
        self.stop = self.wanted[0] + self.samples / RATE            # end of the sound
        self.convert = converter(self.video, self.size, self.window)
        self.sort = self.sort or kind in UNORDERED and self.video.codec_context.has_b_frames
        if self.sort or kind == "mpeg":                 # the first pts after a seek are wrong
            self.early = max(1.0, self.early)
        self.lead = lead_in(self.audio) if self.audio else 0.0
        self.back = max(self.lead, self.back)
        first = self.wanted[0] - self.early             # decode from a keyframe not after this time
        fresh = first - self.back <= begin(self.video)      # read from the file's first packet on
        if not fresh and not self.seek(first - self.back):
            self.back = np.inf
        elif not self.collect(first, fresh):            # the seek came too late
            self.back = max(1.0, 2 * self.back)
        elif not self.sort and any(packet.pts is None for packet in self.pictures):
            self.sort = True
        else:
            return self.decode(fresh)
        return None

    def seek(self, time):
        """Seek to the last keyframe before `time`. Return whether that was possible."""
        first = StampCheck(self.video).check(next(demux(self.container, self.video)))
        if re.search("pal8|444", self.video.codec_context.pix_fmt or ""):
            # only the first packet has the palette, or the version of x264, that the decoder needs
            list(decode(self.video, [first], Damage()))
        with suppress(av.error.FFmpegError):
            self.container.seek(int(time // self.tick), stream=self.video)
            return True
        return False

    def collect(self, first, fresh):
        """Collect the packets, `pictures` and `sound`. Return False if the seek came too late.

        The pictures reach from the last keyframe not after the time `first` to as many behind the
        last wanted time as the decoder may hold back, and the sound from `lead` before the first
        wanted time to the end of the clip.
        """
        video, audio, wanted = self.video, self.audio, self.wanted
        self.pictures, self.sound = pictures, sound = [], []
        self.ended, first_sound = False, np.inf     # ended: these packets are the last of the file
        begin_sound = wanted[0] - self.lead
        behind, enough = 0, REORDER.get(video.codec_context.name, 4)    # behind the last wanted
        checks = {stream: StampCheck(stream) for stream in self.streams}
        reached = dict.fromkeys(self.streams, -np.inf)      # where the packets so far end, s
        for packet in demux(self.container, self.streams):
            if not packet.size:                 # PyAV ends each stream with an empty packet
                continue
            stream, tick = packet.stream, checks[packet.stream].tick
            # No comparison holds for nan, so a packet without a pts changes none of these times.
            time = np.nan if packet.pts is None else packet.pts * tick
            reached[stream] = max(reached[stream], time + (packet.duration or 0) * tick)
            if stream is audio:
                checks[stream].check(packet)
                first_sound = min(first_sound, time)
                if packet.pts is None or reached[stream] >= begin_sound:
                    sound.append(packet)
                if behind >= enough and time > self.stop + 0.1:
                    break                       # 0.1 s: decoder and resampler hold back
            elif behind < enough and (pictures or fresh or packet.is_keyframe):
                checks[stream].check(packet)
                if packet.is_keyframe and not fresh:
                    if time > first and not pictures:
                        return False
                    if time <= first and not self.sort:     # the packets so far are not needed
                        pictures.clear()
                pictures.append(packet)
                behind += time > wanted[-1]
                if behind >= enough and audio is None:
                    break
        else:
            self.ended = True
        late = audio is not None and first_sound > max(begin(audio), begin_sound) + 1e-3
        nothing = all(map(self.is_hidden, pictures))
        if not fresh and (late or nothing):
            return False
        if nothing:
            raise ValueError("no picture decodes")
        for stream, last in zip(self.streams, (wanted[-1], self.stop)):
            stated = end(self.container, stream)
            if stated is not None and reached[stream] < min(last, stated - 1):
                raise ValueError(f"its {stream.type} ends at {reached[stream]:.2f} s of "
                                 f"{stated:.2f} s")
        return True

    def is_hidden(self, packet):
        """Return whether an edit list hides a picture, which is decoded but never shown."""
        return packet.is_discard or packet.pts is not None and packet.pts < self.first - 0.5

    def decode(self, fresh):
        """Decode the packets. Return what `read` returns, or None after preparing another attempt,
        or raise ValueError if none can help."""
        decode_pictures = self.decode_all if self.sort else self.decode_wanted
        start, damaged_sound = self.wanted[0], Damage()
        keys = [p.pts * self.tick for p in self.pictures if p.is_keyframe and p.pts is not None]
        key = max((time for time in keys if time <= start), default=min(keys, default=0.0))
        # If there is damage, and these packets are the last of the file, the file may end within
        # its last picture, so try without it, if another one is left.
        rest = self.pictures[:-1]
        alone = not self.ended or all(map(self.is_hidden, rest))
        for packets in [self.pictures] if alone else [self.pictures, rest]:
            damaged = Damage()
            images, missing, fault = decode_pictures(packets, damaged)
            damaged = [time for time in damaged if time >= key]     # earlier ones are not needed
            if not damaged and not missing:
                break
            self.video.codec_context.flush_buffers()
        wave, heard = np.zeros(self.samples, np.float32), self.audio is None
        if self.audio is not None:
            for place, samples in place_sound(self.audio, self.sound, damaged_sound):
                heard, place = True, round(place - start * RATE)            # place in the wave
                insert(samples, wave, place)
                if place + len(samples) >= len(wave):
                    break
        damaged += [time for time in (damaged_sound.inside() if self.ended else damaged_sound)
                    if start <= time < self.stop]
        complete = images and heard
        if complete and not missing and not damaged and (not fault or fresh and fault != "order"):
            return images, wave
        # If two attempts from different packets have the same trouble, or if one attempt from the
        # file's first packet on has it, the trouble is in the file.
        begun = self.pictures[0].pts
        again = self.trouble and self.trouble[0] != begun and self.trouble[1:] == (missing, damaged)
        self.trouble = begun, missing, damaged
        if fault == "order":
            self.sort = True
        elif fresh or again and not fault:
            if damaged:
                raise ValueError(f"damaged at {min(damaged) - self.zero:.2f} s")
            if fresh and not complete:
                cause = "sound" if images else "picture"
                raise ValueError(f"no {cause} decodes at {self.times[0]:.2f} s")
            self.sort = True                            # choose among the pictures that come out
        self.early = max(1.0, 2 * self.early)
        return None

    def decode_wanted(self, pictures, damaged):
        """Choose the wanted pictures by the pts of their packets, and decode up to the last one.

        Returns the arrays, the set of the pts that did not come out, and a fault: "key" if the
        first packet did not come out as a keyframe, "order" if the pts are out of order, else "".
        """
        context, images, before, fault = self.video.codec_context, {}, -np.inf, "key"
        stamps = sorted({packet.pts for packet in pictures if not self.is_hidden(packet)})
        # the nearest for each time, the later of two equally near
        middles = [(a + b) / 2 for a, b in zip(stamps, stamps[1:])]
        chosen = [stamps[bisect_right(middles, time / self.tick)] for time in self.wanted]
        missing = set(chosen)
        last = max(n for n, packet in enumerate(pictures) if packet.pts in missing)
        skips = context.name in SKIPS

        def packets():
            for packet in pictures[:last + 1]:
                if skips:                               # skip what no other picture refers to
                    context.skip_frame = "DEFAULT" if packet.pts in missing else "NONREF"
                yield packet
            yield None

        for frame in decode(self.video, packets(), damaged):
            if frame.pts is None or frame.pts < before:
                return [], set(), "order"
            before = frame.pts
            if frame.pts == pictures[0].pts and frame.key_frame:
                fault = ""
            if frame.pts in missing and not frame.is_corrupt:
                images[frame.pts] = self.convert(frame)
                missing.discard(frame.pts)
        return [images.get(pts) for pts in chosen], missing, fault

    def decode_all(self, pictures, damaged):
        """Decode all packets, and choose among the pictures that come out.

        Returns the same, but no pts is known in advance, and the fault is "late" if the first
        picture comes after the first wanted time, else "".
        """
        wanted, images, start = self.wanted, [], np.inf
        before, shown, image = None, np.inf, None       # the frame before, its time, its array
        frames = in_order(self.video, [*pictures, None], damaged)
        for pts, frame in chain(frames, [(np.inf, None)]):      # the last frame is shown for ever
            time = pts * self.tick
            start = min(start, time)
            while before and len(images) < len(wanted) and wanted[len(images)] < (shown + time) / 2:
                if image is None:
                    damaged += [shown] * before.is_corrupt
                    image = self.convert(before)
                images.append(image)
            if len(images) == len(wanted):
                break
            before, shown, image = frame, time, None
        return images, set(), "late" if start > wanted[0] else ""


def lead_in(audio):
    """Return how many s earlier than wanted a decoder of sound must begin."""
    context = audio.codec_context
    quick = QUICK.fullmatch(context.name) and "HE" not in (context.profile or "")
    return 0.2 if quick else 1.0


def converter(video, size=160, window=None):
    """Return a function from a frame to an array (H, W, 3) uint8. size, window: see `read`."""
    def view(W, H):
        box = window(W, H) if window else (0, 0, W, H)
        if not isinstance(size, int):
            return box, size[::-1]
        scale = size / min(box[2:])
        return box, tuple(round(side * scale) for side in box[2:])

    cut = Cutter(video, view)
    # FFmpeg is faster with gbrp than with rgb24.
    return lambda frame: upright(cut(frame, "gbrp").to_ndarray(), cut.matrix)


def place_sound(audio, packets, damaged):
    """Decode packets, and yield (place, samples (n,) float32): the pieces of the sound, see `mono`.

    place: when the piece begins, in samples at 24 kHz on the container's clock. The first pts
    places the pieces before it too. In asf, where a pts may be off by a frame, the median of all
    does. Raises ValueError without any.
    """
    rough, head = audio.container.format.name == "asf", []
    pieces = mono(decode(audio, packets, damaged))
    for piece in pieces:
        head.append(piece)
        if piece.pts is not None and not rough:
            break
    counts = accumulate((piece.samples for piece in head), initial=0)
    places = [piece.time * RATE - count for piece, count in zip(head, counts)
              if piece.pts is not None]
    if head and not places:
        raise ValueError("its sound has no time stamps")
    place = median(places) if places else 0
    damaged.forget_before(place / RATE)                 # a fragment after a seek is no damage
    for piece in chain(head, pieces):
        stamped = place if piece.pts is None else piece.time * RATE
        if abs(stamped - place) > RATE * (ROUGH_SEAM if rough else SEAM):
            place = stamped
        yield place, np.frombuffer(piece.planes[0], np.float32, piece.samples)
        place += piece.samples


def insert(samples, wave, place):
    """Copy the samples into the wave from `place` on, except those that lie outside of it."""
    low, high = max(place, 0), min(place + len(samples), len(wave))
    if low < high:
        wave[low:high] = samples[low - place:high - place]
