"""A data set on disk -> manifest.csv: what can be used, and what is left out and why (§3.1).

    python -m prepare.manifest folder ROOT        # ROOT/[train|val|test/]class/*.mp4, *.mkv, ...
    python -m prepare.manifest folder ROOT --test-share 0.2      # draws a test part
    python -m prepare.manifest kinetics-sounds ROOT --annotations folder/of/csv --out ks.csv
    python -m prepare.manifest hmdb51 ROOT --annotations testTrainMulti_7030_splits --fold 1
    python -m prepare.manifest list ROOT --annotations train.txt    # path label [start end] [split]

The manifest has a row for each video file below ROOT, or for each segment that a list names of it;
docs/data.md says what its columns mean. The same command brings a manifest up to date, and
continues an interrupted scan from OUT.partial.
"""

import argparse
import sys

from prepare.layouts import LAYOUTS
from prepare.scan import summary, survey
from support.commands import at_least, errors_in_one_line
from support.rows import segment_name


def main():
    """Run the command. The exit status is 1, with a sentence, if no file can be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("layout", choices=LAYOUTS, help="how the copy is laid out")
    parser.add_argument("root", help="the folder of the copy")
    parser.add_argument("--annotations",
                        help="a list: the official csv, the folder of official lists, or one's own")
    parser.add_argument("--fold", type=int, choices=(1, 2, 3),
                        help="the fold of ucf101 and hmdb51 (default 1)")
    parser.add_argument("--classes", type=int, choices=(32, 31),
                        help="the number of classes of kinetics-sounds (default 32)")
    parser.add_argument("--test-share", type=float, metavar="SHARE",
                        help="of the files for a test part, of folder without parts (default none)")
    parser.add_argument("--seed", type=int, help="of --test-share: another one draws another part "
                        "(default 0)")
    parser.add_argument("--out", default="manifest.csv",
                        help="the csv to write (default manifest.csv)")
    parser.add_argument("--workers", type=at_least(1), default=2,
                        help="the number of processes that read files (default 2)")
    parser.add_argument("--verify", action="store_true",
                        help="decode every file to its end: slow, finds all damage")
    args = parser.parse_args()
    with errors_in_one_line(": what was read is kept, run the same command to go on"):
        rows, notes = survey(**vars(args))
    for row in [row for row in rows if row["reason"]][:10]:
        print(f"left out: {segment_name(row['path'], row['start'], row['end'])}: {row['reason']}",
              file=sys.stderr)
    text = f"{args.out}: {summary(rows, notes)}"
    if all(row["reason"] for row in rows):
        sys.exit(f"error: {text}")                        # the manifest is written nevertheless
    print(text)


if __name__ == "__main__":
    main()
