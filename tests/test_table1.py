"""The ablation: its rows are settings of pretrain.py, its table is the csv's means and deviations."""

import itertools
import json
import shutil
import statistics

import pytest
from test_pretrain import run

import pretrain
from experiments import table1
from prepare import scan


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


def test_retrieval_is_that_of_the_script(brief):
    run("--checkpoint", brief, "--clips", "2", script="retrieval.py")
    found, kept = table1.measure(brief), json.loads(brief.with_name("retrieval.json").read_text())
    for level, k in itertools.product(("instance", "class"), (1, 5)):
        ways = [kept[f"{level}, {way}"][f"R@{k}"][0] for way in ("audio -> video", "video -> audio")]
        assert found[f"{level} R@{k}"] == pytest.approx(50 * sum(ways))
    assert found.keys() == set(table1.METRICS) and all(0 <= value <= 100 for value in found.values())


def test_a_film_that_fails_ends_the_measurement(tree, brief, tmp_path):
    """Rows of the table measured on other films could not be compared."""
    rows = scan.scan(tree)
    next(row for row in rows if row["split"] == "test")["path"] = str(tmp_path / "gone.mp4")
    scan.write(rows, tmp_path / "manifest.csv")
    shutil.copy(brief, tmp_path)
    with pytest.raises(ValueError, match="1 of 24 videos failed, .*gone.mp4: No such file"):
        table1.measure(tmp_path / brief.name)


def test_markdown():
    lines = [{"row": name, "seed": str(seed), "flags": "", **{metric: str(value) for metric in table1.METRICS}}
             for name, values in (("s = [1, 4], SoftInfoNCE", (51.0, 52.0, 59.0)), ("raw y", (50.0, 53.0, 62.0)),
                                  ("s = [1, 4], InfoNCE, 30 epochs", (90.0,)), ("s = [1, 4], SoftInfoNCE, 30 epochs", (80.0,)))
             for seed, value in enumerate(values)]
    *_, base, soft, line, longer, _ = table1.markdown(lines).splitlines()
    assert base == "| chance | 12.5 | 49.0 | 0.4 | 2.2 |" + " 12.5 |" * 4 + " | |"
    assert soft.endswith("| 3 |  |")                      # differences by seed: -1, 1, 3
    assert line == "| raw y |" + f" 55.0 ± {statistics.stdev((50, 53, 62)):.1f} |" * len(table1.METRICS) + " 3 | +1.0 ± 1.2 |"
    assert longer.endswith("| 1 | +10.0 |")               # from SoftInfoNCE of the same length
