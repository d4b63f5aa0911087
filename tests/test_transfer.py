"""Retrieval and Table 2 in small: its runs are runs of the scripts, and its table is of its csv."""

import statistics

from conftest import run_here

import finetune
import pretrain
import retrieval
from experiments import transfer


def test_each_protocol_runs_with_both_encoders(tmp_path):
    parsed = []
    for script, flags, name in transfer.commands(3, tmp_path):
        args = {"pretrain.py": pretrain, "retrieval.py": retrieval,
                "finetune.py": finetune}[script].parse(flags)
        assert args.data is None                # the built-in set
        if script == "finetune.py":
            parsed.append((args.linear, args.fraction, args.checkpoint == "none"))
            assert args.seed == 3
            assert args.checkpoint == {"random": "none",
                                       "pre-trained": str(tmp_path / "s3/checkpoint.pt")}[name[1]]
    assert len(set(parsed)) == len(parsed) == 8
    outs = [flags[-1] for _, flags, _ in transfer.commands(3, tmp_path)]
    assert len(set(outs)) == 10                 # no run writes over another


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


def test_a_seed_is_run_again_if_its_commands_have_changed(tmp_path):
    kept, path = transfer.RESULTS / "transfer.csv", tmp_path / "transfer.csv"
    lines = transfer.read_results(kept)
    transfer.write_csv(lines, transfer.COLUMNS, path)
    assert path.read_text() == kept.read_text()
    assert transfer.markdown(lines) == kept.with_suffix(".md").read_text()
    path.write_text(path.read_text().replace("runs/transfer/", "/elsewhere/"))
    assert len(transfer.read_results(path)) == len(lines)       # --out may be another folder
    path.write_text(path.read_text().replace("--seed 1", "--seed 1 --lr 2", 1))
    others = [line["seed"] for line in lines if line["seed"] != "1"]
    assert [line["seed"] for line in transfer.read_results(path)] == others


def test_markdown():
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
