"""Table 1 in small: the paper's rows and the readings that it leaves open, on the built-in set.

    python -m experiments.ablation                      # 15 runs of 17 to 36 minutes of a core
    python -m experiments.ablation --hide kind          # 6 runs on films without that link
    python -m experiments.ablation --seeds 3 4 --rows "s = [1, 4], SoftInfoNCE" "raw y"
    python -m experiments.ablation --quick              # 2 epochs, one seed: does it run?

A run is pretrain.py with one row's flags, in float32 so that all machines train alike, measured by
retrieval.py. experiments/results/ablation.csv gets a line per run, and the .md beside it the
tables. Without --rows the first table is made. Runs with a line in the csv are left out, so the
same command continues after an interruption. To repeat a run, delete its line and its folder. Give
one command at a time: each writes the whole csv.

"no speed" has as many epochs as the other rows, or twice as many, so that it encodes the same
number of clips. Speed 6 of the paper's Table 1 does not fit, because a clip of 1 s would take 6 s
of films of 4.5 s. --hide leaves links of sight and sound out of the films: see prepare/demo.py. The
settings stay, and the results have the csv ablation-hide-kind.csv (-rhythm.csv, -kind-rhythm.csv).
"""

import argparse
import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from prepare import demo
from retrieval import RANKS, chance
from support.files import write_atomic

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
LEVELS = "instance", "class"
WAYS = "video -> audio", "audio -> video"       # as in Table 3


# ---- many runs of the scripts; experiments/transfer.py uses these functions too

def run_script(name, flags, log):
    """Run a script of the top level without a GPU, and add its output to the file `log`.

    Raises ValueError if it fails.
    """
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, ROOT / name, *flags], stdout=file, stderr=file,
                              env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        raise ValueError(f"{name} ended with {done.returncode}: see {log}")


def run_all(jobs, lines, write):
    """Run the jobs {name: (function, *arguments)} in threads, one for each core.

    The scripts that a thread starts stay on its core. What a function returns is added to the lines
    of the csv, and write(lines) is called, which returns the tables. A ValueError that it raises is
    printed. At the end the tables are printed, and the program ends, with status 1 if a job failed.
    """
    cores, failures = os.sched_getaffinity(0), 0
    free = [{core} for core in cores]
    with ThreadPoolExecutor(len(cores), initializer=lambda: os.sched_setaffinity(0, free.pop())
                            ) as pool:
        futures = {pool.submit(*job): name for name, job in jobs.items()}
        try:
            for future in as_completed(futures):
                try:
                    lines += future.result()
                except ValueError as error:
                    failures += 1
                    print(f"error: {futures[future]}: {error}", file=sys.stderr, flush=True)
                else:
                    write(lines)
        finally:
            pool.shutdown(cancel_futures=True)
    if lines:
        print(write(lines))
    sys.exit(failures > 0)


def write_csv(lines, columns, tables, path):
    """Write the lines [{column: text}] of a csv, and beside it their tables, which it returns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(text.getvalue().encode(), path)
    path.with_suffix(".md").write_text(tables)
    return tables


def read_csv(path, columns):
    """The lines [{column: text}] of a csv. Without a file there are none.

    Ends the program with a sentence if the csv has other columns.
    """
    lines = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    if lines and list(lines[0]) != columns:
        sys.exit(f"error: {path} has other columns than this version writes ({', '.join(columns)}):"
                 " move it away, then give the same command again")
    return lines


def table(head, rows, by_chance=()):
    """The lines of a table in Markdown: head [text], rows {name: [text]}."""
    text = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    if by_chance:
        blank = " |" * (len(head) - len(by_chance))
        text.append(f"| chance | {' | '.join(by_chance)} |{blank}")
    return text + [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()]


def mean_of(values, deviation=statistics.stdev, sign=""):
    """'mean ± deviation', or the value if there is only one."""
    text = f"{statistics.mean(values):{sign}.1f}"
    return text + (f" ± {deviation(values):.1f}" if len(values) > 1 else "")


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5


# ---- what is measured of a run of pretrain.py

def measure(checkpoint):
    """{metric: %} of Table 3, by clip and by class, in a pool of n films, and {"clips": n}.

    Raises ValueError if retrieval.py fails, as it does if a film cannot be read.
    """
    run_script("retrieval.py", ["--checkpoint", str(checkpoint), "--max-failures", "0"],
               checkpoint.parent.with_suffix(".txt"))
    report = json.loads(checkpoint.with_name("retrieval.json").read_text())
    found = {f"{level}, {way}, R@{k}": 100 * report[f"{level}, {way}"][f"R@{k}"][0]
             for level in LEVELS for way in WAYS for k in RANKS}
    means = {f"{level} R@{k}": statistics.mean(found[f"{level}, {way}, R@{k}"] for way in WAYS)
             for level in LEVELS for k in RANKS}
    return found | means | {"clips": report["pool"]}


def chances(clips):
    """{metric: its value, as text, for a model that knows nothing} in a pool of so many clips."""
    labels, found = torch.arange(len(demo.KINDS)).repeat_interleave(clips // len(demo.KINDS)), {}
    for k, shares in chance(labels).items():
        for level, share in zip(LEVELS, shares):
            names = [f"{level} R@{k}", *(f"{level}, {way}, R@{k}" for way in WAYS)]
            found |= dict.fromkeys(names, f"{100 * share:.1f}")
    return found


# ---- the rows {name: flags of pretrain.py}

PLAIN = "--max-speed {} --affinity none"
SOFT = "--max-speed 4 --affinity clip --affinity-temperature 1"
BASE = "s = [1, 4], SoftInfoNCE"                # the row with which the others are compared
PAPER = {"no speed, InfoNCE": PLAIN.format(1),
         "no speed, InfoNCE, 30 epochs": PLAIN.format(1) + " --epochs 30",
         "s = [1, 2], InfoNCE": PLAIN.format(2),
         "s = [1, 4], InfoNCE": PLAIN.format(4),
         BASE: SOFT}
READINGS = {"shared speed": SOFT + " --same-speed",
            "temperature 0.1": SOFT.removesuffix("1") + "0.1",
            "raw y": SOFT + " --raw-affinity",
            "detached": SOFT + " --detach-affinity",
            "scope view": SOFT.replace("clip", "view"),
            "scope batch": SOFT.replace("clip", "batch"),
            "mapping linear": SOFT + " --mapping linear",
            "mapping mlp": SOFT + " --mapping mlp"}
ROWS = PAPER | READINGS
EQUAL = "no speed, InfoNCE", BASE               # for as many epochs
# With --data pretrain.py has the paper's settings. These are those of the built-in set.
BUILT_IN = "--arch r2plus1d_10 --frames 4 --fps 4 --size 32 --epochs 15 --batch-per-process 32"

COMPARED = ["class R@1", "instance R@5"]        # whose differences from the base are shown
METRICS = ["class R@1", "class R@5", "instance R@1", "instance R@5"]
TABLE_3 = {level: [f"{level}, {way}, R@{k}" for way in WAYS for k in RANKS] for level in LEVELS}
COLUMNS = ["row", "seed", "flags", *METRICS, *TABLE_3["instance"], *TABLE_3["class"], "clips"]


def run_row(name, seed, flags, out):
    """Start or continue one run of pretrain.py, measure it, and return [the line of the csv].

    Raises ValueError if a script fails, or if a file of the test part cannot be read.
    """
    run_script("pretrain.py", [*flags, "--out", str(out)], out.with_suffix(".txt"))
    values = measure(out / "checkpoint.pt")
    print(f"{name}, seed {seed}: "
          + ", ".join(f"{metric} {values[metric]:.2f}" for metric in METRICS), flush=True)
    line = {"row": name, "seed": str(seed), "flags": ROWS[name], "clips": str(values["clips"])}
    return [{column: line.get(column) or f"{values[column]:.2f}" for column in COLUMNS}]


def read_results(path):
    """The lines of an earlier csv whose rows still have the same flags."""
    return [line for line in read_csv(path, COLUMNS) if ROWS.get(line["row"]) == line["flags"]]


def write_results(lines, path):
    """Write the csv, sorted by row and seed, and the tables beside it, which are returned."""
    order = list(ROWS)
    lines.sort(key=lambda line: (order.index(line["row"]), int(line["seed"])))
    return write_csv(lines, COLUMNS, markdown(lines), path)


def markdown(lines):
    """The tables of the lines of the csv, means over seeds with chance: the paper's rows, the
    readings, and Table 3 for the paper's rows. Rows that were not run are left out."""
    ran = {line["row"] for line in lines}

    def values(name, metric):
        """A measure of a row by seed: {seed: value}."""
        return {line["seed"]: float(line[metric]) for line in lines if line["row"] == name}

    def cells(name, metrics, deviation):
        return [*(mean_of([*values(name, metric).values()], deviation) for metric in metrics),
                str(sum(line["row"] == name for line in lines))]

    def minus_base(name, metric):
        """The difference from the base, paired by seed."""
        base = values(BASE, metric)
        differences = [value - base[seed] for seed, value in values(name, metric).items()
                       if seed in base and name != BASE]
        return mean_of(differences, standard_error, "+") if differences else ""

    by_chance, text = chances(max(int(line["clips"]) for line in lines)), []
    for title, names in ("The paper's rows", PAPER), ("Open readings", READINGS):
        rows = {name: [*cells(name, METRICS, statistics.stdev),
                       *(minus_base(name, metric) for metric in COMPARED)]
                for name in names if name in ran}
        text += [f"## {title}", "", "In %, mean ± standard deviation over seeds. A difference is "
                 "paired by seed, mean ± standard error.", "",
                 *table([*METRICS, "seeds", *(f"{metric} minus that of {BASE}"
                                              for metric in COMPARED)], rows,
                        [by_chance[metric] for metric in METRICS]), ""] if rows else []
    for level, metrics in TABLE_3.items():
        rows = {name: cells(name, metrics, standard_error) for name in PAPER if name in ran}
        text += [f"## Table 3, {level}-level", "", "In %, mean ± standard error over seeds.", "",
                 *table([*(metric.removeprefix(f"{level}, ") for metric in metrics), "seeds"],
                        rows, [by_chance[metric] for metric in metrics]), ""]
    return "\n".join(text).strip() + "\n"


def parse(argv=None):
    """The arguments of the command line, and its jobs [(row, seed)]."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--hide", nargs="+", choices=demo.HIDDEN, default=(),
                   help="links of sight and sound to leave out of the films (none)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    p.add_argument("--rows", nargs="+", metavar="ROW", choices=ROWS,
                   help="(the paper's; with --hide: both of equal epochs)")
    p.add_argument("--quick", action="store_true",
                   help="2 epochs, the first seed, results in --out (off)")
    p.add_argument("--out", default="runs/ablation", help="folder of the runs (runs/ablation)")
    args = p.parse_args(argv)
    rows = args.rows or (EQUAL if args.hide else PAPER)
    return args, [(name, seed) for seed in args.seeds[:1 if args.quick else None]
                  for name in ROWS if name in rows]


def main(argv=None):
    """Run the command. The exit status is 1 if a run failed."""
    args, jobs = parse(argv)
    links = "-".join(["hide", *sorted(args.hide)] if args.hide else [])
    folder = Path(args.out) / links
    common, shorter, results = ["--precision", "fp32"], [], RESULTS
    if args.quick:
        folder /= "quick"
        shorter, results = ["--epochs", "2"], folder
        shutil.rmtree(folder, ignore_errors=True)       # it shows anew whether it runs
    folder.mkdir(parents=True, exist_ok=True)
    films = folder / ("films" if args.hide else "demo")
    demo.build(films, hide=args.hide)
    if args.hide:
        common += [*BUILT_IN.split(), "--data", str(films)]
    path = results / (f"ablation-{links}.csv" if args.hide else "ablation.csv")
    lines, runs = read_results(path), {}
    done = {(line["row"], int(line["seed"])) for line in lines}
    for name, seed in jobs:
        if (name, seed) not in done:
            flags = [*common, "--seed", str(seed), *ROWS[name].split(), *shorter]
            out = folder / f"{list(ROWS).index(name):02d}-{seed}"
            runs[f"{name}, seed {seed}"] = run_row, name, seed, flags, out
    run_all(runs, lines, partial(write_results, path=path))


if __name__ == "__main__":
    main()
