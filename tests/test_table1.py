"""The ablation: its rows are settings of pretrain.py, its table is the csv's means and deviations."""

import csv
import statistics

import pretrain
from experiments import table1


def test_rows_are_settings_of_pretraining():
    seen = {}
    for name, flags in table1.ROWS.items():
        args = vars(pretrain.parse(flags.split()))
        seen[name] = {key: args[key] for key in ("max_speed", "affinity", "affinity_temperature", "raw_affinity",
                                                 "detach_affinity", "mapping", "epochs")}
    assert [seen[name]["max_speed"] for name in table1.PAPER] == [1, 2, 4, 6, 4]      # the paper's Table 1
    assert [seen[name]["affinity"] for name in table1.PAPER] == ["none"] * 4 + ["clip"]
    soft = seen["s = [1, 4], SoftInfoNCE"]
    for name in table1.OPEN:                              # each differs from SoftInfoNCE in one setting
        assert sum(seen[name][key] != soft[key] for key in soft) == 1, name
    for name in table1.LONGER:                            # each differs from the row of its name in its length
        assert seen[name] == seen[name.removesuffix(", 30 epochs")] | {"epochs": 30}


def test_markdown(tmp_path):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["row", "seed", "flags", *table1.METRICS])
        writer.writeheader()
        for seed, value in enumerate((50.0, 53.0, 62.0)):
            writer.writerow({"row": "raw y", "seed": seed, "flags": "", **{metric: value for metric in table1.METRICS}})
    *_, base, line = table1.markdown(tmp_path / "t.csv").splitlines()
    assert base == "| chance | 12.5 | 49.0 | 0.4 | 2.2 |" + " 12.5 |" * 4 + " |"
    assert line == "| raw y |" + f" 55.0 ± {statistics.stdev((50, 53, 62)):.1f} |" * len(table1.METRICS) + " 3 |"
