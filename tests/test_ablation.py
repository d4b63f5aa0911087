"""Ablation and transfer: their rows are settings of the scripts, their tables are of their csv."""

import json
import math
import os
import shutil
import signal
import statistics
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Job, log_of, write_script

import finetune
import pretrain
import retrieval
from data import read_clip
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
    hidden, built_in = (vars(pretrain.parse(study.flags.split()
                             + ["--data", "films"] * (study is ablation.HIDDEN)))
                        for study in (ablation.HIDDEN, ablation.BUILT_IN))
    differ = {name for name in built_in if hidden[name] != built_in[name]}
    assert differ == {"data", "batch_per_process"} and hidden["batch_per_process"] == 32
    timing = settings(ablation.TIMING)
    assert {args["max_speed"] for args in timing.values()} == {1, 2, 4}
    assert len({tuple(args.values()) for args in timing.values()}) == 8


@pytest.mark.parametrize("flags,expected", [
    ([], [(row, seed) for seed in range(3) for row in ablation.PAPER]),
    (["--seeds", "7", "--rows", "s = [1, 2], InfoNCE", "raw y"],
     [("s = [1, 2], InfoNCE", 7), ("raw y", 7)]),
    (["--hide", "kind"], [(row, seed) for seed in range(3) for row in ablation.EQUAL]),
    (["--data", "grid.csv"], [(row, seed) for seed in range(3) for row in ablation.TIMING]),
    (["--quick"], [(row, 0) for row in ablation.PAPER])])
def test_jobs(flags, expected):
    """The first table, unless others are named."""
    assert ablation.parse(flags)[2] == expected


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
        ablation.parse(["--quick", "--rows", "raw y"])      # of the second table
    assert "--rows: give some of 'no speed, InfoNCE', " in capsys.readouterr().err


@pytest.mark.slow
def test_both_levels_are_those_of_the_features(brief):
    """Table 3 of 10 clips of a file, by clip and by class, and the means of both ways."""
    found = ablation.both_levels(brief)
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
    assert found.keys() >= {*ablation.columns(ablation.BUILT_IN)} - {"row", "seed", "flags"}
    assert found["clips"] == 24


@pytest.mark.slow
def test_features_at_a_speed(brief, monkeypatch):
    """At speed 1 they are those of retrieval.py, and at speed 2 those of twice the time."""
    model, settings, clips, _ = retrieval.load(
        Namespace(checkpoint=brief, data=None, split="test", clips=1))
    expected = torch.stack(retrieval.extract(model, clips, torch.float32)[:2])
    found = ablation.embed_at(model, settings, clips, torch.float32, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    calls = []
    monkeypatch.setattr(ablation, "read_clip",
                        lambda *arguments: calls.append(arguments) or read_clip(*arguments))
    ablation.embed_at(model, settings, clips, torch.float32, 2)
    for (path, t0, tau_v, tau_a, *_), row in zip(calls, clips.rows, strict=True):
        assert (path, tau_v, tau_a) == (row.path, (2,), (2,))
        assert t0 + clips.seconds == pytest.approx(row.duration / 2)


@pytest.mark.slow
@pytest.mark.parametrize("known", ["speed", "clip"])
def test_a_pool_of_mixed_speeds(brief, monkeypatch, known):
    """z that hold the speed alone find clips of their speed, and z of the clip find the clip."""
    def planted(model, settings, clips, dtype, tau):
        n = len(clips)
        noise = 0.01 * torch.randn(2, n, 40, generator=torch.Generator().manual_seed(tau))
        index = torch.full((n,), tau) if known == "speed" else torch.arange(n)
        device = next(model.parameters()).device
        return F.normalize(F.one_hot(index, 40) + noise, dim=2).to(device)

    monkeypatch.setattr(ablation, "embed_at", planted)
    found = ablation.timing(brief)              # 24 clips, 6 at each speed
    assert found.keys() >= {*ablation.columns(ablation.LIPS)} - {"row", "seed", "flags"}
    assert found["clips"] == 24
    loss = log_of(brief.parent)[-1]["loss"]     # of the one epoch
    assert found["loss"] == pytest.approx(100 * loss / math.log(1 + 2 * (4 - 1)))
    if known == "speed":
        assert found["mixed, same speed"] == 100 and found["mixed R@5"] > 60      # chance 5 of 6
    else:
        assert found["mixed R@5"] == 100 and found["mixed, same speed"] < 50


def test_the_log_gives_the_loss_of_the_last_epoch(tmp_path):
    events = (0.5, 4.0), (1.0, 3.0), (1.5, 2.0), (2.0, 1.0)
    lines = [{"step": 0}, *({"epoch": epoch, "loss": loss} for epoch, loss in events)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ablation.last_loss(tmp_path / "checkpoint.pt") == 1.5


@pytest.mark.slow
def test_a_film_that_fails_ends_the_measurement(tree, brief, tmp_path):
    """Rows of the table that were measured on different films could not be compared."""
    rows = scan.scan(tree)
    next(row for row in rows if row["split"] == "test")["path"] = str(tmp_path / "gone.mp4")
    scan.write(rows, tmp_path / "manifest.csv")
    shutil.copy(brief, tmp_path)
    with pytest.raises(ValueError, match="gone.mp4: No such file"):
        ablation.timing(tmp_path / brief.name)
    with pytest.raises(ValueError, match=f"retrieval.py ended with 1: see {tmp_path}.txt"):
        ablation.both_levels(tmp_path / brief.name)
    assert "gone.mp4: No such file" in tmp_path.with_suffix(".txt").read_text()


@pytest.mark.slow
def test_it_continues_from_its_csv_past_a_run_that_fails(tmp_path, monkeypatch, capsys):
    """Three seeds of the row are in the csv. pretrain.py refuses another, which is negative."""
    files = {f"{name}.{suffix}": (ablation.RESULTS / f"{name}.{suffix}").read_text()
             for name in ("ablation", "ablation-hide-kind", "ablation-grid")
             for suffix in ("csv", "md")}
    for name in files:
        shutil.copy(ablation.RESULTS / name, tmp_path)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    built = []                                  # no run gets as far as its data
    monkeypatch.setattr(demo, "build", lambda folder, hide: built.append((folder.name, [*hide])))
    for flags, status, name in (
            (["--rows", SOFT, "--seeds", "0", "1", "2", "-1"], 1, "ablation.md"),
            (["--hide", "kind"], 0, "ablation-hide-kind.md"),
            (["--data", "grid/manifest.csv"], 0, "ablation-grid.md")):
        with pytest.raises(SystemExit) as stop:
            ablation.main(["--out", str(tmp_path / "runs"), *flags])
        printed = capsys.readouterr()
        assert stop.value.code == status and printed.out.strip() == files[name].strip()
        assert printed.err.count(f"{SOFT}, seed -1: pretrain.py ended with 2: see "
                                 ) == printed.err.count("error") == status
    assert {name: (tmp_path / name).read_text() for name in files} == files
    assert built == [("demo", []), ("films", ["kind"])]
    assert "--seed: '-1' is not" in (tmp_path / "runs" / "04--1.txt").read_text()


@pytest.mark.slow
def test_no_run_begins_after_the_command_was_killed(tmp_path):
    """It is killed while the first of three scripts, on its only core, sleeps."""
    (tmp_path / "script.py").write_text("""
import pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
time.sleep(2)
pathlib.Path(sys.argv[1] + "-ended").touch()
""")
    command = Job(write_script(tmp_path / "command.py", f"""
        from experiments import ablation
        if __name__ == "__main__":
            job = ablation.run_script, {str(tmp_path / "script.py")!r}
            ablation.run_all({{n: (*job, [n], "log") for n in "abc"}}, [], len)
        """), cwd=tmp_path, core=min(os.sched_getaffinity(0)))
    command.wait_for((tmp_path / "a").exists)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    while not (tmp_path / "a-ended").exists():
        time.sleep(0.02)
    time.sleep(1)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name,read,write", [
    ("ablation", partial(ablation.read_results, study=ablation.BUILT_IN),
     partial(ablation.write_results, study=ablation.BUILT_IN)),
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
    columns = dict.fromkeys(ablation.columns(ablation.BUILT_IN), "9")
    lines = [columns | {"row": row, "seed": seed, "class R@1": value, "clips": "224"}
             for row, seed, value in (("raw y", "0", "50"), ("raw y", "1", "53"),
                                      ("raw y", "2", "62"), (SOFT, "0", "51"), (SOFT, "1", "52"))]
    deviation = statistics.stdev((50, 53, 62))
    line, = [line for line in ablation.markdown(lines, ablation.BUILT_IN).splitlines()
             if line.startswith("| raw y | ")]
    assert line.startswith(f"| raw y | 55.0 ± {deviation:.1f} | 9.0 ± 0.0 |")
    assert " | 3 | +0.0 ± 1.0 | " in line                       # of the seeds 0 and 1: -1 and 1
    assert ablation.markdown(lines[:1], ablation.BUILT_IN).count("| raw y | 50.0 |") == 1
    assert "shared speed" not in ablation.markdown(lines, ablation.BUILT_IN)    # was not run


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
