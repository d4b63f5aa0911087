"""The files of a layout -> the rows of a manifest: what can be used, and what is left out and why (§3.1)."""

import csv
import os
import signal
import sys
import time
from collections import Counter
from functools import partial
from inspect import signature
from multiprocessing import Pipe, Process
from multiprocessing.connection import wait
from pathlib import Path

import av
from tqdm import tqdm

from prepare.layouts import LAYOUTS
from support.reading import MonoResampler, Shape, begin, decode, end, forget_before, open_streams

COLUMNS = ("path", "label", "split", "duration", "video_duration", "fps", "width", "height",
           "has_audio", "reason", "note", "stamp")
NUMBERS = {"duration": float, "video_duration": float, "fps": float, "width": int, "height": int,
           "has_audio": int}
SECONDS, SECONDS_VERIFY = 20, 300                         # one file may take, to probe and to decode whole
SAVE_EVERY = 30                                           # s from one OUT.partial to the next
COPY = "another copy of a clip that is used"


def last_packets(container, streams):
    """{stream: when its last packet ends, s}. A stream that has no packet at all is not in it."""
    found, back = {}, 2.0                                 # back: how much of the file's end is read
    start = first = min(map(begin, streams))
    while len(found) < len(streams):
        if container.duration:
            start = max(first, first + container.duration / av.time_base - back)
        container.seek(int(start * av.time_base))
        for packet in container.demux(streams):
            if packet.pts is not None:
                time = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                found[packet.stream] = max(found.get(packet.stream, time), time)
        if start == first:
            break
        back *= 8
    return found


def stamp(path):
    """'bytes:mtime in ns' of a file, '' where the disk does not tell."""
    try:
        return "{0.st_size}:{0.st_mtime_ns}".format(os.stat(path))
    except OSError:
        return ""


class Track:
    """What a scan learns of one stream: `last`, when its last frame ends (s), and `problem`, why it
    cannot be used."""

    def __init__(self, stream):
        self.stream, self.tick, self.last, self.problem = stream, float(stream.time_base), None, ""
        self.damaged, self.shape, self.layouts = [], Shape(), {"mono", "stereo"}

    def take(self, packet):
        """Decode a packet and check its frames as support.reading.read would."""
        sight = self.stream.type == "video"
        try:
            for frame in decode(self.stream, [packet], self.damaged):
                if frame.pts is None and (sight or self.last is None):  # sound goes on without
                    raise ValueError("it has no time stamps")
                if self.last is None:
                    forget_before(self.damaged, frame.time)
                start = self.last if frame.pts is None else frame.pts * self.tick
                stop = start + (frame.duration or 0) * self.tick
                self.last = max(stop, self.last or stop)
                if sight:
                    self.shape.check(frame)
                    self.damaged += [start] * frame.is_corrupt
                elif frame.layout.name not in self.layouts:
                    self.layouts.add(frame.layout.name)
                    MonoResampler()(frame)                # raises where it does not know the layout
        except (ValueError, av.error.FFmpegError) as error:
            self.problem = getattr(error, "strerror", None) or str(error)

    def finish(self, stop):
        """Look for problems that show at the end. stop: when the stream should end, s; None if it was
        not decoded to its end."""
        if self.problem:
            return
        if self.last is None:
            self.problem = "it does not decode"
        elif stop is not None and self.damaged:
            self.problem = f"damaged frames (first at {self.damaged[0]:.2f} s)"
        elif stop is not None and self.last < stop - 1:
            self.problem = f"it stops too early (at {self.last:.2f} s of {stop:.2f} s)"


def read(container, verify):
    """What a manifest row says of an open file, after decoding the first frame of each stream or, with
    verify, all frames.

    A verified file is one that support.reading.read can read at every place. If only the sound cannot
    be used, `note` says why and has_audio is 0, because the pictures can be used without it.
    """
    try:
        video, _ = open_streams(container, sound=False)
    except ValueError as error:
        return {"reason": str(error)}
    audio, note = container.streams.best("audio"), ""
    if audio is not None and audio.codec_context is None:
        audio, note = None, "no decoder for its sound"
    tracks = {stream: Track(stream) for stream in (video, audio) if stream is not None}
    for packet in container.demux(list(tracks)):
        track = tracks[packet.stream]
        if not track.problem and (verify or track.last is None):
            track.take(packet)
        if not verify and all(track.problem or track.last is not None for track in tracks.values()):
            break
    stops = {stream: end(container, stream) for stream in tracks}
    unknown = [stream for stream in tracks if stops[stream] is None]
    if unknown and verify:
        stops |= {stream: tracks[stream].last for stream in unknown}
    elif unknown:
        stops |= last_packets(container, unknown)
    for stream, track in tracks.items():
        stops[stream] = stops[stream] or begin(stream)
        track.finish(stops[stream] if verify else None)
    if tracks[video].problem:
        raise ValueError(tracks[video].problem)
    start, stop = begin(video), stops[video]
    if stop - start < 1e-3:
        raise ValueError("its length is not known")
    row = {"fps": round(float(video.average_rate or 0), 3), "width": video.width, "height": video.height,
           "video_duration": round(stop - start, 3)}
    if audio is not None:
        start, stop = max(start, begin(audio)), min(stop, stops[audio])
        if tracks[audio].problem:
            note = f"its sound cannot be read: {tracks[audio].problem}"
        elif stop - start < 1e-3:
            note = "sight and sound do not overlap"
    has_audio = audio is not None and not note
    return row | {"has_audio": int(has_audio), "note": note,
                  "duration": round(stop - start, 3) if has_audio else row["video_duration"]}


def blank(path, label, split, reason=""):
    return dict.fromkeys(COLUMNS, "") | dict(path=str(path), label=label, split=split, has_audio=0, reason=reason)


def probe(entry, verify=False):
    """One row of (path, label, split). A failure of the disk, which may pass, gets no stamp, so it is tried again."""
    path, failure = entry[0], "cannot be read to the end" if verify else "cannot be read"
    row = blank(*entry) | {"stamp": stamp(path) + ":verified" * verify}
    try:
        str(path).encode()
        with open(path, "rb") as file:
            if not file.read(1):
                return row | {"reason": "empty file"}
        with av.open(str(path), metadata_errors="replace") as container:
            return row | read(container, verify)
    except av.error.FFmpegError as error:
        return row | {"reason": f"{failure}: {error.strerror or error}"}
    except OSError as error:
        return row | {"reason": f"cannot be read: {error.strerror or error}", "stamp": ""}
    except UnicodeEncodeError:
        return row | {"reason": "its name is not UTF-8"}
    except (ValueError, OverflowError) as error:
        return row | {"reason": f"{failure}: {error}"}


def serve(ours, pipe, work):
    """What a worker process does: entries in, rows out, until the parent is gone."""
    ours.close()                                          # the parent's end, or its death would not be seen
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C is the parent's business
    while True:
        try:
            pipe.send(work(pipe.recv()))
        except (EOFError, BrokenPipeError):
            return


def in_workers(work, entries, workers, limit):
    """Yield (entry, work(entry), "") as they end, or (entry, None, reason) where a process dies or takes over limit s.

    FFmpeg may loop or crash where neither Python nor the timeout of av.open (it covers waiting for data alone) has a
    say. So both are kept from outside: a process that takes too long is killed, and a new one goes on with the rest.
    """
    todo, idle, busy = list(reversed(entries)), [], {}    # busy: pipe -> (process, entry, deadline)
    try:
        while todo or busy:
            while todo and len(busy) < workers:
                if not idle:
                    pipe, theirs = Pipe()
                    idle.append((pipe, Process(target=serve, args=(pipe, theirs, work), daemon=True)))
                    idle[0][1].start()
                    theirs.close()                        # so that the death of the process ends the pipe
                pipe, process = idle.pop()
                busy[pipe] = process, todo.pop(), time.monotonic() + limit
                pipe.send(busy[pipe][1])
            for pipe in wait(list(busy), max(0, min(deadline for *_, deadline in busy.values()) - time.monotonic())):
                process, entry, _ = busy.pop(pipe)
                try:
                    row = pipe.recv()
                except (EOFError, ConnectionResetError):
                    yield entry, None, "crashes the decoder"
                else:
                    idle.append((pipe, process))
                    yield entry, row, ""
            for pipe in [pipe for pipe, (*_, deadline) in busy.items() if deadline < time.monotonic()]:
                process, entry, _ = busy.pop(pipe)
                process.kill()
                yield entry, None, f"takes over {limit} s"
    finally:
        for process in [process for _, process in idle] + [process for process, *_ in busy.values()]:
            process.kill()


def read_rows(path):
    """{path: row} of an earlier manifest. Raises ValueError where the file is none."""
    if not path.exists():
        return {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        if not {"path", "label", "reason"} <= set(table.fieldnames or ()):
            raise ValueError(f"--out {path} is no manifest and would be written over: give another")
        if not set(COLUMNS) <= set(table.fieldnames):     # of an earlier version: all is read again
            return {}
        return {row["path"]: row for row in table}


def probe_all(entries, workers=2, verify=False, out=None):
    """The rows of [(path, label, split, reason)] in this order; files with a reason, or read before, are not read."""
    unfinished, rows, todo = Path(f"{out}.partial"), {}, []
    before = read_rows(Path(out)) | read_rows(unfinished) if out else {}
    for path, label, split, reason in entries:
        now, old = stamp(path), before.get(str(path), {})
        if reason:
            rows[path] = blank(path, label, split, reason)
        elif now and old.get("stamp") in (f"{now}:verified", now)[:2 - verify]:
            rows[path] = old | {name: kind(old[name]) if old[name] else "" for name, kind in NUMBERS.items()}
            rows[path] |= {"label": label, "split": split, "reason": "" if old["reason"] == COPY else old["reason"]}
        else:
            todo.append((path, label, split))
    saved = time.monotonic()
    bar = tqdm(total=len(entries), initial=len(rows), desc="scanning", unit="file", file=sys.stderr)
    try:
        limit = SECONDS_VERIFY if verify else SECONDS
        for entry, row, reason in in_workers(partial(probe, verify=verify), todo, workers, limit):
            rows[entry[0]] = row or blank(*entry, reason)
            bar.update()
            if out and time.monotonic() - saved > SAVE_EVERY:
                write(rows.values(), unfinished)
                saved = time.monotonic()
    finally:
        bar.close()
        if out and len(rows) < len(entries):
            write(rows.values(), unfinished)
    return [rows[path] for path, *_ in entries]


def drop_copies(rows, clips):
    """Of the usable files of one clip one stays: the one in a folder of replacements (as of Kinetics) or the first."""
    def order(pair):
        return "replac" not in pair[0]["path"].lower(), pair[0]["path"]

    used = {}
    for row, clip in sorted(zip(rows, clips), key=order):
        clip = row["label"], row["split"], clip
        if not row["reason"] and used.setdefault(clip, row) is not row:
            row["reason"] = COPY


def survey(layout, root, workers=2, out=None, verify=False, **options):
    """(rows, notes for the summary) of a copy. options: annotations, fold, classes, as it takes."""
    for name in options.keys() - signature(LAYOUTS[layout]).parameters:
        raise ValueError(f"layout {layout} takes no --{name}")
    entries, notes = LAYOUTS[layout](root, **options)
    rows = probe_all([entry[:4] for entry in entries], workers, verify, out)
    drop_copies(rows, [clip for *_, clip in entries])
    if out:
        write(rows, out)
        Path(f"{out}.partial").unlink(missing_ok=True)
    return rows, notes


def scan(root, workers=2, layout="folder", **options):
    """The manifest of a copy, a list of rows in the order of the paths. options: those of `survey`."""
    return survey(layout, root, workers, **options)[0]


def write(rows, out):
    """Write rows as a manifest, whole or not at all."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    with open(part, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, out)


def summary(rows, notes=()):
    """'800 files, 798 usable, 2 left out: 1 no video stream, ...; notes'. What reasons have in brackets is dropped."""
    reasons = Counter(row["reason"].split(" (")[0] for row in rows if row["reason"])
    left_out = f", {reasons.total()} left out: " + ", ".join(f"{n} {r}" for r, n in reasons.most_common())
    usable = f"{len(rows)} files, {len(rows) - reasons.total()} usable"
    return "; ".join([usable + (left_out if reasons else ""), *notes])
