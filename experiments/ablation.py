"""Table 1 in small, on the built-in set: the paper's rows, and the readings that it leaves open.

    python -m experiments.ablation              # 54 runs of 3 to 15 minutes on a core each
    python -m experiments.ablation --seeds 3 4 5 --rows "s = [1, 4], SoftInfoNCE" "raw y"
    python -m experiments.ablation --quick      # the paper's rows, 2 epochs, one seed: does it run?

The same command continues after an interruption. A run is pretrain.py with its settings for the
built-in set, but at 6 frames per second, so that a clip lasts 0.67 s and speed 6 fits into the
4.5 s of a film. "No speed" encodes as many clips in 30 epochs as s = [1, 4] does in 15.

All measures are of the test part, on the mean of 2 clips per film. Retrieval compares the
projections z. Probes are linear classifiers on the encoder outputs y of video or of sound, fitted
on all labels of the train part (72 per class) or on two labels per class (mean of 5 draws), because
the probe of sound reaches 100 % with all. experiments/results/ablation.csv gets a line per run, and
ablation.md the means and deviations. docs/results.md discusses them.
"""

import argparse
import csv
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from prepare import demo
from retrieval import chance, extract, load, recall_at_k
from support.classification import fit_linear, subset
from support.processes import choose_precision, start
from support.run import write_atomic

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
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
LONGER = {f"{name}, 30 epochs": flags + " --epochs 30" for name, flags in PAPER.items()}
ROWS = PAPER | READINGS | LONGER
METRICS = ["class R@1", "class R@5", "instance R@1", "instance R@5", "video probe", "audio probe",
           "video probe, 2 labels", "audio probe, 2 labels"]
COLUMNS = ["row", "seed", "flags", *METRICS]


def run_row(name, seed, folder, epochs):
    """Start or continue one run of pretrain.py, and measure it: its line of the csv.

    Raises ValueError if pretrain.py fails.
    """
    out = folder / f"{list(ROWS).index(name):02d}-{seed}"
    flags = ["--seed", seed, "--fps", 6, "--epochs", epochs, *ROWS[name].split(), "--out", out]
    command = [sys.executable, ROOT / "pretrain.py", *map(str, flags)]
    with open(out.with_suffix(".txt"), "a") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log)
    if done.returncode:
        raise ValueError(f"pretrain.py ended with {done.returncode}: see {out.with_suffix('.txt')}")
    found = measure(out / "checkpoint.pt")
    return {"row": name, "seed": str(seed), "flags": ROWS[name],
            **{metric: f"{found[metric]:.2f}" for metric in METRICS}}


def measure(checkpoint):
    """{metric: %} of a checkpoint. Retrieval is averaged over both directions."""
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
    ways = [recall_at_k(*pair, labels["test"]) for pair in ((audio, video), (video, audio))]
    result = {f"{level} R@{k}": 50 * sum(way[k][n] for way in ways)
              for n, level in enumerate(("instance", "class")) for k in (1, 5)}
    draws = [[rows["train"].index(row) for row in subset(rows["train"], 2 / demo.TRAIN, draw)]
             for draw in range(5)]

    def probe(n, labelled):
        classifier = fit_linear(y["train"][n][labelled], labels["train"][labelled])
        answers = classifier(y["test"][n]).argmax(1)                            # (n,)
        return 100 * (answers == labels["test"]).double().mean().item()

    for n, name in enumerate(("audio probe", "video probe")):
        result[name] = probe(n, list(range(len(rows["train"]))))
        result[f"{name}, 2 labels"] = statistics.mean(probe(n, labelled) for labelled in draws)
    return result


def spread(values, deviation, sign=""):
    """'mean ± deviation', or the value if there is only one."""
    text = f"{statistics.mean(values):{sign}.1f}"
    return text + (f" ± {deviation(values):.1f}" if len(values) > 1 else "")


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5


def markdown(lines):
    """The table of lines of the csv: mean +- standard deviation over seeds, and chance.

    The last column is a row's class R@1 minus SoftInfoNCE's of the same seeds and length: mean +-
    standard error.
    """
    recall = {(line["row"], line["seed"]): float(line["class R@1"]) for line in lines}
    names = [*METRICS, "seeds", "class R@1 minus SoftInfoNCE's"]
    table = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    by_chance = chance(torch.arange(len(demo.KINDS)).repeat_interleave(demo.TEST))
    table.append("| chance | "
                 + " | ".join(f"{100 * by_chance[k][n]:.1f}" for n in (1, 0) for k in (1, 5))
                 + f" | {100 / len(demo.KINDS):.1f}" * 4 + " | | |")
    for name in ROWS:
        own = [line for line in lines if line["row"] == name]
        if not own:
            continue
        soft = "s = [1, 4], SoftInfoNCE" + ", 30 epochs" * (name in LONGER)
        differences = [recall[name, line["seed"]] - recall[soft, line["seed"]] for line in own
                       if name != soft and (soft, line["seed"]) in recall]
        cells = [spread([float(line[metric]) for line in own], statistics.stdev)
                 for metric in METRICS]
        last = spread(differences, standard_error, "+") if differences else ""
        table.append(f"| {' | '.join([name, *cells, str(len(own)), last])} |")
    return "\n".join(table) + "\n"


def read_results(path):
    """The lines of an earlier csv whose rows still have the same flags."""
    if not path.exists():
        return []
    lines = csv.DictReader(path.read_text().splitlines())
    return [line for line in lines if list(line) == COLUMNS and None not in line.values()
            and ROWS.get(line["row"]) == line["flags"]]


def write_results(lines, path):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(text.getvalue().encode(), path)


def take_core(free):
    """Keep this process and those that it starts to one core, and hide progress bars."""
    os.sched_setaffinity(0, free.get())
    sys.stderr = open(os.devnull, "w")


def run_all(jobs, folder, epochs):
    """Run the jobs [(row, seed)], on one core each, as many at a time as the machine has cores.

    Two runs side by side on a core each train 1.32 times as many clips per s as one run after the
    other on both cores. Yields (row, seed, line of the csv, error) as each ends. Either the line or
    the error is None.
    """
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put({core})
    with ProcessPoolExecutor(len(cores), context, take_core, (free,)) as pool:
        futures = {pool.submit(run_row, *job, folder, epochs): job for job in jobs}
        for future in as_completed(futures):
            try:
                yield *futures[future], future.result(), None
            except ValueError as error:
                yield *futures[future], None, error


def main():
    """Run the command. The exit status is 1 if a run failed."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                   help="(all of: %(choices)s)")
    p.add_argument("--quick", action="store_true",
                   help="the paper's rows, 2 epochs, the first seed, results in --out (off)")
    p.add_argument("--out", default="runs/ablation", help="folder of the runs (runs/ablation)")
    args = p.parse_args()
    folder, results, epochs = Path(args.out), RESULTS / "ablation.csv", 15
    if args.quick:
        folder, epochs, args.rows, args.seeds = folder / "quick", 2, list(PAPER), args.seeds[:1]
        results = folder / "ablation.csv"
    folder.mkdir(parents=True, exist_ok=True)
    demo.build(folder / "demo")

    lines, failures = read_results(results), 0
    done = {(line["row"], int(line["seed"])) for line in lines}
    jobs = [(name, seed) for seed in args.seeds for name in args.rows if (name, seed) not in done]
    for name, seed, line, error in run_all(jobs, folder, epochs):
        if error:
            failures += 1
            print(f"error: {name}, seed {seed}: {error}", file=sys.stderr, flush=True)
            continue
        lines.append(line)
        lines.sort(key=lambda line: (list(ROWS).index(line["row"]), int(line["seed"])))
        write_results(lines, results)
        measures = ", ".join(f"{metric} {line[metric]}" for metric in METRICS)
        print(f"{name}, seed {seed}: {measures}", flush=True)
    results.with_suffix(".md").write_text(markdown(lines))
    print(markdown(lines))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
