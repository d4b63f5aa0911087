"""Table 1 in small: the paper's rows and the readings that it leaves open, on two sets of videos.

    python -m experiments.ablation                      # 25 runs of 14 minutes on a core each
    python -m experiments.ablation --data grid.csv      # 24 runs of 17 minutes on a core each
    python -m experiments.ablation --seeds 5 6 --rows "s = [1, 4], SoftInfoNCE" "raw y"
    python -m experiments.ablation --quick              # 2 epochs, one seed: does it run?

A run is pretrain.py with one row's flags. experiments/results/ablation.csv, or ablation-grid.csv,
gets a line per run, and the .md beside it the tables. Without --rows the first table is made. Runs
with a line in the csv are left out, so the same command continues after an interruption. To repeat
a run, delete its line and its folder.

Without --data the set is the built-in one, at 6 frames per second, so that a clip lasts 0.67 s and
speed 6 fits into the 4.5 s of a film: see classes_and_clips. --data is for a set in which timing
alone links sight and sound, GRID of docs/data.md, whose clips of 0.67 s fit speed 4 into 3 s: see
timing. There "no speed" has as many epochs as the other rows, or twice as many, so that it encodes
the same number of clips.

Symbols: n test clips, C and D the widths of y and z.
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
from retrieval import RANKS, chance, embed, extract, load, recall_at_k
from support.checkpoints import write_atomic
from support.classification import fit_linear, subset
from support.processes import choose_precision, start

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
LEVELS = "instance", "class"
WAYS = "video -> audio", "audio -> video"       # as in Table 3
SPEEDS = 1, 2, 3, 4
PROBES = ("video probe", "audio probe", "video probe, 2 labels", "audio probe, 2 labels")


# ---- many runs of the scripts; experiments/transfer.py uses these functions too

def run_script(name, flags, log):
    """Run a script of the top level, and add its output to the file `log`.

    Raises ValueError if it fails.
    """
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
    """'mean ± deviation', or the value if there is only one, or 'not run'."""
    if not values:
        return "not run"
    text = f"{statistics.mean(values):{sign}.1f}"
    return text + (f" ± {deviation(values):.1f}" if len(values) > 1 else "")


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5


# ---- what is measured of a run of pretrain.py, on the test part of its data

def recall_names(level):
    """The names of the measures of Table 3 at a level."""
    return [f"{level}, {way}, R@{k}" for way in WAYS for k in RANKS]


def recalls(audio, video, labels):
    """Table 3 of features (n, D) in %, and the means of both directions: {metric: %}."""
    found = {}
    by_video, by_audio = recall_at_k(video, audio, labels), recall_at_k(audio, video, labels)
    for k in RANKS:
        for level, *shares in zip(LEVELS, by_video[k], by_audio[k]):
            percent = [100 * share for share in shares]
            found |= {f"{level}, {way}, R@{k}": x for way, x in zip(WAYS, percent)}
            found[f"{level} R@{k}"] = statistics.mean(percent)
    return found


def classes_and_clips(checkpoint):
    """{metric: %}: retrieval by z and linear classifiers of y, on the mean of 2 clips per film.

    A probe is a classifier of the video or of the sound, fitted on all labels of the train part or
    on two per class (mean of 5 draws), because that of sound reaches 100 % with all. "clips/s" is
    the rate of training, and "clips" is n. Raises ValueError if a film cannot be read.
    """
    device = start()
    dtype, _ = choose_precision("auto", device)
    y, rows, labels = {}, {}, {}
    for split in ("train", "test"):
        model, _, clips, _ = load(
            Namespace(checkpoint=checkpoint, data=None, split=split, clips=2))
        rows[split], names = clips.rows, sorted({row.label for row in clips.rows})
        labels[split] = torch.tensor([names.index(row.label) for row in clips.rows], device=device)
        model = model.to(device)
        model.l = torch.nn.Identity()           # y are encoder outputs, whatever the mapping was
        y[split] = extract(model, clips, dtype, "y", max_failures=0)[:2]        # (n, C) x 2
    audio, video, _ = extract(model, clips, dtype, max_failures=0)              # (n, D) x 2
    result = recalls(audio, video, labels["test"])

    def probe(n, chosen):
        labelled = [rows["train"].index(row) for row in chosen]
        classifier = fit_linear(y["train"][n][labelled], labels["train"][labelled])
        right = classifier(y["test"][n]).argmax(1) == labels["test"]            # (n,)
        return 100 * right.double().mean().item()

    draws = [subset(rows["train"], 2 / demo.TRAIN, draw) for draw in range(5)]
    for n, name in enumerate(("audio probe", "video probe")):
        result[name] = probe(n, rows["train"])
        result[f"{name}, 2 labels"] = statistics.mean(probe(n, draw) for draw in draws)
    return result | {"clips/s": from_log(checkpoint)[1], "clips": len(rows["test"])}


@torch.no_grad()
def timing(checkpoint):
    """{metric: %}: retrieval of the middle clip of each file, at speed 1 and at four speeds.

    "mixed" are those of a pool in which clip i has sound and video at speed 1 + i mod 4. "same
    speed" is the share of its 5 nearest that have the query's speed, which a model finds that hears
    and sees the speed alone. "loss" is that of about the last epoch of training, in % of the loss
    of a model that cannot tell clips apart, log(1 + K (N - 1)). "clips/s" is the rate of training,
    and "clips" is n. Raises ValueError if a film cannot be read.
    """
    device = start()
    dtype, _ = choose_precision("auto", device)
    model, settings, clips, _ = load(
        Namespace(checkpoint=checkpoint, data=None, split="test", clips=1))
    model, own = model.to(device).eval(), torch.arange(len(clips), device=device)
    z = torch.stack([embed_at(model, settings, clips, dtype, tau) for tau in SPEEDS])   # (4,2,n,D)
    found = recalls(*z[0], own)
    speeds = own % len(SPEEDS)                                                          # (n,)
    audio, video = z[speeds, :, own].unbind(1)                                          # (n, D) x 2
    nearest = torch.cat([(audio @ video.T).topk(5).indices, (video @ audio.T).topk(5).indices])
    same = speeds[nearest] == speeds.repeat(2)[:, None]                                 # (2 n, 5)
    N, K = settings.batch_per_process, 1 if settings.max_speed == 1 else 2
    loss, rate = from_log(checkpoint)
    return found | {"mixed R@5": recalls(audio, video, own)["instance R@5"],
                    "mixed, same speed": 100 * same.double().mean().item(),
                    "loss": 100 * loss / math.log(1 + K * (N - 1)), "clips/s": rate,
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


def from_log(checkpoint):
    """The mean loss of about the last epoch of training, and the median clips/s, from a run's log.

    The first line that counts may cover some steps of the epoch before.
    """
    lines = map(json.loads, Path(checkpoint).with_name("log.jsonl").read_text().splitlines())
    events = [line for line in lines if "loss" in line]
    first = events[-1]["epoch"] - 1
    return (statistics.mean(line["loss"] for line in events if line["epoch"] > first),
            statistics.median(line["clips_per_s"] for line in events))


# ---- the rows {name: flags of pretrain.py}

def for_epochs(number, rows, suffix=""):
    """The rows with this number of epochs, and with a suffix to their names."""
    return {name + suffix: f"{flags} --epochs {number}" for name, flags in rows.items()}


PLAIN = "--max-speed {} --affinity none"
SOFT = "--max-speed 4 --affinity clip --affinity-temperature 1"
COOL = SOFT.removesuffix("1") + "0.1"
SHARED = " --same-speed"
BASE = "s = [1, 4], SoftInfoNCE"
EQ_1 = {"no speed, InfoNCE": PLAIN.format(1),
        "s = [1, 2], InfoNCE": PLAIN.format(2),
        "s = [1, 4], InfoNCE": PLAIN.format(4),
        "s = [1, 6], InfoNCE": PLAIN.format(6),
        BASE: SOFT}
EQ_2 = {"temperature 0.1": COOL,
        "raw y": SOFT + " --raw-affinity",
        "detached": SOFT + " --detach-affinity",
        "scope view": SOFT.replace("clip", "view"),
        "scope batch": SOFT.replace("clip", "batch"),
        "mapping linear": SOFT + " --mapping linear",
        "mapping mlp": SOFT + " --mapping mlp"}
PAPER = for_epochs(30, EQ_1)
READINGS = for_epochs(30, EQ_2 | {"shared speed": SOFT + SHARED})
SHORT = for_epochs(15, EQ_1 | EQ_2, ", 15 epochs")
TIMING = for_epochs(32, {"no speed, InfoNCE": PLAIN.format(1)}) | for_epochs(16, {
    "no speed, InfoNCE, 16 epochs": PLAIN.format(1),
    "s = [1, 2], InfoNCE": PLAIN.format(2),
    "s = [1, 4], InfoNCE": PLAIN.format(4),
    "s = [1, 4], InfoNCE, shared speed": PLAIN.format(4) + SHARED,
    "s = [1, 4], SoftInfoNCE, shared speed": SOFT + SHARED,
    BASE: SOFT,
    "s = [1, 4], SoftInfoNCE, temperature 0.1": COOL})

# seeds: of a run without --seeds, none if it runs with --rows alone. base: the row with which the
# others are compared.
Table = namedtuple("Table", "title rows seeds base")
# flags: of pretrain.py, for all rows. metrics: columns of the tables. compared: the metric whose
# differences from the base's are in the last column. levels: of Table 3. measure: from a checkpoint
# to {metric: value}.
Study = namedtuple("Study", "flags tables metrics compared levels measure")
BUILT_IN = Study("--fps 6 --warmup 1",
                 [Table("The paper's rows", PAPER, range(5), BASE),
                  Table("Open readings", READINGS, (), BASE),
                  Table("15 epochs", SHORT, (), f"{BASE}, 15 epochs")],
                 ["class R@1", "class R@5", "instance R@1", "instance R@5", *PROBES],
                 "class R@1", LEVELS, classes_and_clips)
LIPS = Study("--arch r2plus1d_10 --frames 8 --fps 12 --size 32 --batch-per-process 32",
             [Table("Timing alone", TIMING, range(3), "no speed, InfoNCE")],
             [*(f"instance R@{k}" for k in RANKS), "mixed R@5", "mixed, same speed", "loss"],
             "instance R@5", LEVELS[:1], timing)


def rows_of(study):
    """{row: flags} of all tables."""
    return {name: flags for _, rows, _, _ in study.tables for name, flags in rows.items()}


def columns(study):
    """The columns of the csv. "clips" is the size n of the pool, which decides chance."""
    table_3 = [name for level in study.levels for name in recall_names(level)]
    return ["row", "seed", "flags", *study.metrics, *table_3, "clips/s", "clips"]


def run_row(study, name, seed, flags, out):
    """Start or continue one run of pretrain.py, measure it, and return [the line of the csv].

    Raises ValueError if pretrain.py fails, or if a file of the test part cannot be read.
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
    kinds = len(demo.KINDS) if study is BUILT_IN else clips
    found = dict.fromkeys(PROBES, 1 / kinds) | {"loss": 1, "mixed, same speed": 1 / len(SPEEDS)}
    for k, shares in chance(torch.arange(kinds).repeat_interleave(clips // kinds)).items():
        for level, share in zip(LEVELS, shares):
            names = [f"{level} R@{k}", *(f"{level}, {way}, R@{k}" for way in WAYS)]
            found |= dict.fromkeys(names, share)
    found["mixed R@5"] = found["instance R@5"]
    return {name: f"{100 * share:.1f}" for name, share in found.items()}


def markdown(lines, study):
    """The tables of the lines of the csv, means over seeds with chance: those of the study, and
    Table 3 for the rows of the first."""
    def values(name, metric):
        """A measure of the lines of a row that have it, by seed: {seed: value}."""
        return {line["seed"]: float(line[metric]) for line in lines
                if line["row"] == name and line[metric]}

    def cells(name, metrics, deviation):
        return [mean_of([*values(name, metric).values()], deviation) for metric in metrics]

    by_chance, text = chances(study, max(int(line["clips"]) for line in lines)), []
    for title, names, _, base in study.tables:
        of_base, rows = values(base, study.compared), {}
        for name in names:
            differences = [value - of_base[seed] for seed, value
                           in values(name, study.compared).items() if seed in of_base]
            rows[name] = [*cells(name, study.metrics, statistics.stdev),
                          str(sum(line["row"] == name for line in lines)),
                          "" if name == base or not differences
                          else mean_of(differences, standard_error, "+")]
        text += [f"## {title}", "", "In %, mean ± standard deviation over seeds. The last column "
                 "is paired by seed, mean ± standard error.", "",
                 *table([*study.metrics, "seeds", f"{study.compared} minus that of {base}"], rows,
                        [by_chance[metric] for metric in study.metrics]), ""]
    for level in study.levels:
        metrics = recall_names(level)
        rows = {name: [*cells(name, metrics, standard_error), str(len(values(name, metrics[0])))]
                for name in study.tables[0].rows}
        text += [f"## Table 3, {level}-level", "", "In %, mean ± standard error over seeds.", "",
                 *table([*(metric.removeprefix(f"{level}, ") for metric in metrics), "seeds"],
                        rows, [by_chance[metric] for metric in metrics]), ""]
    return "\n".join(text).strip() + "\n"


def parse(argv=None):
    """The arguments of the command line, the study, and its jobs [(row, seed)]."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--data", help="folder or manifest.csv of a set in which timing alone links "
                   "sight and sound (default: the built-in set)")
    p.add_argument("--seeds", type=int, nargs="+",
                   help="(0 to 4 for the paper's rows, 0 to 2 for those of --data and --rows)")
    p.add_argument("--rows", nargs="+", metavar="ROW", help="(those of the first table)")
    p.add_argument("--quick", action="store_true",
                   help="the first table, 2 epochs, the first seed, results in --out (off)")
    p.add_argument("--out", default="runs/ablation", help="folder of the runs (runs/ablation)")
    args = p.parse_args(argv)
    study = LIPS if args.data else BUILT_IN
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
    results, shorter = RESULTS / file, []
    if args.quick:
        folder, shorter = folder / "quick", ["--epochs", "2"]
        results = folder / file
        shutil.rmtree(folder, ignore_errors=True)       # it shows anew whether it runs
    folder.mkdir(parents=True, exist_ok=True)
    if not args.data:
        demo.build(folder / "demo")
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
