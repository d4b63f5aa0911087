"""A copy of a data set on disk -> one manifest.csv: what there is, and what is left out and why.

    python -m prepare.manifest folder ROOT --out manifest.csv     # ROOT/[train|val|test/]class/*.mp4|avi|mkv|webm|mpg|mov

Columns: path (absolute), label, split ("" without train/val/test folders), duration (s, the part that sight and sound
both cover), fps, width, height, has_audio (0 | 1), reason (why the file is left out; empty: usable).
"""

import argparse
import csv
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
from tqdm import tqdm

COLUMNS = ("path", "label", "split", "duration", "fps", "width", "height", "has_audio", "reason")
SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".mpg", ".mov"}
SPLITS = ("train", "val", "test")


def find(root):
    """All (path, label, split) under root, sorted. Raises ValueError where root is no folder or holds no video."""
    root = Path(root).resolve()
    if not root.is_dir():
        raise ValueError(f"no folder {root}: give the folder that holds the class folders of videos")
    found = []
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES):
        *above, _ = path.relative_to(root).parts
        split = above.pop(0) if above and above[0] in SPLITS else ""
        found.append((path, "/".join(above) or root.name, split))
    if not found:
        raise ValueError(f"no video in {root}: expected ROOT/[train|val|test/]class/*.mp4 (or .avi, .mkv, .webm, .mpg, .mov)")
    return found


def span(stream, container):
    """(start, end) of a stream in s on the container's clock."""
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration:
        return start, start + float(stream.duration * stream.time_base)
    return start, (container.start_time + (container.duration or 0)) / av.time_base


def probe(entry):
    """One manifest row of (path, label, split): headers and the first decoded frame of each stream, no more."""
    path, label, split = entry
    row = dict.fromkeys(COLUMNS, "") | {"path": str(path), "label": label, "split": split, "has_audio": 0}
    try:
        with av.open(str(path)) as container:
            video, audio = container.streams.best("video"), container.streams.best("audio")
            if video is None:
                return row | {"reason": "no video stream"}
            start, end = span(video, container)
            row |= {"fps": round(float(video.average_rate or 0), 3), "width": video.width, "height": video.height}
            next(container.decode(video))
            if audio is not None:
                container.seek(0)
                next(container.decode(audio))
                row["has_audio"] = 1
                start, end = max(start, span(audio, container)[0]), min(end, span(audio, container)[1])
            row["duration"] = round(end - start, 3)
            if end <= start:
                row["reason"] = "sight and sound do not overlap"
    except StopIteration:
        row["reason"] = "nothing decodes"
    except (av.error.FFmpegError, OSError) as error:
        row["reason"] = f"cannot be read: {error.strerror or error}"
    return row


def scan(root, workers=2):
    """The manifest of a folder tree, a list of rows in the order of the paths."""
    found = find(root)
    with ProcessPoolExecutor(workers) as pool:
        rows = pool.map(probe, found, chunksize=16)
        return list(tqdm(rows, total=len(found), desc=f"scanning {root}", unit="file", file=sys.stderr))


def write(rows, out):
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, out)


def summary(rows):
    """'800 files, 798 usable, 2 left out: 1 no video stream, 1 cannot be read: ...'"""
    reasons = Counter(row["reason"] for row in rows if row["reason"])
    left_out = f", {reasons.total()} left out: " + ", ".join(f"{n} {r}" for r, n in reasons.most_common())
    return f"{len(rows)} files, {len(rows) - reasons.total()} usable" + (left_out if reasons else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layout", choices=["folder"], help="how the copy is laid out")
    parser.add_argument("root", help="where it is")
    parser.add_argument("--out", default="manifest.csv", help="the csv to write (default manifest.csv)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default 2)")
    args = parser.parse_args()
    try:
        rows = scan(args.root, args.workers)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write(rows, args.out)
    print(f"{args.out}: {summary(rows)}")
