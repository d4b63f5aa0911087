"""Table 1 in small: the paper's rows and the readings that it leaves open, on two sets of videos.

    python -m experiments.ablation                      # 49 runs of 14 minutes on a core each
    python -m experiments.ablation --data grid.csv      # 24 runs of 17 minutes on a core each
    python -m experiments.ablation --seeds 5 6 --rows "s = [1, 4], SoftInfoNCE" "raw y"
    python -m experiments.ablation --quick              # 2 epochs, one seed: does it run?

A run is pretrain.py with one row's flags. Runs with a line in the csv are left out, so the same
command continues after an interruption. To repeat a run, delete its line and its folder in --out.

Without --data the set is the built-in one, at 6 frames per second, so that a clip lasts 0.67 s and
speed 6 fits into the 4.5 s of a film. All measures are of the test part, on the mean of 2 clips per
film. Retrieval compares the projections z. Probes are linear classifiers on the encoder outputs y
of video or of sound, fitted on all labels of the train part (72 per class) or on two labels per
class (mean of 5 draws), because the probe of sound reaches 100 % with all.

--data is for a set in which timing alone links sight and sound: GRID of docs/data.md, whose clips
of 0.67 s fit speed 4 into 3 s. Retrieval is at instance level, on the middle clip of each test
file. "No speed" has as many epochs as the other rows, or twice as many, so that it encodes the same
number of clips. A second pool has each clip's sound and video at one of the speeds 1 to 4, a
quarter of the clips at each: there a model that hears and sees the speed alone finds clips of the
query's speed.

experiments/results/ablation.csv, or ablation-grid.csv, gets a line per run, and the .md beside it
the tables. docs/results.md discusses them.
"""

import argparse
import shutil
import statistics
import sys
from collections import namedtuple
from pathlib import Path

import torch

from experiments import measures
from experiments.measures import LEVELS, PROBES, SPEEDS, WAYS
from experiments.runs import (RESULTS, read_csv, run_all, run_script, spread, standard_error,
                              write_csv)
from prepare import demo
from retrieval import RANKS, chance

SOFT = "--max-speed 4 --affinity clip --affinity-temperature 1"
PAPER = {"no speed, InfoNCE": "--max-speed 1 --affinity none",
         "s = [1, 2], InfoNCE": "--max-speed 2 --affinity none",
         "s = [1, 4], InfoNCE": "--max-speed 4 --affinity none",
         "s = [1, 6], InfoNCE": "--max-speed 6 --affinity none",
         "s = [1, 4], SoftInfoNCE": SOFT}
READINGS = {"temperature 0.1": "--max-speed 4 --affinity clip --affinity-temperature 0.1",
            "raw y": SOFT + " --raw-affinity",
            "detached": SOFT + " --detach-affinity",
            "scope view": "--max-speed 4 --affinity view --affinity-temperature 1",
            "scope batch": "--max-speed 4 --affinity batch --affinity-temperature 1",
            "mapping linear": SOFT + " --mapping linear",
            "mapping mlp": SOFT + " --mapping mlp",
            "shared speed": SOFT + " --same-speed"}
SHORT = {f"{name}, 15 epochs": flags + " --epochs 15"
         for name, flags in (PAPER | READINGS).items() if name != "shared speed"}
PAPER, READINGS = ({name: flags + " --epochs 30" for name, flags in rows.items()}
                   for rows in (PAPER, READINGS))
TIMING = {"no speed, InfoNCE": "--max-speed 1 --affinity none --epochs 32",
          "no speed, InfoNCE, 16 epochs": "--max-speed 1 --affinity none --epochs 16",
          "s = [1, 2], InfoNCE": "--max-speed 2 --affinity none --epochs 16",
          "s = [1, 4], InfoNCE": "--max-speed 4 --affinity none --epochs 16",
          "s = [1, 4], InfoNCE, shared speed":
              "--max-speed 4 --affinity none --same-speed --epochs 16",
          "s = [1, 4], SoftInfoNCE, shared speed": SOFT + " --same-speed --epochs 16",
          "s = [1, 4], SoftInfoNCE": SOFT + " --epochs 16",
          "s = [1, 4], SoftInfoNCE, temperature 0.1":
              "--max-speed 4 --affinity clip --affinity-temperature 0.1 --epochs 16"}

# rows: {name: flags of pretrain.py}. seeds: of a run without --seeds, none if it runs with --rows
# alone. base: the row with which the others are compared.
Table = namedtuple("Table", "title rows seeds base")
# flags: of pretrain.py, for all rows. metrics: columns of the tables. compared: the metric whose
# differences from the base's are in the last column. levels: of Table 3. measure: from a checkpoint
# to {metric: value}.
Study = namedtuple("Study", "flags tables metrics compared levels measure")
BUILT_IN = Study("--fps 6 --warmup 1",
                 [Table("The paper's rows", PAPER, range(5), "s = [1, 4], SoftInfoNCE"),
                  Table("Open readings", READINGS, range(3), "s = [1, 4], SoftInfoNCE"),
                  Table("15 epochs", SHORT, (), "s = [1, 4], SoftInfoNCE, 15 epochs")],
                 [f"{level} R@{k}" for level in ("class", "instance") for k in (1, 5)] + [*PROBES],
                 "class R@1", LEVELS, measures.classes_and_clips)
LIPS = Study("--arch r2plus1d_10 --frames 8 --fps 12 --size 32 --batch-per-process 32",
             [Table("Timing alone", TIMING, range(3), "no speed, InfoNCE")],
             [*(f"instance R@{k}" for k in RANKS), "mixed R@5", "mixed, same speed", "loss"],
             "instance R@5", LEVELS[:1], measures.timing)


def rows_of(study):
    """{row: flags} of all tables."""
    return {name: flags for _, rows, _, _ in study.tables for name, flags in rows.items()}


def columns(study):
    """The columns of the csv. "clips" is the size n of the pool, which decides chance."""
    table_3 = [name for level in study.levels for name in measures.recall_names(level)]
    return ["row", "seed", "flags", *study.metrics, *table_3, "clips/s", "clips"]


def run_row(flags, out, measure):
    """Start or continue one run of pretrain.py, and measure it: {metric: value}.

    Raises ValueError if pretrain.py fails, or if a file of the test part cannot be read.
    """
    run_script("pretrain.py", [*flags, "--out", str(out)], out.with_suffix(".txt"))
    return measure(out / "checkpoint.pt")


def read_results(path, study):
    """The lines of an earlier csv whose rows still have the same flags."""
    lines, rows = read_csv(path, columns(study)), rows_of(study)
    return [line for line in lines if rows.get(line["row"]) == line["flags"]]


def write_results(lines, path, study):
    """Write the csv, sorted by row and seed, and the tables beside it."""
    order = list(rows_of(study))
    lines.sort(key=lambda line: (order.index(line["row"]), int(line["seed"])))
    write_csv(lines, columns(study), path)
    path.with_suffix(".md").write_text(markdown(lines, study))


def values_of(lines, metric):
    """A measure of the lines that have it, by seed: {seed: value}."""
    return {line["seed"]: float(line[metric]) for line in lines if line[metric]}


def chances(study, clips):
    """{metric: its value, as text, for a model that knows nothing} in a pool of so many clips."""
    kinds = len(demo.KINDS) if study is BUILT_IN else clips
    by_chance = chance(torch.arange(kinds).repeat_interleave(clips // kinds))
    found = dict.fromkeys(PROBES, 1 / kinds) | {"mixed R@5": by_chance[5][0], "loss": 1,
                                                "mixed, same speed": 1 / len(SPEEDS)}
    for k, shares in by_chance.items():
        for level, share in zip(LEVELS, shares):
            names = [f"{level} R@{k}", *(f"{level}, {way}, R@{k}" for way in WAYS)]
            found |= dict.fromkeys(names, share)
    return {name: f"{100 * share:.1f}" for name, share in found.items()}


def markdown(lines, study):
    """The tables of the lines of the csv: means over seeds, and chance."""
    by_row = {name: [line for line in lines if line["row"] == name] for name in rows_of(study)}
    by_chance = chances(study, max(int(line["clips"]) for line in lines))
    text = []
    for title, rows, _, base in study.tables:
        names = [*study.metrics, "seeds", f"{study.compared} minus that of {base}"]
        text += [f"## {title}", "", "In %, mean ± standard deviation over seeds. The last column "
                 "is paired by seed, mean ± standard error.", ""]
        text += [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|",
                 "| chance | " + " | ".join(by_chance[name] for name in study.metrics) + " | | |"]
        of_base = values_of(by_row[base], study.compared)
        for name in rows:
            cells = [spread([*values_of(by_row[name], metric).values()], statistics.stdev)
                     for metric in study.metrics]
            differences = [value - of_base[seed] for seed, value
                           in values_of(by_row[name], study.compared).items() if seed in of_base]
            cells += [str(len(by_row[name])),
                      "" if name == base or not differences
                      else spread(differences, standard_error, "+")]
            text.append(f"| {' | '.join([name, *cells])} |")
        text.append("")
    return "\n".join(text + table_3(by_row, by_chance, study)).strip() + "\n"


def table_3(by_row, by_chance, study):
    """The lines of Table 3 for the rows of the first table: mean ± standard error over seeds."""
    text = []
    for level in study.levels:
        names = measures.recall_names(level)
        short = [name.removeprefix(f"{level}, ") for name in names]
        text += [f"## Table 3, {level}-level", "", "In %, mean ± standard error over seeds.", "",
                 f"| | {' | '.join(short)} | seeds |", "|---" * (len(names) + 2) + "|",
                 "| chance | " + " | ".join(by_chance[name] for name in names) + " | |"]
        for name in study.tables[0].rows:
            found = [[*values_of(by_row[name], metric).values()] for metric in names]
            cells = [spread(values, standard_error) for values in found]
            text.append(f"| {' | '.join([name, *cells, str(len(found[0]))])} |")
        text.append("")
    return text


def parse(argv=None):
    """The arguments of the command line, the study, and its jobs [(row, seed)]."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--data", help="folder or manifest.csv of a set in which timing alone links "
                   "sight and sound (default: the built-in set)")
    p.add_argument("--seeds", type=int, nargs="+",
                   help="(0 to 4 for the paper's rows, else 0 to 2)")
    p.add_argument("--rows", nargs="+", metavar="ROW", help="(all but those of 15 epochs)")
    p.add_argument("--quick", action="store_true",
                   help="the first table, 2 epochs, the first seed, results in --out (off)")
    p.add_argument("--out", default="runs/ablation", help="folder of the runs (runs/ablation)")
    args = p.parse_args(argv)
    study = LIPS if args.data else BUILT_IN
    unknown = set(args.rows or ()) - rows_of(study).keys()
    if unknown:
        p.error(f"--rows {' '.join(map(repr, sorted(unknown)))}: give some of "
                + ", ".join(map(repr, rows_of(study))))
    tables = study.tables[:1] if args.quick else study.tables
    jobs = [(name, seed) for table in tables if table.seeds or args.rows
            for seed in (args.seeds or table.seeds or range(3))[:1 if args.quick else None]
            for name in table.rows if name in (args.rows or table.rows)]
    if not jobs:
        p.error("--quick makes rows of the first table alone: "
                + ", ".join(map(repr, study.tables[0].rows)))
    return args, study, jobs


def name_of(data):
    """The name of a set: "grid" for grid, grid.csv and grid/manifest.csv."""
    data = Path(data).absolute()
    return data.parent.name if data.name == "manifest.csv" else data.stem


def main(argv=None):
    """Run the command. The exit status is 1 if a run failed."""
    args, study, jobs = parse(argv)
    folder, file, common, shorter = Path(args.out), "ablation.csv", study.flags.split(), []
    if args.data:
        name = name_of(args.data)
        folder, file = folder / name, f"ablation-{name}.csv"
        common += ["--data", args.data]
    results = RESULTS / file
    if args.quick:
        folder, shorter = folder / "quick", ["--epochs", "2"]
        results = folder / file
        shutil.rmtree(folder, ignore_errors=True)       # it shows anew whether it runs
    folder.mkdir(parents=True, exist_ok=True)
    if not args.data:
        demo.build(folder / "demo")

    lines, failures, rows = read_results(results, study), 0, rows_of(study)
    done = {(line["row"], int(line["seed"])) for line in lines}
    todo = {(name, seed): (run_row, [*common, "--seed", str(seed), *rows[name].split(), *shorter],
                           folder / f"{list(rows).index(name):02d}-{seed}", study.measure)
            for name, seed in jobs if (name, seed) not in done}
    for (name, seed), values, error in run_all(todo):
        if error:
            failures += 1
            print(f"error: {name}, seed {seed}: {error}", file=sys.stderr, flush=True)
            continue
        line = {"row": name, "seed": str(seed), "flags": rows[name], "clips": str(values["clips"])}
        line = {column: line.get(column) or f"{values[column]:.2f}" for column in columns(study)}
        lines.append(line)
        write_results(lines, results, study)
        print(f"{name}, seed {seed}: "
              + ", ".join(f"{metric} {line[metric]}" for metric in study.metrics), flush=True)
    if lines:
        write_results(lines, results, study)
        print(results.with_suffix(".md").read_text())
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
