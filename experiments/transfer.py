"""The scripts with their own settings on the built-in set: retrieval, and Table 2 in small.

    python -m experiments.transfer              # three seeds
    python -m experiments.transfer --seeds 3 4

With each seed it runs pretrain.py, retrieval.py and finetune.py by four protocols, each from the
pre-trained encoder and from random weights. experiments/results/transfer.csv gets a line per
result, and transfer.md the means over seeds. Seeds whose results are in the csv are left out, so
the same command continues after an interruption. After a change of the scripts' own settings,
delete the csv.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

from experiments.ablation import (RESULTS, read_csv, run_all, run_script, spread, table,
                                  write_csv)
from prepare import demo

PROTOCOLS = {
    "fine-tuned": "",
    "linear classifier on the frozen encoder": "--linear",
    "fine-tuned on one video per class": "--fraction 0.0139 --train-clips 40",
    "linear classifier on one video per class": "--linear --fraction 0.0139 --train-clips 40"}
ENCODERS = "pre-trained", "random"
RECALLS = [(level, k, way) for level, k in (("instance", 5), ("class", 1))
           for way in ("audio -> video", "video -> audio")]
COLUMNS = ["result", "encoder", "seed", "command", "value"]


def commands(seed, folder):
    """The runs of a seed: [(script, flags, name)].

    name: (protocol, encoder) of a run of finetune.py, None for the other scripts.
    """
    run = folder / f"s{seed}"
    sources = {"pre-trained": str(run / "checkpoint.pt"), "random": "none"}
    common = ["--seed", str(seed), "--out"]
    runs = [("pretrain.py", [*common, str(run)], None),
            ("retrieval.py", ["--checkpoint", sources["pre-trained"]], None)]
    for n, (name, flags) in enumerate(PROTOCOLS.items()):
        for encoder, source in sources.items():
            out = str(folder / f"s{seed}-{n}-{encoder}")
            runs.append(("finetune.py", [*flags.split(), "--checkpoint", source, *common, out],
                         (name, encoder)))
    return runs


def found(script, flags, name):
    """The results of a run of `commands` that has ended: {(result, encoder): %}."""
    out = Path(flags[-1])                               # --out, or the checkpoint of retrieval.py
    if script == "retrieval.py":
        recall = json.loads(out.with_name("retrieval.json").read_text())
        return {(f"{level} R@{k}, {way}", "pre-trained"):
                100 * recall[f"{level}, {way}"][f"R@{k}"][0] for level, k, way in RECALLS}
    if script == "finetune.py":
        return {name: json.loads((out / "results.json").read_text())["mean"]["video top-1"]}
    return {}


def run_seed(seed, folder, done):
    """Run the commands of a seed: the lines of the csv but for the results that are `done`.

    Raises ValueError if a command fails.
    """
    lines = []
    for script, flags, name in commands(seed, folder):
        run_script(script, flags, folder / f"s{seed}.txt")
        lines += [{"result": result, "encoder": encoder, "seed": str(seed),
                   "command": " ".join(["python", script, *flags]), "value": f"{value:.2f}"}
                  for (result, encoder), value in found(script, flags, name).items()
                  if (result, encoder) not in done]
    return lines


def settings(command):
    """The words of a command but for paths: --out may be another folder."""
    return tuple(word for word in command.split() if "/" not in word)


def read_results(path):
    """The lines of an earlier csv whose commands are today's."""
    lines = read_csv(path, COLUMNS)
    today = {settings(" ".join(["python", script, *flags])) for line in lines
             for script, flags, _ in commands(int(line["seed"]), Path("runs"))}
    return [line for line in lines if settings(line["command"]) in today]


def write_results(lines, path):
    """Write the csv, sorted by seed, and the table beside it, which is returned."""
    lines.sort(key=lambda line: int(line["seed"]))
    write_csv(lines, COLUMNS, path)
    tables = markdown(lines)
    path.with_suffix(".md").write_text(tables)
    return tables


def markdown(lines):
    """The means and standard deviations over seeds."""
    def values(result, encoder):
        return [float(line["value"]) for line in lines
                if (line["result"], line["encoder"]) == (result, encoder)]

    rows = {}
    for result in [*(f"{level} R@{k}, {way}" for level, k, way in RECALLS), *PROTOCOLS]:
        trained, random = (spread(values(result, name), statistics.stdev) for name in ENCODERS)
        rows[result] = [trained, random if result in PROTOCOLS else "",
                        str(len(values(result, "pre-trained")))]
    return "\n".join(["In %, mean ± standard deviation over seeds.", "",
                      *table([*ENCODERS, "seeds"], rows)]) + "\n"


def main(argv=None):
    """Run the command. The exit status is 1 if a run failed."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    p.add_argument("--out", default="runs/transfer", help="folder of the runs (runs/transfer)")
    args = p.parse_args(argv)
    folder, path = Path(args.out), RESULTS / "transfer.csv"
    folder.mkdir(parents=True, exist_ok=True)
    demo.build(folder / "demo")
    lines, jobs = read_results(path), {}
    for seed in args.seeds:
        done = {(line["result"], line["encoder"]) for line in lines if line["seed"] == str(seed)}
        if len(done) < len(RECALLS) + len(PROTOCOLS) * len(ENCODERS):
            jobs[f"seed {seed}"] = run_seed, seed, folder, done
    run_all(jobs, lines, partial(write_results, path=path))


if __name__ == "__main__":
    main()
