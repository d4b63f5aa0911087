"""A copy of a data set on disk -> one manifest.csv: what there is, and what is left out and why (§3.1).

    python -m prepare.manifest folder ROOT                      # ROOT/[train|val|test/]class/*.mp4|avi|mkv|webm|mpg|mov
    python -m prepare.manifest kinetics-sounds ROOT --annotations folder/of/csv --out ks.csv --workers 16
    python -m prepare.manifest hmdb51 ROOT --annotations testTrainMulti_7030_splits --fold 1

Columns: path (absolute), label, split ("" where none is known), duration (s, the part that sight and sound both cover),
fps, width, height, has_audio (0 | 1), reason (why the file is left out; empty: usable), stamp ("bytes:mtime in ns", and
":verified" after --verify). Run again, files whose stamp still holds are not read again; with --verify, those verified.
An interrupted scan leaves OUT.partial, from where the next one goes on.
"""

import argparse
import csv
import os
import re
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

COLUMNS = ("path", "label", "split", "duration", "fps", "width", "height", "has_audio", "reason", "stamp")
NUMBERS = {"duration": float, "fps": float, "width": int, "height": int, "has_audio": int}
SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".mpg", ".mov"}
SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
SECONDS, SECONDS_VERIFY = 20, 300                         # one file may take, to probe and to decode whole
SAVE_EVERY = 30                                           # s from one OUT.partial to the next
UNLISTED, COPY = "not in the official list", "another copy of a clip that is used"
KINETICS_SOUNDS = """blowing nose,blowing out candles,bowling,chopping wood,dribbling basketball,laughing,mowing lawn,\
playing accordion,playing bagpipes,playing bass guitar,playing clarinet,playing drums,playing guitar,playing harmonica,\
playing keyboard,playing organ,playing piano,playing saxophone,playing trombone,playing trumpet,playing violin,\
playing xylophone,ripping paper,shoveling snow,shuffling cards,singing,stomping grapes,tap dancing,tapping guitar,\
tapping pen,tickling,strumming guitar""".split(",")       # the last is not in the list of 31


def videos(root):
    """All video files under root, through links too, sorted. Raises ValueError where root is no folder or has none."""
    root, found, seen = Path(root).resolve(), [], set()
    if not root.is_dir():
        raise ValueError(f"no folder {root}: give the folder that holds the class folders of videos")
    for here, below, names in os.walk(root, followlinks=True):
        below.sort()
        if os.path.realpath(here) in seen:                # links may lead in circles
            below.clear()
            continue
        seen.add(os.path.realpath(here))
        found += [Path(here, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    if not found:
        raise ValueError(f"no video in {root}: expected [train|val|test/]class/*.mp4 (.avi, .mkv, .webm, .mpg, .mov)")
    return sorted(found)


def find(root):
    """All (path, label, split) of class folders under root, sorted. Raises ValueError as `videos` does."""
    root, found = Path(root).resolve(), []
    for path in videos(root):
        *above, _ = path.relative_to(root).parts
        split = above.pop(0) if above and above[0] in ("train", "val", "test") else ""
        found.append((path, "/".join(above) or root.name, split))
    return found


def lists(annotations, pattern, what):
    """The annotation files by that pattern: of a folder, or the csv itself. ValueError where there is none."""
    if annotations is None:
        raise ValueError(f"this layout needs --annotations: give {what}")
    path = Path(annotations)
    if path.is_file() and path.suffix == ".csv" == Path(pattern).suffix:
        return [path]
    found = sorted(path.glob(pattern)) if path.is_dir() else []
    if not found:
        problem = f"has no {pattern}" if path.is_dir() else "is of another kind" if path.exists() else "does not exist"
        raise ValueError(f"--annotations {path} {problem}: give {what}")
    return found


def parse(path, read, expected, skip=0):
    """[read(line)] for the lines of a file that are not blank. Raises ValueError naming file:line where read cannot."""
    values = []
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                if number > skip and line.strip():
                    values.append(read(line.rstrip("\n")))
            except (ValueError, LookupError, AttributeError, csv.Error):  # AttributeError: a pattern does not match
                raise ValueError(f"{path}:{number}: expected {expected}, got {line.strip()[:200]!r}") from None
    return values


def cells(line):
    return next(csv.reader([line], strict=True))


def kinetics_lists(annotations):
    """{file name without suffix: (label, split, reason)} from label,youtube_id,time_start,time_end,split."""
    def read(line):
        row = dict(zip(header, cells(line), strict=True))
        return f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}", (
            row["label"], SPLITS[row["split"]], "")

    official, columns = {}, "label,youtube_id,time_start,time_end,split"
    for path in lists(annotations, "*.csv", "the official csv (train.csv, validate.csv, ...) or their folder"):
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            header = file.readline().strip().replace('"', "").split(",")
        if not set(columns.split(",")) <= set(header):
            raise ValueError(f"{path}:1: expected the columns {columns}, got {','.join(header)[:200]!r}")
        official = dict(parse(path, read, ",".join(header), skip=1)) | official
    return official


def match(paths, official):
    """([(path, label, split, reason)], what the summary has to say of entries that are not on disk)."""
    absent = official.keys() - {path.stem for path in paths}
    splits = Counter(official[name][1] for name in absent if not official[name][2])
    note = f"{splits.total()} official entries not on disk"
    note += f" ({', '.join(f'{n} of {split}' for split, n in sorted(splits.items()))})" if splits else ""
    return [(path, *official.get(path.stem, ("", "", UNLISTED))) for path in paths], [note]


def folder(root):
    """ROOT/[train|val|test/]class/*: the folders name the labels."""
    return [(*entry, "") for entry in find(root)], []


def kinetics400(root, annotations=None):
    """id_start_end.mp4 anywhere under root, with the official csv (of cvdfoundation/kinetics-dataset)."""
    return match(videos(root), kinetics_lists(annotations))


def kinetics_sounds(root, annotations=None, classes=32):
    """The 32 (or 31) classes of a Kinetics copy. Without a csv class folders name the label, spelt with _ or blanks."""
    names, paths, found, notes = KINETICS_SOUNDS[:classes], videos(root), [], []
    if annotations is not None:
        official = kinetics_lists(annotations)
        ours = {name: entry for name, entry in official.items() if entry[0] in names}
        found, notes = match([path for path in paths if path.stem in ours or path.stem not in official], ours)
    for path in paths if annotations is None else ():
        above = [part.replace("_", " ").lower() for part in path.relative_to(Path(root).resolve()).parts[:-1]]
        label = next((part for part in above if part in names), None)
        if label:
            found.append((path, label, next((SPLITS[part] for part in above if part in SPLITS), ""), ""))
    if all(reason for *_, reason in found):
        raise ValueError(f"no video of the {classes} classes in {root}: name folders by them or give --annotations")
    return found, [*notes, f"{len(paths) - len(found)} files of other classes passed over"]


def vggsound(root, annotations=None):
    """id_start.mp4 anywhere under root, with the official vggsound.csv (id,start,"label",split, no header) or the
    train.csv and test.csv of its evaluation code (id_start.mp4,label)."""
    def read(split, line):
        first, *rest = cells(line)
        if len(rest) == 1:
            return Path(first).stem, (rest[0], SPLITS[split], "")
        start, label, split = rest
        return f"{first}_{int(start):06d}", (label, SPLITS[split], "")

    whole = annotations is None or not Path(annotations).is_dir() or (Path(annotations) / "vggsound.csv").exists()
    official = {}
    for path in lists(annotations, "vggsound.csv" if whole else "t*.csv", "the official vggsound.csv"):
        official |= parse(path, partial(read, path.stem), 'id,start,"label",split or id_start.mp4,label')
    return match(videos(root), official)


def ucf101(root, annotations=None, fold=1):
    """v_Class_gNN_cNN.avi, or converted: the stem counts. The lists: trainlist01.txt, testlist01.txt, classInd.txt."""
    def read(split, line):
        label, name, n = re.fullmatch(r"(\w+)/(\w+)\.avi(?: (\d+))?\s*", line).groups()
        if number[label] != (n or number[label]):
            raise ValueError(line)
        return name, (label, split, "")

    what = "the folder of trainlist01-03.txt, testlist01-03.txt and classInd.txt (ucfTrainTestlist)"
    [path] = lists(annotations, "classInd.txt", what)
    number = dict(parse(path, lambda line: re.fullmatch(r"(\d+) (\w+)\s*", line).group(2, 1), "'1 Class'"))
    official = {}
    for split in ("train", "test"):
        [path] = lists(annotations, f"{split}list{fold:02d}.txt", what)
        official |= parse(path, partial(read, split), "'Class/v_Class_g01_c01.avi' with a class of classInd.txt")
    return match(videos(root), official)


def hmdb51(root, annotations=None, fold=1):
    """class/*.avi, or converted: the stem counts. The lists: <class>_test_split1.txt (1 train, 2 test, 0 unused)."""
    def read(label, line):
        name, use = re.fullmatch(r"(.+)\.avi ([012])\s*", line).groups()
        return name, (label, *part[use])

    part = {"0": ("", f"unused in fold {fold}"), "1": ("train", ""), "2": ("test", "")}
    end, official = f"_test_split{fold}.txt", {}
    for path in lists(annotations, f"*{end}", "the folder of <class>_test_split[1-3].txt (testTrainMulti_7030_splits)"):
        official |= parse(path, partial(read, path.name.removesuffix(end)), "'name.avi 0', 1 or 2")
    return match(videos(root), official)


LAYOUTS = {"folder": folder, "kinetics400": kinetics400, "kinetics-sounds": kinetics_sounds, "vggsound": vggsound,
           "ucf101": ucf101, "hmdb51": hmdb51}


def span(stream, container):
    """(start, end) of a stream in s on the container's clock."""
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration:
        return start, start + float(stream.duration * stream.time_base)
    end = (container.duration or 0) / av.time_base        # Matroska's runs from 0 on, not from the first stamp
    return start, end if "matroska" in container.format.name else end + (container.start_time or 0) / av.time_base


def stamp(path):
    """'bytes:mtime in ns' of a file, '' where the disk does not tell."""
    try:
        return "{0.st_size}:{0.st_mtime_ns}".format(os.stat(path))
    except OSError:
        return ""


def read(container, verify):
    """What a manifest row says of an open file. Decodes the first frame of each stream or, to verify, all of both.

    Raises FFmpegError or ValueError where decoding fails.
    """
    video, audio = container.streams.best("video"), container.streams.best("audio")
    if video is None or video.disposition & av.stream.Disposition.attached_pic:
        return {"reason": "no video stream"}              # the cover of a piece of music is none
    streams = [video] if audio is None else [video, audio]
    if any(stream.codec_context is None for stream in (*container.streams.video, *streams)):
        return {"reason": "no decoder for one of its streams"}
    video.codec_context.thread_count = 1                  # threads hang when a decode is left early
    reached = {}                                          # stream -> time of its last decoded frame, s
    for packet in container.demux(streams):
        for frame in packet.decode() if verify or packet.stream not in reached else ():
            reached[packet.stream] = max(reached.get(packet.stream, 0), frame.time or 0)
            if verify and frame.is_corrupt:
                raise ValueError(f"damaged frames (first at {frame.time or 0:.2f} s)")
        if not verify and len(reached) == len(streams):
            break
    if len(reached) < len(streams):
        return {"reason": f"no {'sound' if video in reached else 'picture'} decodes"}
    spans = [span(stream, container) for stream in streams]
    start, end = max(start for start, _ in spans), min(end for _, end in spans)
    row = {"fps": round(float(video.average_rate or 0), 3), "width": video.width, "height": video.height,
           "has_audio": len(streams) - 1, "duration": round(end - start, 3)}
    if row["duration"] <= 0:
        row["reason"] = "sight and sound do not overlap" if audio is not None else "its length is not known"
    for stream, (_, end) in zip(streams, spans):
        if verify and reached[stream] < end - 1:          # last frames begin short of the end, by less than 1 s
            row["reason"] = f"its {stream.type} stops too early (at {reached[stream]:.2f} s of {end:.2f} s)"
    return row


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
    with open(path, encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if not {"path", "label", "reason"} <= set(table.fieldnames or ()):
            raise ValueError(f"--out {path} is no manifest and would be written over: give another")
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


def drop_copies(rows):
    """Of the usable files of one clip one stays: the one in a folder of replacements (as of Kinetics) or the first."""
    used = {}
    for row in sorted(rows, key=lambda row: ("replac" not in row["path"].lower(), row["path"])):
        clip = row["label"], row["split"], Path(row["path"]).stem
        if not row["reason"] and used.setdefault(clip, row) is not row:
            row["reason"] = COPY


def survey(layout, root, workers=2, out=None, verify=False, **options):
    """(rows, notes on what is not on disk) of a copy. options: annotations, fold, classes, as the layout takes."""
    for name in options.keys() - signature(LAYOUTS[layout]).parameters:
        raise ValueError(f"layout {layout} takes no --{name}")
    entries, notes = LAYOUTS[layout](root, **options)
    rows = probe_all(entries, workers, verify, out)
    if layout != "folder":
        drop_copies(rows)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layout", choices=LAYOUTS, help="how the copy is laid out")
    parser.add_argument("root", help="where it is")
    parser.add_argument("--annotations", help="the official lists: a csv, or the folder of csv or txt files")
    parser.add_argument("--fold", type=int, choices=(1, 2, 3), help="of ucf101 and hmdb51 (default 1)")
    parser.add_argument("--classes", type=int, choices=(32, 31), help="of kinetics-sounds (default 32)")
    parser.add_argument("--out", default="manifest.csv", help="the csv to write (default manifest.csv)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default 2)")
    parser.add_argument("--verify", action="store_true", help="decode every file to its end: slow, finds all damage")
    args = vars(parser.parse_args())
    try:
        rows, notes = survey(**{name: value for name, value in args.items() if value is not None})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: what was read is kept, run the same command to go on")
    print(f"{args['out']}: {summary(rows, notes)}")
