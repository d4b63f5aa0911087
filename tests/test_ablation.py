"""experiments/ablation.py and transfer.py: rows, jobs, runs and tables."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import captured, write_text

import finetune
import pretrain
from experiments import ablation, transfer
from experiments.ablation import BASE, PAPER, RESULTS, read_results
from prepare import demo, scan
from support.rows import write_rows
from retrieval import RANKS, extract, load, recall_at_k


def test_rows_are_settings_of_pretraining():
    """Those of Table 1, and readings that change one setting each."""
    parse = lambda flags: vars(pretrain.parse(flags.split()))
    paper, built_in = [parse(flags) for flags in PAPER.values()], parse("")
    assert [(args["max_speed"], args["affinity"], args["epochs"]) for args in paper] == [
        (1, "none", 15), (1, "none", 30), (2, "none", 15), (4, "none", 15), (4, "clip", 15)]
    assert parse(PAPER[BASE]) == built_in
    for flags in ablation.READINGS.values():
        assert len(parse(flags).items() - built_in.items()) == 1, flags
    hidden = parse(f"--data films {ablation.BUILT_IN}")
    assert hidden.items() - built_in.items() == {("data", "films"), ("batch_per_process", 32)}


def test_jobs():
    """The first table, unless others are named."""
    others = ["s = [1, 2], InfoNCE", "raw y"]
    for flags, rows, seeds in (
            ([], PAPER, (0, 1, 2)),
            (["--seeds", "7", "--rows", *others], others, (7,)),
            (["--hide", "kind"], ablation.EQUAL, (0, 1, 2)),
            (["--quick"], PAPER, (0,))):
        assert ablation.parse(flags)[1] == [(row, seed) for seed in seeds for row in rows]
    status, _, errors = captured(lambda: ablation.parse(["--rows", "raw z"]))
    assert status == 2 and "invalid choice: 'raw z' (choose from " in errors


def test_runs_on_films_with_hidden_links_read_what_was_built(tmp_path, monkeypatch):
    built, runs = [], {}
    monkeypatch.setattr(demo, "build", lambda folder, hide: built.extend([str(folder), {*hide}]))
    monkeypatch.setattr(ablation, "run_all", lambda jobs, *_: runs.update(jobs))
    ablation.main(["--hide", "rhythm", "kind", "--out", str(tmp_path), "--quick"])
    parsed = [pretrain.parse(flags) for *_, flags, _ in runs.values()]
    folder, = {args.data for args in parsed}
    assert built == [folder, {"kind", "rhythm"}] and "hide-kind-rhythm" in folder
    assert [args.epochs for args in parsed] == [2, 2]


@pytest.mark.slow
def test_it_measures_the_features(tree, brief, tmp_path):
    """Table 3 and the means of both ways. A film that fails ends it."""
    found = ablation.measure(brief)
    args = Namespace(checkpoint=brief, data=None, split="test", clips=10)
    model, _, clips, _ = load(args)
    features, rows = extract(model, clips, torch.float32)   # which it was trained in
    audio, video = features["z"].unbind(1)
    labels = torch.tensor([row.label == "high" for row in rows])
    by_video = recall_at_k(video, audio, labels)
    by_audio = recall_at_k(audio, video, labels)
    for n, level in enumerate(("instance", "class")):
        for k in RANKS:
            ways = [100 * by_video[k][n], 100 * by_audio[k][n]]
            assert [found[f"{level}, video -> audio, R@{k}"],
                    found[f"{level}, audio -> video, R@{k}"]] == pytest.approx(ways)
            assert found[f"{level} R@{k}"] == pytest.approx(sum(ways) / 2)
    assert found["clips"] == 24
    rows, _ = scan.survey("folder", tree)
    rows[0]["path"] = "gone.mp4"  # of the test part
    write_rows(rows, tmp_path / "manifest.csv")
    shutil.copy(brief, tmp_path)
    with pytest.raises(ValueError, match=f"retrieval.py ended with 1: see {tmp_path}.txt"):
        ablation.measure(tmp_path / brief.name)
    assert "gone.mp4: No such file" in tmp_path.with_suffix(".txt").read_text()


@pytest.mark.slow
def test_it_continues_from_its_csv_past_a_run_that_fails(tmp_path, monkeypatch, capsys):
    """Three seeds are in the csv. pretrain.py refuses a negative one."""
    files = {path.name: path.read_text() for path in RESULTS.glob("ablation*")}
    results = shutil.copytree(RESULTS, tmp_path / "results")
    built = []  # no run gets as far as its data
    monkeypatch.setattr(ablation, "RESULTS", results)
    monkeypatch.setattr(demo, "build", lambda folder, hide: built.append((folder.name, *hide)))
    for flags, status, name in (
            (["--rows", BASE, "--seeds", "0", "1", "2", "-1"], 1, "ablation"),
            (["--hide", "kind"], 0, "ablation-hide-kind"),
            (["--hide", "rhythm", "kind"], 0, "ablation-hide-kind-rhythm")):
        with pytest.raises(SystemExit) as stop:
            ablation.main(["--out", str(tmp_path), *flags])
        printed = capsys.readouterr()
        assert stop.value.code == status and printed.out.strip() == files[name + ".md"].strip()
        assert printed.err.count(f"{BASE}, seed -1: pretrain.py ended with 2: see "
                                 ) == printed.err.count("error") == status
    assert {path.name: path.read_text() for path in results.glob("ablation*")} == files
    assert built == [("demo",), ("films", "kind"), ("films", "rhythm", "kind")]
    assert "--seed: '-1' is not" in (tmp_path / "04--1.txt").read_text()


def test_each_job_has_a_core_of_its_own(tmp_path):
    """All cores are used at once, and no GPU."""
    script = write_text(tmp_path / "script.py", "import os, time\ntime.sleep(1)\n"
                        "print(os.sched_getaffinity(0), os.environ['CUDA_VISIBLE_DEVICES'])")
    job = lambda log: ablation.run_script(script, [], log) or [log.read_text()]
    cores, lines = os.sched_getaffinity(0), []
    with pytest.raises(SystemExit) as stop:
        ablation.run_all({core: (job, tmp_path / str(core)) for core in cores}, lines, len)
    assert sorted(lines) == sorted(f"{{{core}}} \n" for core in cores) and not stop.value.code
    assert os.sched_getaffinity(0) == cores


def test_results_that_are_written_can_be_read(tmp_path):
    """In order. A row of other flags is run again."""
    path, lines = tmp_path / "ablation.csv", read_results(RESULTS / "ablation.csv")
    ablation.write_results([lines[0] | {"flags": "--max-speed 3"}, *lines[:0:-1]], path)
    assert read_results(path) == lines[1:]
    path.write_text(path.read_text().replace("seed,", "number,", 1))
    with pytest.raises(SystemExit, match="error: .*ablation.csv has other columns"):
        read_results(path)
    lines = ablation.read_csv(RESULTS / "transfer.csv", transfer.COLUMNS)
    tables = transfer.write_results(lines, tmp_path / "transfer.csv")
    assert tables == (RESULTS / "transfer.md").read_text()
    assert (tmp_path / "transfer.csv").read_text() == (RESULTS / "transfer.csv").read_text()


def test_cells_are_means_over_seeds():
    """Those of a row of three seeds, of which the base has two."""
    lines = [dict.fromkeys(ablation.COLUMNS, "8") | {"row": row, "seed": n, "class R@1": value}
             for row, values in (("raw y", [50, 53, 62]), (BASE, [51, 52]))
             for n, value in enumerate(values)]
    cells = "| raw y | 55.0 ± 6.2 | 8.0 ± 0.0 | 8.0 ± 0.0 | 8.0 ± 0.0 | 3 | +0.0 ± 1.0 |"
    assert cells in ablation.markdown(lines)  # the last is of -1 and 1


def test_each_protocol_runs_with_both_encoders(tmp_path, monkeypatch):
    runs = []

    def run_script(name, flags, log):
        args = (pretrain if name == "pretrain.py" else finetune).parse(flags)
        assert args.seed == 3 and args.data is None  # the built-in set
        runs.append(args)
        write_text(Path(args.out, "results.json"), '{"mean": {"video top-1": %d}}' % len(runs))

    monkeypatch.setattr(transfer, "run_script", run_script)
    lines = transfer.run_seed(3, tmp_path)
    assert len({args.out for args in runs}) == len(runs) == 9  # none writes over another
    kinds = {(args.linear, args.fraction, args.checkpoint) for args in runs[1:]}
    assert len(kinds) == 8
    assert {args.checkpoint for args in runs[1:]} == {"none", f"{runs[0].out}/checkpoint.pt"}
    found = {(line["result"], line["encoder"]): line["value"] for line in lines}
    assert found["fine-tuned", "random"] == "3.00"
    assert found["linear classifier on the frozen encoder", "pre-trained"] == "4.00"
    assert len(found) == len(lines) == 8
    assert all({*line} == {*transfer.COLUMNS} for line in lines)
