"""A copy of a data set on disk -> one manifest.csv: what there is, and what is left out and why (§3.1).

    python -m prepare.manifest folder ROOT        # ROOT/[train|val|test/]class/*.mp4, *.mkv, ...
    python -m prepare.manifest kinetics-sounds ROOT --annotations folder/of/csv --out ks.csv --workers 16
    python -m prepare.manifest hmdb51 ROOT --annotations testTrainMulti_7030_splits --fold 1

Columns: path (absolute), label, split ("" where none is known), duration (s that pictures and sound
both cover), video_duration (s of the pictures), fps, width, height, has_audio (0 | 1), reason (why the
file is left out; empty: usable), note (why the sound of a usable file cannot be used), stamp ("bytes:
mtime in ns", and ":verified" after --verify). Run again, files whose stamp still holds are not read
again; with --verify, those verified.
An interrupted scan leaves OUT.partial, from where the next one goes on.
"""

import argparse
import sys

from prepare.layouts import LAYOUTS
from prepare.scan import summary, survey

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
    done = f"{args['out']}: {summary(rows, notes)}"
    if all(row["reason"] for row in rows):                # the manifest is written all the same
        sys.exit(f"error: {done}")
    print(done)
