"""Table 1 in small: the paper's rows and the readings that it leaves open, on two sets of videos.

    python -m experiments.ablation                      # 15 runs of 17 to 36 minutes of a core
    python -m experiments.ablation --hide kind          # 6 runs on films without that link
    python -m experiments.ablation --data grid.csv      # 24 runs of 17 minutes on a core each
    python -m experiments.ablation --seeds 3 4 --rows "s = [1, 4], SoftInfoNCE" "raw y"
    python -m experiments.ablation --quick              # 2 epochs, one seed: does it run?

A run is pretrain.py with one row's flags. experiments/results/ablation.csv, or ablation-grid.csv,
gets a line per run, and the .md beside it the tables. Without --rows the first table is made. Runs
with a line in the csv are left out, so the same command continues after an interruption. To repeat
a run, delete its line and its folder. Give one command at a time: each writes the whole csv.

Without --data the set is the built-in one, with pretrain.py's own settings, in float32 so that all
machines train alike: see both_levels. Speed 6 of the paper's Table 1 does not fit there, because a
clip of 1 s would take 6 s of films of 4.5 s. --hide leaves links of sight and sound out of its
films: see prepare/demo.py. The settings stay, and the results have the csv ablation-hide-kind.csv
(-rhythm.csv, -kind-rhythm.csv). --data is for a set in which timing alone links sight and sound,
GRID of docs/data.md, whose clips of 0.67 s fit speed 4 into 3 s: see timing. On both sets "no
speed" has as many epochs as the other rows, or twice as many, so that it encodes the same number of
clips.

Symbols: n test clips, D the width of z.
"""

import argparse
import csv
import io
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
from argparse import Namespace
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from augment import centre_crop
from data import read_clip
from prepare import demo
from prepare.weights import sound_input
from retrieval import RANKS, chance, embed, load, recall_at_k
from support.checkpoints import write_atomic
from support.processes import choose_precision, start

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
LEVELS = "instance", "class"
WAYS = "video -> audio", "audio -> video"       # as in Table 3
SPEEDS = 1, 2, 3, 4


# ---- many runs of the scripts; experiments/transfer.py uses these functions too

def run_script(name, flags, log):
    """Run a script of the top level, and add its output to the file `log`.

    Raises ValueError if it fails. Where the command that runs all jobs was killed, this process
    ends in place of starting another script.
    """
    parent = multiprocessing.parent_process()
    if parent and not parent.is_alive():
        os._exit(1)
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, ROOT / name, *flags], stdout=file, stderr=file)
    if done.returncode:
        raise ValueError(f"{name} ended with {done.returncode}: see {log}")


def take_core(free):
    """Keep this process and those that it starts to one core, off GPUs, and hide progress bars."""
    os.sched_setaffinity(0, {free.get()})
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.stderr = open(os.devnull, "w")


def run_all(jobs, lines, write):
    """Run the jobs {name: (function, *arguments)}, each on one core, and one on every core.

    GPUs are not used. What a function returns is added to the lines of the csv, and write(lines)
    is called, which returns the tables. A ValueError that it raises is printed. Any other error is
    raised here, when the jobs that have begun have ended. At the end the tables are printed, and
    the program ends, with status 1 if a job failed.
    """
    cores, failures = os.sched_getaffinity(0), 0
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    with ProcessPoolExecutor(len(cores), context, take_core, (free,)) as pool:
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


# ---- what is measured of a run of pretrain.py, on the test part of its data

def recall_names(level):
    """The names of the measures of Table 3 at a level."""
    return [f"{level}, {way}, R@{k}" for way in WAYS for k in RANKS]


def with_means(found):
    """Measures of Table 3 {name: %} of both ways, and their means {f"{level} R@{k}": %}."""
    means = {}
    for name, value in found.items():
        level, _, k = name.split(", ")
        means.setdefault(f"{level} {k}", []).append(value)
    return found | {name: statistics.mean(values) for name, values in means.items()}


def both_levels(checkpoint):
    """{metric: %}, by clip and by class, of retrieval.py. "clips" is the size n of its pool.

    Raises ValueError if the script fails, as it does if a film cannot be read.
    """
    run_script("retrieval.py", ["--checkpoint", str(checkpoint), "--max-failures", "0"],
               checkpoint.parent.with_suffix(".txt"))
    report = json.loads(checkpoint.with_name("retrieval.json").read_text())
    return with_means({f"{level}, {way}, R@{k}": 100 * report[f"{level}, {way}"][f"R@{k}"][0]
                       for level in LEVELS for way in WAYS for k in RANKS}
                      ) | {"clips": report["pool"]}


def by_clip(audio, video):
    """{metric: %}, by clip alone, of features (n, D)."""
    own = torch.arange(len(audio), device=audio.device)                                 # (n,)
    pairs = zip(WAYS, (recall_at_k(video, audio, own), recall_at_k(audio, video, own)))
    return with_means({f"instance, {way}, R@{k}": 100 * found[k][0]
                       for way, found in pairs for k in RANKS})


@torch.no_grad()
def timing(checkpoint):
    """{metric: %}: retrieval of the middle clip of each file, at speed 1 and at four speeds.

    "mixed" are those of a pool in which clip i has sound and video at speed 1 + i mod 4. "same
    speed" is the share of its 5 nearest that have the query's speed, which a model finds that hears
    and sees the speed alone. "loss" is that of about the last epoch of training, in % of the loss
    of a model that cannot tell clips apart, log(1 + K (N - 1)). "clips" is n. Raises ValueError if
    a film cannot be read.
    """
    device = start()
    dtype, _ = choose_precision("auto", device)
    model, settings, clips, _ = load(
        Namespace(checkpoint=checkpoint, data=None, split="test", clips=1))
    model = model.to(device).eval()
    z = torch.stack([embed_at(model, settings, clips, dtype, tau) for tau in SPEEDS])   # (4,2,n,D)
    own = torch.arange(len(clips), device=device)
    speeds = own % len(SPEEDS)                                                          # (n,)
    audio, video = z[speeds, :, own].unbind(1)                                          # (n, D) x 2
    nearest = torch.cat([(audio @ video.T).topk(5).indices, (video @ audio.T).topk(5).indices])
    same = speeds[nearest] == speeds.repeat(2)[:, None]                                 # (2 n, 5)
    N, K = settings.batch_per_process, 1 if settings.max_speed == 1 else 2
    return by_clip(*z[0]) | {"mixed R@5": by_clip(audio, video)["instance R@5"],
                             "mixed, same speed": 100 * same.double().mean().item(),
                             "loss": 100 * last_loss(checkpoint) / math.log(1 + K * (N - 1)),
                             "clips": len(clips)}


def embed_at(model, settings, clips, dtype, tau):
    """z of sound and of video of the middle of each file, both at speed tau: (2, n, D).

    Raises ValueError if a file cannot be read.
    """
    log_mel = sound_input(settings.sound).to(next(model.parameters()).device)
    z = []
    for row in clips.rows:
        t0 = row.start + max(0, row.duration - tau * clips.seconds) / 2
        video, audio = read_clip(row.path, t0, (tau,), (tau,), clips.frames, clips.fps, clips.size,
                                 centre_crop, row.stop)                 # (1, T, H, W, 3), (1, L)
        z.append(embed(model, log_mel, dtype, "z", video[None], audio[None]))       # (2, 1, D)
    return torch.cat(z, 1)


def last_loss(checkpoint):
    """The mean loss of about the last epoch of training, from a run's log.

    The first line that counts may cover some steps of the epoch before.
    """
    lines = map(json.loads, Path(checkpoint).with_name("log.jsonl").read_text().splitlines())
    events = [line for line in lines if "loss" in line]
    return statistics.mean(line["loss"] for line in events
                           if line["epoch"] > events[-1]["epoch"] - 1)


# ---- the rows {name: flags of pretrain.py}

PLAIN = "--max-speed {} --affinity none"
SOFT = "--max-speed 4 --affinity clip --affinity-temperature 1"
COOL = SOFT.removesuffix("1") + "0.1"
SHARED = " --same-speed"
BASE = "s = [1, 4], SoftInfoNCE"
PAPER = {"no speed, InfoNCE": PLAIN.format(1),
         "no speed, InfoNCE, 30 epochs": PLAIN.format(1) + " --epochs 30",
         "s = [1, 2], InfoNCE": PLAIN.format(2),
         "s = [1, 4], InfoNCE": PLAIN.format(4),
         BASE: SOFT}
READINGS = {"shared speed": SOFT + SHARED,
            "temperature 0.1": COOL,
            "raw y": SOFT + " --raw-affinity",
            "detached": SOFT + " --detach-affinity",
            "scope view": SOFT.replace("clip", "view"),
            "scope batch": SOFT.replace("clip", "batch"),
            "mapping linear": SOFT + " --mapping linear",
            "mapping mlp": SOFT + " --mapping mlp"}
SHORT = " --epochs 16"
TIMING = {"no speed, InfoNCE": PLAIN.format(1) + " --epochs 32",
          "no speed, InfoNCE, 16 epochs": PLAIN.format(1) + SHORT,
          "s = [1, 2], InfoNCE": PLAIN.format(2) + SHORT,
          "s = [1, 4], InfoNCE": PLAIN.format(4) + SHORT,
          "s = [1, 4], InfoNCE, shared speed": PLAIN.format(4) + SHARED + SHORT,
          "s = [1, 4], SoftInfoNCE, shared speed": SOFT + SHARED + SHORT,
          BASE: SOFT + SHORT,
          "s = [1, 4], SoftInfoNCE, temperature 0.1": COOL + SHORT}

# seeds: of a run without --seeds, none if it runs with --rows alone. base: the row with which the
# others are compared.
Table = namedtuple("Table", "title rows seeds base")
# flags: of pretrain.py, for all rows. metrics: columns of the tables. compared: the metrics whose
# differences from the base's are in the last columns. levels: of Table 3. measure: from a
# checkpoint to {metric: value}.
Study = namedtuple("Study", "flags tables metrics compared levels measure")
BUILT_IN = Study("--precision fp32",
                 [Table("The paper's rows", PAPER, range(3), BASE),
                  Table("Open readings", READINGS, (), BASE)],
                 ["class R@1", "class R@5", "instance R@1", "instance R@5"],
                 ["class R@1", "instance R@5"], LEVELS, both_levels)
EQUAL = "no speed, InfoNCE", BASE
HIDDEN = BUILT_IN._replace(         # with the settings of the built-in set
    flags="--precision fp32 --arch r2plus1d_10 --frames 4 --fps 4 --size 32 --epochs 15 "
    "--batch-per-process 32",
    tables=[Table("Equal epochs", {name: PAPER[name] for name in EQUAL}, range(3), BASE)])
LIPS = Study("--arch r2plus1d_10 --frames 8 --fps 12 --size 32 --batch-per-process 32",
             [Table("Timing alone", TIMING, range(3), "no speed, InfoNCE")],
             [*(f"instance R@{k}" for k in RANKS), "mixed R@5", "mixed, same speed", "loss"],
             ["instance R@5"], LEVELS[:1], timing)


def rows_of(study):
    """{row: flags} of all tables."""
    return {name: flags for _, rows, _, _ in study.tables for name, flags in rows.items()}


def columns(study):
    """The columns of the csv. "clips" is the size n of the pool, which decides chance."""
    table_3 = [name for level in study.levels for name in recall_names(level)]
    return ["row", "seed", "flags", *study.metrics, *table_3, "clips"]


def run_row(study, name, seed, flags, out):
    """Start or continue one run of pretrain.py, measure it, and return [the line of the csv].

    Raises ValueError if a script fails, or if a file of the test part cannot be read.
    """
    run_script("pretrain.py", [*flags, "--out", str(out)], out.with_suffix(".txt"))
    values = study.measure(out / "checkpoint.pt")
    print(f"{name}, seed {seed}: "
          + ", ".join(f"{metric} {values[metric]:.2f}" for metric in study.metrics), flush=True)
    line = {"row": name, "seed": str(seed), "flags": rows_of(study)[name],
            "clips": str(values["clips"])}
    return [{column: line.get(column) or f"{values[column]:.2f}" for column in columns(study)}]


def read_results(path, study):
    """The lines of an earlier csv whose rows still have the same flags."""
    rows = rows_of(study)
    return [line for line in read_csv(path, columns(study))
            if rows.get(line["row"]) == line["flags"]]


def write_results(lines, path, study):
    """Write the csv, sorted by row and seed, and the tables beside it, which are returned."""
    order = list(rows_of(study))
    lines.sort(key=lambda line: (order.index(line["row"]), int(line["seed"])))
    return write_csv(lines, columns(study), markdown(lines, study), path)


def chances(study, clips):
    """{metric: its value, as text, for a model that knows nothing} in a pool of so many clips."""
    kinds = clips if study is LIPS else len(demo.KINDS)
    found = {"loss": 1, "mixed, same speed": 1 / len(SPEEDS)}
    for k, shares in chance(torch.arange(kinds).repeat_interleave(clips // kinds)).items():
        for level, share in zip(LEVELS, shares):
            names = [f"{level} R@{k}", *(f"{level}, {way}, R@{k}" for way in WAYS)]
            found |= dict.fromkeys(names, share)
    found["mixed R@5"] = found["instance R@5"]
    return {name: f"{100 * share:.1f}" for name, share in found.items()}


def markdown(lines, study):
    """The tables of the lines of the csv, means over seeds with chance: those of the study, and
    Table 3 for the rows of the first. Rows that were not run are left out."""
    ran = {line["row"] for line in lines}

    def values(name, metric):
        """A measure of a row by seed: {seed: value}."""
        return {line["seed"]: float(line[metric]) for line in lines if line["row"] == name}

    def cells(name, metrics, deviation):
        return [mean_of([*values(name, metric).values()], deviation) for metric in metrics]

    def minus(name, base, metric):
        """The difference from the base, paired by seed."""
        of_base = values(base, metric)
        differences = [value - of_base[seed] for seed, value in values(name, metric).items()
                       if seed in of_base and name != base]
        return mean_of(differences, standard_error, "+") if differences else ""

    by_chance, text = chances(study, max(int(line["clips"]) for line in lines)), []
    for title, names, _, base in study.tables:
        if not ran.intersection(names):
            continue
        rows = {name: [*cells(name, study.metrics, statistics.stdev),
                       str(sum(line["row"] == name for line in lines)),
                       *(minus(name, base, metric) for metric in study.compared)]
                for name in names if name in ran}
        text += [f"## {title}", "", "In %, mean ± standard deviation over seeds. A difference is "
                 "paired by seed, mean ± standard error.", "",
                 *table([*study.metrics, "seeds",
                         *(f"{metric} minus that of {base}" for metric in study.compared)], rows,
                        [by_chance[metric] for metric in study.metrics]), ""]
    for level in study.levels:
        metrics = recall_names(level)
        rows = {name: [*cells(name, metrics, standard_error), str(len(values(name, metrics[0])))]
                for name in study.tables[0].rows if name in ran}
        text += [f"## Table 3, {level}-level", "", "In %, mean ± standard error over seeds.", "",
                 *table([*(metric.removeprefix(f"{level}, ") for metric in metrics), "seeds"],
                        rows, [by_chance[metric] for metric in metrics]), ""]
    return "\n".join(text).strip() + "\n"


def parse(argv=None):
    """The arguments of the command line, the study, and its jobs [(row, seed)]."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    films = p.add_mutually_exclusive_group()
    films.add_argument("--data", help="folder or manifest.csv of a set in which timing alone links "
                       "sight and sound (default: the built-in set)")
    films.add_argument("--hide", nargs="+", choices=demo.HIDDEN,
                       help="links of sight and sound to leave out of the built-in set (none)")
    p.add_argument("--seeds", type=int, nargs="+", help="(0 1 2)")
    p.add_argument("--rows", nargs="+", metavar="ROW", help="(those of the first table)")
    p.add_argument("--quick", action="store_true",
                   help="the first table, 2 epochs, the first seed, results in --out (off)")
    p.add_argument("--out", default="runs/ablation", help="folder of the runs (runs/ablation)")
    args = p.parse_args(argv)
    study = LIPS if args.data else HIDDEN if args.hide else BUILT_IN
    tables = study.tables[:1] if args.quick else study.tables
    rows = [name for table in tables for name in table.rows]
    if not set(args.rows or rows) <= set(rows):
        p.error(f"--rows: give some of {', '.join(map(repr, rows))}")
    jobs = [(name, seed) for table in tables if table.seeds or args.rows
            for seed in (args.seeds or table.seeds or range(3))[:1 if args.quick else None]
            for name in table.rows if name in (args.rows or rows)]
    return args, study, jobs


def main(argv=None):
    """Run the command. The exit status is 1 if a run failed."""
    args, study, jobs = parse(argv)
    folder, file, common = Path(args.out), "ablation.csv", study.flags.split()
    if args.data:
        data = Path(args.data).absolute()       # of a set grid, grid.csv or grid/manifest.csv
        name = data.parent.name if data.name == "manifest.csv" else data.stem
        folder, file = folder / name, f"ablation-{name}.csv"
        common += ["--data", args.data]
    if args.hide:
        folder = folder / "-".join(["hide", *sorted(args.hide)])
        file = f"ablation-{folder.name}.csv"
    results, shorter = RESULTS / file, []
    if args.quick:
        folder, shorter = folder / "quick", ["--epochs", "2"]
        results = folder / file
        shutil.rmtree(folder, ignore_errors=True)       # it shows anew whether it runs
    folder.mkdir(parents=True, exist_ok=True)
    if not args.data:
        films = folder / ("films" if args.hide else "demo")
        demo.build(films, hide=args.hide or ())
        common += ["--data", str(films)] if args.hide else []
    lines, rows, runs = read_results(results, study), rows_of(study), {}
    done = {(line["row"], int(line["seed"])) for line in lines}
    for name, seed in jobs:
        if (name, seed) not in done:
            flags = [*common, "--seed", str(seed), *rows[name].split(), *shorter]
            out = folder / f"{list(rows).index(name):02d}-{seed}"
            runs[f"{name}, seed {seed}"] = run_row, study, name, seed, flags, out
    run_all(runs, lines, partial(write_results, path=results, study=study))


if __name__ == "__main__":
    main()
