"""The table of a retrieval: where it is written, how many clips it needs, and how it looks."""

import json
from collections import Counter
from pathlib import Path

from support.processes import rank, say


def results_path(checkpoint):
    """The retrieval.json beside a checkpoint.pt, or retrieval-<name>.json for other names. Those of
    "none" and "torchvision", which are no files, lie in runs/."""
    named = checkpoint in ("none", "torchvision")
    path = Path("runs", checkpoint) if named else Path(checkpoint)
    name = path.stem.removeprefix("checkpoint").removeprefix("-")
    return path.with_name(f"retrieval-{name}.json" if name else "retrieval.json")


def check_size(n, split, left_out, least):
    """Raise ValueError if a part has n < least clips. left_out: {path: reason}."""
    if n < least:
        causes = ", ".join(f"{n} {why}" for why, n in Counter(left_out.values()).most_common(3))
        needs = f"R@{least}" if least > 1 else "a query"
        raise ValueError(f"{n} usable clips in the {split!r} part, but {needs} needs "
                         f"{least} or more; left out: {causes or 'none'}")


def report(args, rows, left_out, videos, results):
    """Print and write the results {way: {k: (instance-level, class-level)}} of retrieval.py.

    rows: of the n clips that could be read, of so many `videos`. left_out: the number of others.
    """
    names, n = {row.label for row in rows}, len(rows)
    classes = 0 if "" in names or len(names) < 2 else len(names)        # to compare by class
    head = {"checkpoint": str(args.checkpoint), "data": args.data, "split": args.split,
            "clips_per_file": args.clips, "feature": args.feature, "pool": n, "classes": classes,
            "left_out": left_out, "videos": videos, "failed": videos - n}
    searched = f"{n} clips of {classes} classes" if classes else f"{n} clips"
    if args.split in ("all", "train"):
        head["includes_training_clips"] = True
        searched += ", includes training clips"
    levels = ("instance", "class") if classes else ("instance",)
    lines = [(name, way, {f"R@{k}": shares[level] for k, shares in found.items()})
             for level, name in enumerate(levels) for way, found in results.items()]
    write_table(head, searched, "R@k", lines, n)
    if not classes:
        say("No class-level recall: it needs two classes or more, and a label for every clip.")


def write_table(head, clips, measures, lines, n):
    """Process 0 prints the table, and writes it to retrieval.json after `head`.

    head: what was measured, a dict. clips, measures: words for the title. lines: [(level, way,
    {column: share of the n queries})]. Those of chance have no standard error.
    """
    if rank() > 0:
        return
    failures = f"; {head['failed']} of {head['videos']} videos failed" if head["failed"] else ""
    print(f"{head['checkpoint']}, {clips} ({head['left_out']} left out{failures}), "
          f"{head['clips_per_file']} clips per file, feature {head['feature']}, {measures} in % +- "
          "standard error")
    print(f"{'':24}" + "".join(f"{column:>13}" for column in lines[0][2]))
    for level, way, shares in lines:
        cells, kept = [], {}
        for column, p in shares.items():
            error = (p * (1 - p) / n) ** 0.5
            chance = way == "chance"
            cells.append(f"{100 * p:6.1f}" + (" " * 7 if chance else f" +- {100 * error:3.1f}"))
            kept[column] = p if chance else [p, error]
        print(f"{level:9}{way:15}" + "".join(cells))
        head[f"{level}, {way}"] = kept
    path = results_path(head["checkpoint"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=1))
