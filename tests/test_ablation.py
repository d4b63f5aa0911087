"""The ablation: its rows are settings of pretrain.py, and its table is computed from its csv."""

import itertools
import json
import shutil
import statistics

import pytest
from conftest import run_here

import pretrain
import retrieval
from experiments import ablation
from prepare import demo, scan


def test_rows_are_settings_of_pretraining():
    names = ("max_speed", "affinity", "affinity_temperature", "raw_affinity", "detach_affinity",
             "mapping", "epochs", "same_speed")
    seen = {}
    for row, flags in ablation.ROWS.items():
        args = vars(pretrain.parse(flags.split()))
        seen[row] = {name: args[name] for name in names}
    assert [seen[row]["max_speed"] for row in ablation.PAPER] == [1, 2, 4, 6, 4]     # Table 1
    assert [seen[row]["affinity"] for row in ablation.PAPER] == ["none"] * 4 + ["clip"]
    soft = seen["s = [1, 4], SoftInfoNCE"]
    for row in ablation.READINGS:                # each differs from SoftInfoNCE in one setting
        assert sum(seen[row][name] != soft[name] for name in names) == 1, row
    for row in ablation.LONGER:                  # each differs from its shorter row in its length
        assert seen[row] == seen[row.removesuffix(", 30 epochs")] | {"epochs": 30}


def test_retrieval_is_that_of_the_script(brief):
    assert run_here(retrieval, "--checkpoint", brief, "--clips", "2") == 0
    found = ablation.measure(brief)
    expected = json.loads(brief.with_name("retrieval.json").read_text())
    for level, k in itertools.product(("instance", "class"), (1, 5)):
        ways = [expected[f"{level}, {way}"][f"R@{k}"][0]
                for way in ("audio -> video", "video -> audio")]
        assert found[f"{level} R@{k}"] == pytest.approx(50 * sum(ways))
    assert found.keys() == set(ablation.METRICS)
    assert all(0 <= value <= 100 for value in found.values())


def test_a_film_that_fails_ends_the_measurement(tree, brief, tmp_path):
    """Rows of the table that were measured on different films could not be compared."""
    rows = scan.scan(tree)
    next(row for row in rows if row["split"] == "test")["path"] = str(tmp_path / "gone.mp4")
    scan.write(rows, tmp_path / "manifest.csv")
    shutil.copy(brief, tmp_path)
    with pytest.raises(ValueError, match="1 of 24 videos failed, .*gone.mp4: No such file"):
        ablation.measure(tmp_path / brief.name)


@pytest.mark.slow
def test_it_continues_from_its_csv_past_a_run_that_fails(tmp_path, monkeypatch, capsys):
    """Three seeds of the row are in the csv. pretrain.py refuses the fourth, which is negative."""
    names = "ablation.csv", "ablation.md"
    before = {name: (ablation.RESULTS / name).read_text() for name in names}
    shutil.copy(ablation.RESULTS / "ablation.csv", tmp_path)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    monkeypatch.setattr(demo, "build", lambda folder: None)      # no run gets as far as its data
    flags = ["--out", str(tmp_path / "runs"), "--rows", "raw y", "--seeds", "0", "1", "2", "-1"]
    monkeypatch.setattr("sys.argv", ["ablation", *flags])
    with pytest.raises(SystemExit) as stop:
        ablation.main()
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert printed.err.count("error: raw y, seed -1: pretrain.py ended with 2: see ") == 1
    assert printed.out.strip() == before["ablation.md"].strip()
    assert {name: (tmp_path / name).read_text() for name in names} == before
    assert "--seed: '-1' is not" in (tmp_path / "runs" / "06--1.txt").read_text()


def test_results_that_are_written_can_be_read(tmp_path):
    lines = ablation.read_results(ablation.RESULTS / "ablation.csv")
    ablation.write_results(lines, tmp_path / "ablation.csv")
    assert len(lines) == 51 and ablation.read_results(tmp_path / "ablation.csv") == lines
    changed = [lines[0] | {"flags": "--max-speed 3"}, *lines[1:]]
    ablation.write_results(changed, tmp_path / "ablation.csv")
    assert ablation.read_results(tmp_path / "ablation.csv") == lines[1:]


def test_markdown():
    values = {"s = [1, 4], SoftInfoNCE": (51.0, 52.0, 59.0), "raw y": (50.0, 53.0, 62.0),
              "s = [1, 4], InfoNCE, 30 epochs": (90.0,),
              "s = [1, 4], SoftInfoNCE, 30 epochs": (80.0,)}
    lines = [{"row": row, "seed": str(seed), "flags": "",
              **dict.fromkeys(ablation.METRICS, str(value))}
             for row, found in values.items() for seed, value in enumerate(found)]
    *_, base, soft, line, longer, _ = ablation.markdown(lines).splitlines()
    assert base == "| chance | 12.5 | 49.0 | 0.4 | 2.2 |" + " 12.5 |" * 4 + " | |"
    assert soft.endswith("| 3 |  |")             # differences by seed: -1, 1, 3
    deviation = statistics.stdev((50, 53, 62))
    cells = f" 55.0 ± {deviation:.1f} |" * len(ablation.METRICS)
    assert line == f"| raw y |{cells} 3 | +1.0 ± 1.2 |"
    assert longer.endswith("| 1 | +10.0 |")      # from SoftInfoNCE of the same length
