"""The rows of a manifest.csv: as text in the file, and as a Row in the program.

docs/data.md says what the columns mean. `python -m prepare.manifest` makes a manifest.
"""

import csv
import io
import sys
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

from support.files import write_atomic

COLUMNS = ("path", "label", "split", "start", "end", "duration", "video_duration", "sound_start",
           "fps", "width", "height", "has_audio", "reason", "note", "stamp")
ROUNDED = 1                             # s; lists count whole ones, so an end may lie a bit outside


def read_rows(path):
    """The rows of a manifest, with all values as text. Raises ValueError if it is none, or with the
    line of a row that is cut short or too long."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        missing = set(COLUMNS) - set(table.fieldnames or ())
        if missing:
            raise ValueError(f"{path} is no manifest of this version, it lacks "
                             f"{', '.join(sorted(missing))}: give another file, or make one with "
                             "python -m prepare.manifest")
        rows = []
        for row in table:
            if None in row or None in row.values():
                raise ValueError(f"{path}:{table.line_num}: the row has not the "
                                 f"{len(table.fieldnames)} columns of the first line: mend it, or "
                                 "make the manifest anew with python -m prepare.manifest")
            rows.append(row)
        return rows


def write_rows(rows, out):
    """Write rows as a manifest, whole or not at all."""
    out, text = Path(out), io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(text.getvalue().encode(errors="backslashreplace"), out)


def segment(row, source=""):
    """Where the clip of a row lies in its file: (start, stop), s after the pictures begin, or
    (0, None) for the whole file.

    An end less than ROUNDED behind the end of the pictures becomes this end. source: where the
    segment was named, for the error. Raises ValueError if it does not lie in the file.
    """
    start, end = row["start"], row["end"]
    if start == end == "":
        return 0, None
    length = float(row["video_duration"])
    with suppress(ValueError):                            # of a cell that is no number
        first, last = float(start or 0), float(length if end == "" else end)
        if 0 <= first < min(last, length) and last < length + ROUNDED:
            return first, min(last, length)
    raise ValueError(f"its segment does not lie in the film ({source}expected 0 <= start < end <= "
                     f"{length:.2f} s, got {start} to {end})")


def segment_name(path, start, end):
    """'path [start-end s]', or the path alone if the row is of the whole file."""
    return f"{path} [{start}-{end} s]" if start or end else path


class Row(namedtuple("Row", "path label split duration video_duration has_audio note "
                     "start stop video_start", defaults=(0, None, 0))):
    """A file, or a segment of it.

    duration: the s that pictures and sound both cover, or the pictures alone if the sound cannot be
    used (has_audio is False, and note tells why). start, stop: of the segment, by the clock of
    `read_clip` with sound. video_start, video_stop: the same by its clock without sound. The stops
    of a whole file are None.
    """

    __slots__ = ()

    @property
    def video_stop(self):
        return None if self.stop is None else round(self.video_start + self.video_duration, 6)

    @property
    def name(self):
        """The path, or 'path [start-end s]', which tells apart the segments of a file."""
        if self.video_stop is None:
            return self.path
        return segment_name(self.path, self.video_start, self.video_stop)


def make_row(line):
    """The Row of a usable line of a manifest, {column: text or value}. Raises ValueError if its
    segment does not lie in the file."""
    duration, video_duration = float(line["duration"]), float(line["video_duration"])
    start, stop = segment(line)
    places = ()
    if stop is not None:
        late = float(line["sound_start"])               # the clock with sound begins so much later
        places = max(0, start - late), min(duration, stop - late), start
        duration, video_duration = max(0, places[1] - places[0]), stop - start
    # A class name is kept once and not once a row, because every worker has a copy of the rows.
    return Row(line["path"], sys.intern(line["label"]), sys.intern(line["split"]), duration,
               video_duration, str(line["has_audio"]) == "1", sys.intern(line["note"]), *places)
