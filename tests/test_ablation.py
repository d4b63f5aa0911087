"""Ablation and transfer: their rows are settings of the scripts, their tables are of their csv."""

import json
import os
import shutil
import statistics
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

import finetune
import pretrain
import retrieval
from experiments import ablation, transfer
from prepare import demo, scan

NAMES = ("max_speed", "affinity", "affinity_temperature", "raw_affinity", "detach_affinity",
         "mapping", "epochs", "same_speed")
SOFT = "s = [1, 4], SoftInfoNCE"


def settings(rows):
    """{row: the settings of pretrain.py that its flags make}."""
    parsed = {row: vars(pretrain.parse(flags.split())) for row, flags in rows.items()}
    return {row: {name: args[name] for name in NAMES} for row, args in parsed.items()}


def test_rows_are_settings_of_pretraining():
    paper, readings = settings(ablation.PAPER), settings(ablation.READINGS)
    assert [args["max_speed"] for args in paper.values()] == [1, 1, 2, 4, 4]            # Table 1
    assert [args["affinity"] for args in paper.values()] == ["none"] * 4 + ["clip"]
    assert [args["epochs"] for args in paper.values()] == [15, 30, 15, 15, 15]
    assert paper[SOFT] == settings({"": ""})[""]                # the defaults of pretrain.py
    for args in readings.values():              # each differs from SoftInfoNCE in one setting
        assert sum(args[name] != paper[SOFT][name] for name in NAMES) == 1, args
    hidden, built_in = (vars(pretrain.parse(flags))
                        for flags in (["--data", "films", *ablation.BUILT_IN.split()], []))
    differ = {name for name in built_in if hidden[name] != built_in[name]}
    assert differ == {"data", "batch_per_process"} and hidden["batch_per_process"] == 32


@pytest.mark.parametrize("flags,expected", [
    ([], [(row, seed) for seed in range(3) for row in ablation.PAPER]),
    (["--seeds", "7", "--rows", "s = [1, 2], InfoNCE", "raw y"],
     [("s = [1, 2], InfoNCE", 7), ("raw y", 7)]),
    (["--hide", "kind"], [(row, seed) for seed in range(3) for row in ablation.EQUAL]),
    (["--quick"], [(row, 0) for row in ablation.PAPER])])
def test_jobs(flags, expected):
    """The first table, unless others are named."""
    assert ablation.parse(flags)[1] == expected


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_runs_on_films_with_hidden_links_read_what_was_built(quick, tmp_path, monkeypatch):
    built, data = [], set()
    monkeypatch.setattr(demo, "build", lambda folder, hide: built.append((str(folder), hide)))
    monkeypatch.setattr(ablation, "run_all", lambda runs, *_: data.update(
        pretrain.parse(flags).data for *_, flags, _ in runs.values()))
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    ablation.main(["--hide", "rhythm", "kind", "--out", str(tmp_path), *quick])
    (folder, hide), = built
    assert data == {folder} and "hide-kind-rhythm" in folder and {*hide} == {"kind", "rhythm"}


def test_unknown_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        ablation.parse(["--rows", "raw z"])
    assert "invalid choice: 'raw z' (choose from " in capsys.readouterr().err


@pytest.mark.slow
def test_it_measures_the_features(brief):
    """Table 3 of 10 clips of a file, by clip and by class, and the means of both ways."""
    found = ablation.measure(brief)
    model, _, clips, _ = retrieval.load(
        Namespace(checkpoint=brief, data=None, split="test", clips=10))
    audio, video, rows = retrieval.extract(model, clips, torch.float32)
    labels = torch.tensor([int(row.label == "high") for row in rows])
    by_video = retrieval.recall_at_k(video, audio, labels)
    by_audio = retrieval.recall_at_k(audio, video, labels)
    for n, level in enumerate(("instance", "class")):
        for k in retrieval.RANKS:
            ways = 100 * by_video[k][n], 100 * by_audio[k][n]
            assert (found[f"{level}, video -> audio, R@{k}"],
                    found[f"{level}, audio -> video, R@{k}"]) == pytest.approx(ways)
            assert found[f"{level} R@{k}"] == pytest.approx(sum(ways) / 2)
    assert found.keys() >= {*ablation.COLUMNS} - {"row", "seed", "flags"}
    assert found["clips"] == 24


@pytest.mark.slow
def test_a_film_that_fails_ends_the_measurement(tree, brief, tmp_path):
    """Rows of the table that were measured on different films could not be compared."""
    rows = scan.scan(tree)
    next(row for row in rows if row["split"] == "test")["path"] = str(tmp_path / "gone.mp4")
    scan.write(rows, tmp_path / "manifest.csv")
    shutil.copy(brief, tmp_path)
    with pytest.raises(ValueError, match=f"retrieval.py ended with 1: see {tmp_path}.txt"):
        ablation.measure(tmp_path / brief.name)
    assert "gone.mp4: No such file" in tmp_path.with_suffix(".txt").read_text()


@pytest.mark.slow
def test_it_continues_from_its_csv_past_a_run_that_fails(tmp_path, monkeypatch, capsys):
    """Three seeds of the row are in the csv. pretrain.py refuses another, which is negative."""
    files = {f"{name}.{suffix}": (ablation.RESULTS / f"{name}.{suffix}").read_text()
             for name in ("ablation", "ablation-hide-kind", "ablation-hide-kind-rhythm")
             for suffix in ("csv", "md")}
    for name in files:
        shutil.copy(ablation.RESULTS / name, tmp_path)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    built = []                                  # no run gets as far as its data
    monkeypatch.setattr(demo, "build", lambda folder, hide: built.append((folder.name, [*hide])))
    for flags, status, name in (
            (["--rows", SOFT, "--seeds", "0", "1", "2", "-1"], 1, "ablation.md"),
            (["--hide", "kind"], 0, "ablation-hide-kind.md"),
            (["--hide", "rhythm", "kind"], 0, "ablation-hide-kind-rhythm.md")):
        with pytest.raises(SystemExit) as stop:
            ablation.main(["--out", str(tmp_path / "runs"), *flags])
        printed = capsys.readouterr()
        assert stop.value.code == status and printed.out.strip() == files[name].strip()
        assert printed.err.count(f"{SOFT}, seed -1: pretrain.py ended with 2: see "
                                 ) == printed.err.count("error") == status
    assert {name: (tmp_path / name).read_text() for name in files} == files
    assert built == [("demo", []), ("films", ["kind"]), ("films", ["rhythm", "kind"])]
    assert "--seed: '-1' is not" in (tmp_path / "runs" / "04--1.txt").read_text()


def test_each_job_has_a_core_of_its_own(tmp_path):
    """All cores are used at once, and no GPU."""
    (tmp_path / "script.py").write_text("""
import os, time
print(os.sched_getaffinity(0), repr(os.environ["CUDA_VISIBLE_DEVICES"]))
time.sleep(1)
""")

    def job(log):
        ablation.run_script(tmp_path / "script.py", [], log)
        return [log.read_text()]

    cores, lines = os.sched_getaffinity(0), []
    with pytest.raises(SystemExit) as stop:
        ablation.run_all({core: (job, tmp_path / str(core)) for core in cores}, lines, len)
    assert sorted(lines) == sorted(f"{{{core}}} ''\n" for core in cores) and not stop.value.code
    assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize("name,read,write", [
    ("ablation", ablation.read_results, ablation.write_results),
    ("transfer", partial(ablation.read_csv, columns=transfer.COLUMNS), transfer.write_results)])
def test_results_that_are_written_can_be_read(name, read, write, tmp_path):
    """The files of results are what their own lines make. A row of other flags is run again."""
    original, path = ablation.RESULTS / f"{name}.csv", tmp_path / f"{name}.csv"
    lines = read(original)
    write(sorted(lines, key=lambda line: line["seed"], reverse=True), path)
    assert path.read_text() == original.read_text() and read(path) == lines
    assert path.with_suffix(".md").read_text() == original.with_suffix(".md").read_text()
    if name != "transfer":
        write([lines[0] | {"flags": "--max-speed 3"}, *lines[1:]], path)
        assert read(path) == lines[1:]
    path.write_text(path.read_text().replace("seed,", "number,", 1))
    with pytest.raises(SystemExit, match=f"error: .*{name}.csv has other columns"):
        read(path)


def test_cells_are_means_over_seeds():
    """Those of a row of three seeds, of which the base has two. A single value has no ±."""
    columns = dict.fromkeys(ablation.COLUMNS, "9")
    lines = [columns | {"row": row, "seed": seed, "class R@1": value, "clips": "224"}
             for row, seed, value in (("raw y", "0", "50"), ("raw y", "1", "53"),
                                      ("raw y", "2", "62"), (SOFT, "0", "51"), (SOFT, "1", "52"))]
    deviation = statistics.stdev((50, 53, 62))
    line, = [line for line in ablation.markdown(lines).splitlines()
             if line.startswith("| raw y | ")]
    assert line.startswith(f"| raw y | 55.0 ± {deviation:.1f} | 9.0 ± 0.0 |")
    assert " | 3 | +0.0 ± 1.0 | " in line                       # of the seeds 0 and 1: -1 and 1
    assert ablation.markdown(lines[:1]).count("| raw y | 50.0 |") == 1
    assert "shared speed" not in ablation.markdown(lines)    # was not run


def test_each_protocol_runs_with_both_encoders(tmp_path, monkeypatch):
    parsed, outs, run = [], [], tmp_path / "s3"

    def run_script(name, flags, log):
        outs.append(Path(flags[-1]))
        if name == "pretrain.py":
            assert pretrain.parse(flags).data is None           # the built-in set
        else:
            args = finetune.parse(flags)
            assert args.seed == 3 and args.data is None
            assert args.checkpoint in ("none", str(run / "checkpoint.pt"))
            parsed.append((args.linear, args.fraction, args.checkpoint == "none"))
            outs[-1].mkdir()
            results = json.dumps({"mean": {"video top-1": len(parsed)}})
            (outs[-1] / "results.json").write_text(results)

    monkeypatch.setattr(transfer, "run_script", run_script)
    lines = transfer.run_seed(3, tmp_path)
    assert len(set(parsed)) == len(parsed) == 8
    assert len(set(outs)) == len(outs) == 9                     # no run writes over another
    found = {(line["result"], line["encoder"]): float(line["value"]) for line in lines}
    assert found["fine-tuned", "random"] == 2
    assert found["linear classifier on the frozen encoder", "pre-trained"] == 3
    assert len(found) == len(lines) == 8
    assert all({*line} == {*transfer.COLUMNS} for line in lines)
