"""The scripts with their own settings on the built-in set: retrieval, and Table 2 in small.

Pre-training warms up for one epoch, as it did when the kept results were measured.

    python -m experiments.transfer              # three seeds, 27 minutes of a core each
    python -m experiments.transfer --seeds 3 4

For each seed it runs pretrain.py, retrieval.py, and finetune.py by four protocols, each from the
pre-trained encoder and from random weights. The same command continues after an interruption.
experiments/results/transfer.csv gets a line per result, and transfer.md the means over seeds.
"""

import argparse
import json
import statistics
import sys
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
    return [("pretrain.py", ["--warmup", "1", *common, str(run)], None),
            ("retrieval.py", ["--checkpoint", sources["pre-trained"]], None),
            *(("finetune.py", [*flags.split(), "--checkpoint", source, *common,
                               str(folder / f"s{seed}-{n}-{encoder}")], (name, encoder))
              for n, (name, flags) in enumerate(PROTOCOLS.items())
              for encoder, source in sources.items())]


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


def run_seed(seed, folder):
    """Run the scripts with a seed: the lines of the csv. Raises ValueError if one of them fails."""
    lines = []
    for script, flags, name in commands(seed, folder):
        run_script(script, flags, folder / f"s{seed}.txt")
        lines += [{"result": result, "encoder": encoder, "seed": str(seed),
                   "command": " ".join(["python", script, *flags]), "value": f"{value:.2f}"}
                  for (result, encoder), value in found(script, flags, name).items()]
    return lines


def read_results(path):
    """The lines of an earlier csv, of the seeds of which all results have today's commands.

    The commands may differ in --out, the folder of the runs.
    """
    def settings(words):
        return tuple(word for word in words if "/" not in word)

    by_seed = {}
    for line in read_csv(path, COLUMNS):
        by_seed.setdefault(int(line["seed"]), []).append(line)
    return [line for seed, lines in by_seed.items() for line in lines
            if {settings(line["command"].split()) for line in lines} == {
                settings(["python", script, *flags])
                for script, flags, _ in commands(seed, Path("runs")) if script != "pretrain.py"}]


def write_results(lines, path):
    """Write the csv, sorted by seed, and the table beside it."""
    lines.sort(key=lambda line: int(line["seed"]))
    write_csv(lines, COLUMNS, path)
    path.with_suffix(".md").write_text(markdown(lines))


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
    """Run the command. The exit status is 1 if a seed failed."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    p.add_argument("--out", default="runs/transfer", help="folder of the runs (runs/transfer)")
    args = p.parse_args(argv)
    folder, path = Path(args.out), RESULTS / "transfer.csv"
    folder.mkdir(parents=True, exist_ok=True)
    demo.build(folder / "demo")
    lines = read_results(path)
    done = {int(line["seed"]) for line in lines}

    def add(of_seed):
        lines.extend(of_seed)
        write_results(lines, path)

    failures = run_all({f"seed {seed}": (run_seed, seed, folder)
                        for seed in args.seeds if seed not in done}, add)
    if lines:
        print(markdown(lines))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
