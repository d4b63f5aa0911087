"""Ablation and transfer: their rows are settings of the scripts, their tables are of their csv."""

import json
import math
import shutil
import statistics
from argparse import Namespace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import log_of, run_here

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
    assert [args["max_speed"] for args in paper.values()] == [1, 2, 4, 6, 4]            # Table 1
    assert [args["affinity"] for args in paper.values()] == ["none"] * 4 + ["clip"]
    for args in readings.values():              # each differs from SoftInfoNCE in one setting
        assert sum(args[name] != paper[SOFT][name] for name in NAMES) == 1, args
    for row, args in settings(ablation.SHORT).items():      # differs from its row in its length
        assert args == (paper | readings)[row.removesuffix(", 15 epochs")] | {"epochs": 15}
    timing = settings(ablation.TIMING)
    assert {args["max_speed"] for args in timing.values()} == {1, 2, 4}
    assert len({tuple(args.values()) for args in timing.values()}) == 8


@pytest.mark.parametrize("flags,expected", [
    ([], [*((row, seed) for seed in range(5) for row in ablation.PAPER),
          *((row, seed) for seed in range(3) for row in ablation.READINGS)]),
    (["--seeds", "7", "--rows", "s = [1, 2], InfoNCE", "raw y, 15 epochs"],
     [("s = [1, 2], InfoNCE", 7), ("raw y, 15 epochs", 7)]),
    (["--data", "grid.csv"], [(row, seed) for seed in range(3) for row in ablation.TIMING]),
    (["--quick"], [(row, 0) for row in ablation.PAPER]),
    (["--rows", "no such row"], "--rows 'no such row': give some of 'no speed, InfoNCE', "),
    (["--quick", "--rows", "raw y"], "--quick makes rows of the first table alone: ")])
def test_jobs(flags, expected, capsys):
    """None of 15 epochs unless they are named."""
    if isinstance(expected, list):
        assert ablation.parse(flags)[2] == expected
        return
    with pytest.raises(SystemExit):
        ablation.parse(flags)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("end", ["", ".csv", "/manifest.csv"])
def test_name_of_a_set(end):
    assert ablation.name_of(f"a/grid{end}") == "grid"


@pytest.mark.slow
def test_retrieval_is_that_of_the_script(brief):
    """Table 3 by retrieval.py with 2 clips of a file, and the means of both ways."""
    assert run_here(retrieval, "--checkpoint", brief, "--clips", "2") == 0
    printed = json.loads(brief.with_name("retrieval.json").read_text())
    found = ablation.classes_and_clips(brief)
    names = {*ablation.PROBES, "clips/s", "clips"}
    for level in ablation.LEVELS:
        for k in retrieval.RANKS:
            both = {f"{level}, {way}, R@{k}": 100 * printed[f"{level}, {way}"][f"R@{k}"][0]
                    for way in ablation.WAYS}
            both[f"{level} R@{k}"] = sum(both.values()) / 2
            assert {name: found[name] for name in both} == pytest.approx(both)
            names |= both.keys()
    assert found.keys() == names and found["clips"] == 24
    assert all(0 <= found[name] <= 100 for name in ablation.PROBES)


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
    events = (0.5, 4.0, 1.0), (1.0, 3.0, 5.0), (1.5, 2.0, 6.0), (2.0, 1.0, 7.0)
    lines = [{"step": 0}, *(dict(zip(("epoch", "loss", "clips_per_s"), event)) for event in events)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ablation.from_log(tmp_path / "checkpoint.pt") == (1.5, 5.5)


@pytest.mark.slow
def test_a_film_that_fails_ends_the_measurement(tree, brief, tmp_path):
    """Rows of the table that were measured on different films could not be compared."""
    rows = scan.scan(tree)
    next(row for row in rows if row["split"] == "test")["path"] = str(tmp_path / "gone.mp4")
    scan.write(rows, tmp_path / "manifest.csv")
    shutil.copy(brief, tmp_path)
    with pytest.raises(ValueError, match="1 of 24 videos failed, .*gone.mp4: No such file"):
        ablation.classes_and_clips(tmp_path / brief.name)
    with pytest.raises(ValueError, match="gone.mp4: No such file"):
        ablation.timing(tmp_path / brief.name)


@pytest.mark.slow
def test_it_continues_from_its_csv_past_a_run_that_fails(tmp_path, monkeypatch, capsys):
    """Three seeds of the row are in the csv. pretrain.py refuses the fourth, which is negative."""
    names = "ablation.csv", "ablation.md"
    before = {name: (ablation.RESULTS / name).read_text() for name in names}
    shutil.copy(ablation.RESULTS / "ablation.csv", tmp_path)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    monkeypatch.setattr(demo, "build", lambda folder: None)      # no run gets as far as its data
    with pytest.raises(SystemExit) as stop:
        ablation.main(["--out", str(tmp_path / "runs"), "--rows", "raw y, 15 epochs",
                       "--seeds", "0", "1", "2", "-1"])
    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert printed.err.count("raw y, 15 epochs, seed -1: pretrain.py ended with 2: see ") == 1
    assert printed.out.strip() == before["ablation.md"].strip()
    assert {name: (tmp_path / name).read_text() for name in names} == before
    assert "--seed: '-1' is not" in (tmp_path / "runs" / "19--1.txt").read_text()


def kept(name, path, read, write):
    """Read a kept csv, and write it with its tables to `path`: nothing changes. Its lines."""
    original = ablation.RESULTS / f"{name}.csv"
    lines = read(original)
    write(lines, path)
    assert path.read_text() == original.read_text() and read(path) == lines
    assert path.with_suffix(".md").read_text() == original.with_suffix(".md").read_text()
    return lines


@pytest.mark.parametrize("study,name", [(ablation.BUILT_IN, "ablation"),
                                        (ablation.LIPS, "ablation-grid")])
def test_results_that_are_written_can_be_read(study, name, tmp_path):
    """A result of other flags is measured again."""
    read, write = (partial(function, study=study)
                   for function in (ablation.read_results, ablation.write_results))
    path = tmp_path / f"{name}.csv"
    lines = kept(name, path, read, write)
    write([lines[0] | {"flags": "--max-speed 3"}, *lines[1:]], path)
    assert read(path) == lines[1:]
    path.write_text(path.read_text().replace("seed,", "number,", 1))
    with pytest.raises(SystemExit, match=f"error: .*{name}.csv has other columns"):
        read(path)


def test_a_result_is_measured_again_if_its_command_has_changed(tmp_path):
    path = tmp_path / "transfer.csv"
    lines = kept("transfer", path, transfer.read_results, transfer.write_results)
    path.write_text(path.read_text().replace("runs/transfer/", "/elsewhere/")
                    .replace("--seed 1", "--seed 1 --lr 2", 1))
    again = transfer.read_results(path)                     # --out may be another folder
    assert len(again) == len(lines) - 1 and not any("--lr" in line["command"] for line in again)


def test_markdown():
    columns = dict.fromkeys(ablation.columns(ablation.BUILT_IN), "")
    values = {SOFT: (51.0, 52.0, 59.0), "raw y": (50.0, 53.0, 62.0)}
    lines = [columns | dict.fromkeys(ablation.BUILT_IN.metrics, str(value))
             | {"row": row, "seed": str(seed), "clips": "224", "class, video -> audio, R@1": value}
             for row, found in values.items() for seed, value in enumerate(found)]
    text = ablation.markdown(lines, ablation.BUILT_IN)
    table = {line.split(" | ")[0]: line for line in text.splitlines()[::-1]}
    assert table["| chance"].startswith("| chance | 12.5 | 49.0 | 0.4 | 2.2 |" + " 12.5 |" * 4)
    assert table[f"| {SOFT}"].endswith("| 3 |  |")
    deviation = statistics.stdev((50, 53, 62))  # the differences by seed: -1, 1, 3
    cells = f" 55.0 ± {deviation:.1f} |" * len(ablation.BUILT_IN.metrics)
    assert table["| raw y"] == f"| raw y |{cells} 3 | +1.0 ± 1.2 |"
    assert table["| detached"] == "| detached |" + " not run |" * 8 + " 0 |  |"
    by_class = text[text.index("## Table 3, class-level"):]
    error = statistics.stdev((51, 52, 59)) / 3 ** 0.5
    assert f"| {SOFT} | 54.0 ± {error:.1f} | not run |" in by_class


def test_markdown_of_transfer():
    lines = [{"result": result, "encoder": encoder, "seed": seed, "command": "", "value": value}
             for result, encoder, seed, value in (
                 ("class R@1, audio -> video", "pre-trained", "0", "80"),
                 ("class R@1, audio -> video", "pre-trained", "1", "90"),
                 ("fine-tuned", "pre-trained", "0", "70"), ("fine-tuned", "random", "0", "60"))]
    text = transfer.markdown(lines)
    deviation = statistics.stdev((80, 90))
    assert f"| class R@1, audio -> video | 85.0 ± {deviation:.1f} |  | 2 |" in text
    assert "| fine-tuned | 70.0 | 60.0 | 1 |" in text
    assert "| linear classifier on the frozen encoder | not run | not run | 0 |" in text


def test_chance_is_that_of_the_pool():
    found = ablation.chances(ablation.LIPS, 200)
    expected = {"instance R@1": "0.5", "instance R@5": "2.5", "instance R@20": "10.0",
                "mixed R@5": "2.5", "mixed, same speed": "25.0", "loss": "100.0"}
    assert {name: found[name] for name in expected} == expected


def test_each_protocol_runs_with_both_encoders(tmp_path):
    parsed, outs = [], set()
    for script, flags, name in transfer.commands(3, tmp_path):
        args = {"pretrain.py": pretrain, "retrieval.py": retrieval,
                "finetune.py": finetune}[script].parse(flags)
        assert args.data is None                # the built-in set
        outs.add(flags[-1])
        if script == "finetune.py":
            parsed.append((args.linear, args.fraction, args.checkpoint == "none"))
            assert args.seed == 3
            assert args.checkpoint == {"random": "none",
                                       "pre-trained": str(tmp_path / "s3/checkpoint.pt")}[name[1]]
    assert len(set(parsed)) == len(parsed) == 8
    assert len(outs) == 10                      # no run writes over another


@pytest.mark.slow
def test_results_are_those_of_the_scripts(tree, brief, tmp_path, capsys):
    flags = ["--data", str(tree), "--arch", "r2plus1d_10", "--size", "16", "--frames", "4", "--fps",
             "8", "--linear", "--train-clips", "1", "--test-clips", "1", "--workers", "1",
             "--checkpoint", str(brief), "--out", str(tmp_path)]
    assert run_here(finetune, *flags) == 0
    printed = capsys.readouterr().out
    (name, value), = transfer.found("finetune.py", flags, ("linear", "pre-trained")).items()
    assert name == ("linear", "pre-trained") and f"video top-1 {value:.1f} %" in printed
    flags = ["--clips", "1", "--checkpoint", str(brief)]
    assert run_here(retrieval, *flags) == 0
    table = capsys.readouterr().out.splitlines()
    way, = [line.split() for line in table if line.startswith("class    video -> audio")]
    found = transfer.found("retrieval.py", flags, None)
    assert len(found) == 4
    assert f"{found['class R@1, video -> audio', 'pre-trained']:.1f}" == way[4]
