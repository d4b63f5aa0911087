"""Table 2 in small: pretrain.py and finetune.py with their own settings on the built-in set.

    python -m experiments.transfer              # three seeds
    python -m experiments.transfer --seeds 3 4

With each seed it runs pretrain.py, and finetune.py by four protocols, each from the pre-trained
encoder and from random weights. experiments/results/transfer.csv gets a line per result, and
transfer.md the means over seeds. Seeds whose results are in the csv are left out, so the same
command continues after an interruption. After a change of the scripts' own settings, delete the
csv.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from experiments.ablation import (RESULTS, mean_of, read_csv, run_all, run_script, table,
                                  write_csv)
from prepare import demo

PROTOCOLS = {
    "fine-tuned": "",
    "linear classifier on the frozen encoder": "--linear",
    "fine-tuned on one video per class": "--fraction 0.0139 --train-clips 40",
    "linear classifier on one video per class": "--linear --fraction 0.0139 --train-clips 40"}
ENCODERS = "pre-trained", "random"
COLUMNS = ["result", "encoder", "seed", "command", "value"]


def run_seed(seed, folder):
    """Run the scripts with a seed: the lines of the csv. Raises ValueError if one fails."""
    out, lines = folder / f"s{seed}", []
    common = ["--seed", str(seed), "--out"]

    def run(script, *flags):
        run_script(script, flags, folder / f"s{seed}.txt")
        return {"seed": str(seed), "command": " ".join(["python", script, *flags])}

    run("pretrain.py", *common, str(out))
    sources = {"pre-trained": str(out / "checkpoint.pt"), "random": "none"}
    for n, (protocol, flags) in enumerate(PROTOCOLS.items()):
        for encoder, source in sources.items():
            out = folder / f"s{seed}-{n}-{encoder}"
            line = run("finetune.py", *flags.split(), "--checkpoint", source, *common, str(out))
            value = json.loads((out / "results.json").read_text())["mean"]["video top-1"]
            lines.append(line | {"result": protocol, "encoder": encoder, "value": f"{value:.2f}"})
    return lines


def write_results(lines, path):
    """Write the csv, sorted by seed, and the table beside it, which is returned."""
    lines.sort(key=lambda line: int(line["seed"]))
    return write_csv(lines, COLUMNS, markdown(lines), path)


def markdown(lines):
    """The means and standard deviations over seeds."""
    def values(result, encoder):
        return [float(line["value"]) for line in lines
                if (line["result"], line["encoder"]) == (result, encoder)]

    rows = {result: [*(mean_of(values(result, name)) for name in ENCODERS),
                     str(len(values(result, "pre-trained")))] for result in PROTOCOLS}
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
    lines = read_csv(path, COLUMNS)
    jobs = {f"seed {seed}": (run_seed, seed, folder) for seed in args.seeds
            if str(seed) not in {line["seed"] for line in lines}}
    run_all(jobs, lines, partial(write_results, path=path))


if __name__ == "__main__":
    main()
