"""The ablation: its rows are settings of pretrain.py, and its table is computed from its csv."""

import json
import math
import shutil
import statistics
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import log_of, run_here

import pretrain
import retrieval
from data import read_clip
from experiments import ablation, measures
from prepare import demo, scan


NAMES = ("max_speed", "affinity", "affinity_temperature", "raw_affinity", "detach_affinity",
         "mapping", "epochs", "same_speed")


def settings(rows):
    """{row: the settings of pretrain.py that its flags make}."""
    parsed = {row: vars(pretrain.parse(flags.split())) for row, flags in rows.items()}
    return {row: {name: args[name] for name in NAMES} for row, args in parsed.items()}


def test_rows_are_settings_of_pretraining():
    paper, readings = settings(ablation.PAPER), settings(ablation.READINGS)
    assert [args["max_speed"] for args in paper.values()] == [1, 2, 4, 6, 4]            # Table 1
    assert [args["affinity"] for args in paper.values()] == ["none"] * 4 + ["clip"]
    for args in readings.values():              # each differs from SoftInfoNCE in one setting
        soft = paper["s = [1, 4], SoftInfoNCE"]
        assert sum(args[name] != soft[name] for name in NAMES) == 1, args
    for row, args in settings(ablation.SHORT).items():      # differs from its row in its length
        assert args == (paper | readings)[row.removesuffix(", 15 epochs")] | {"epochs": 15}
    timing = settings(ablation.TIMING)
    assert {args["max_speed"] for args in timing.values()} == {1, 2, 4}
    assert len({tuple(args.values()) for args in timing.values()}) == 8


def test_seeds_of_a_plain_run():
    """Five of the paper's rows, three of the others, and none of 15 epochs unless it is named."""
    _, _, jobs = ablation.parse([])
    assert jobs[:5] == [(row, 0) for row in ablation.PAPER] and len(jobs) == 5 * 5 + 8 * 3
    assert not {row for row, _ in jobs} & ablation.SHORT.keys()
    rows = ["s = [1, 2], InfoNCE", "raw y, 15 epochs"]
    _, _, jobs = ablation.parse(["--seeds", "7", "--rows", *rows])
    assert jobs == [(row, 7) for row in rows]
    _, _, jobs = ablation.parse(["--data", "grid.csv"])
    assert len(jobs) == 24 and {row for row, _ in jobs} == ablation.TIMING.keys()
    args, _, jobs = ablation.parse(["--quick"])
    assert jobs == [(row, 0) for row in ablation.PAPER]
    for flags in (["--rows", "no such row"], ["--quick", "--rows", "raw y"]):
        with pytest.raises(SystemExit):
            ablation.parse(flags)
    assert {ablation.name_of(f"a/grid{end}") for end in ("", ".csv", "/manifest.csv")} == {"grid"}


def of_script(checkpoint, n):
    """{metric: %} of Table 3 by retrieval.py with n clips of a file, and the means of both ways."""
    assert run_here(retrieval, "--checkpoint", checkpoint, "--clips", str(n)) == 0
    found = json.loads(checkpoint.with_name("retrieval.json").read_text())
    found = {f"{level}, {way}, R@{k}": 100 * found[f"{level}, {way}"][f"R@{k}"][0]
             for level in measures.LEVELS for way in measures.WAYS for k in retrieval.RANKS}
    return found | {f"{level} R@{k}": sum(found[f"{level}, {way}, R@{k}"]
                                          for way in measures.WAYS) / 2
                    for level in measures.LEVELS for k in retrieval.RANKS}


def test_retrieval_is_that_of_the_script(brief):
    expected = of_script(brief, 2)
    found = measures.classes_and_clips(brief)
    assert found.keys() == expected.keys() | {*measures.PROBES, "clips/s", "clips"}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert all(0 <= found[name] <= 100 for name in measures.PROBES) and found["clips"] == 24


def test_features_at_a_speed(brief, monkeypatch):
    """At speed 1 they are those of retrieval.py, and at speed 2 those of twice the time."""
    model, settings, clips, _ = retrieval.load(
        Namespace(checkpoint=brief, data=None, split="test", clips=1))
    expected = torch.stack(retrieval.extract(model, clips, torch.float32)[:2])
    found = measures.embed_at(model, settings, clips, torch.float32, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    calls = []
    monkeypatch.setattr(measures, "read_clip",
                        lambda *arguments: calls.append(arguments) or read_clip(*arguments))
    measures.embed_at(model, settings, clips, torch.float32, 2)
    for (path, t0, tau_v, tau_a, *_), row in zip(calls, clips.rows, strict=True):
        assert (path, tau_v, tau_a) == (row.path, (2,), (2,))
        assert t0 + clips.seconds == pytest.approx(row.duration / 2)


@pytest.mark.parametrize("known", ["speed", "clip"])
def test_a_pool_of_mixed_speeds(brief, monkeypatch, known):
    """z that hold the speed alone find clips of their speed, and z of the clip find the clip."""
    def planted(model, settings, clips, dtype, tau):
        n = len(clips)
        noise = 0.01 * torch.randn(2, n, 40, generator=torch.Generator().manual_seed(tau))
        index = torch.full((n,), tau) if known == "speed" else torch.arange(n)
        device = next(model.parameters()).device
        return F.normalize(F.one_hot(index, 40) + noise, dim=2).to(device)

    monkeypatch.setattr(measures, "embed_at", planted)
    found = measures.timing(brief)              # 24 clips, 6 at each speed
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
    assert measures.from_log(tmp_path / "checkpoint.pt") == (1.5, 5.5)


def test_a_film_that_fails_ends_the_measurement(tree, brief, tmp_path):
    """Rows of the table that were measured on different films could not be compared."""
    rows = scan.scan(tree)
    next(row for row in rows if row["split"] == "test")["path"] = str(tmp_path / "gone.mp4")
    scan.write(rows, tmp_path / "manifest.csv")
    shutil.copy(brief, tmp_path)
    with pytest.raises(ValueError, match="1 of 24 videos failed, .*gone.mp4: No such file"):
        measures.classes_and_clips(tmp_path / brief.name)
    with pytest.raises(ValueError, match="gone.mp4: No such file"):
        measures.timing(tmp_path / brief.name)


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


@pytest.mark.parametrize("study,name", [(ablation.BUILT_IN, "ablation"),
                                        (ablation.LIPS, "ablation-grid")])
def test_results_that_are_written_can_be_read(study, name, tmp_path, capsys):
    path, kept = tmp_path / f"{name}.csv", ablation.RESULTS / f"{name}.csv"
    lines = ablation.read_results(kept, study)
    ablation.write_results(lines, path, study)
    assert path.read_text() == kept.read_text() and ablation.read_results(path, study) == lines
    assert path.with_suffix(".md").read_text() == kept.with_suffix(".md").read_text()
    changed = [lines[0] | {"flags": "--max-speed 3"}, *lines[1:]]
    ablation.write_results(changed, path, study)
    assert ablation.read_results(path, study) == lines[1:]
    path.write_text(path.read_text().replace("seed,", "number,", 1))
    with pytest.raises(SystemExit, match=f"error: .*{name}.csv has other columns"):
        ablation.read_results(path, study)


def test_markdown():
    columns = dict.fromkeys(ablation.columns(ablation.BUILT_IN), "")
    values = {"s = [1, 4], SoftInfoNCE": (51.0, 52.0, 59.0), "raw y": (50.0, 53.0, 62.0)}
    lines = [columns | dict.fromkeys(ablation.BUILT_IN.metrics, str(value))
             | {"row": row, "seed": str(seed), "clips": "224", "class, video -> audio, R@1": value}
             for row, found in values.items() for seed, value in enumerate(found)]
    text = ablation.markdown(lines, ablation.BUILT_IN)
    table = {line.split(" | ")[0]: line for line in text.splitlines()[::-1]}
    assert table["| chance"].startswith("| chance | 12.5 | 49.0 | 0.4 | 2.2 |" + " 12.5 |" * 4)
    assert table["| s = [1, 4], SoftInfoNCE"].endswith("| 3 |  |")
    deviation = statistics.stdev((50, 53, 62))  # the differences by seed: -1, 1, 3
    cells = f" 55.0 ± {deviation:.1f} |" * len(ablation.BUILT_IN.metrics)
    assert table["| raw y"] == f"| raw y |{cells} 3 | +1.0 ± 1.2 |"
    assert table["| detached"] == "| detached |" + " not run |" * 8 + " 0 |  |"
    by_class = text[text.index("## Table 3, class-level"):]
    error = statistics.stdev((51, 52, 59)) / 3 ** 0.5
    assert f"| s = [1, 4], SoftInfoNCE | 54.0 ± {error:.1f} | not run |" in by_class


def test_chance_is_that_of_the_pool():
    found = ablation.chances(ablation.LIPS, 200)
    assert [found[f"instance R@{k}"] for k in (1, 5, 20)] == ["0.5", "2.5", "10.0"]
    assert found["mixed R@5"] == "2.5" and found["mixed, same speed"] == "25.0"
    assert found["loss"] == "100.0"
