"""The most probable classes of one's own videos, by a model that finetune.py has trained.

    python -m experiments.predict runs/ucf101/fold1 film.mp4 another.mp4

All settings are those of the folder's checkpoint.pt, and the clips and crops of a video are
averaged as in the test. The folder gets predictions.csv. A file that fails is named, the others go
on, and the exit status is then 1.
"""

import argparse
import csv
import sys
from pathlib import Path

from data import ActionClips
from finetune import classifier, evaluate
from models import video_encoder
from prepare.scan import probe_file
from support.checkpoints import read_state
from support.launch import launch
from support.precision import choose_precision
from support.processes import rank, say


def parse(argv=None):
    """The arguments of the command line. Bad ones end the script with a sentence and status 2."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", metavar="OUT",
                   help="--out of finetune.py or, with --fold, the folder of one fold in it")
    p.add_argument("files", metavar="FILE", nargs="+", help="videos")
    return p.parse_args(argv)


def predict(args, device):
    """Print the 5 most probable classes of each video, and write them to OUT/predictions.csv.

    Raises ValueError if OUT has no fine-tuned model.
    """
    path = Path(args.out, "checkpoint.pt")
    state = read_state(path) if path.exists() else {}
    settings = argparse.Namespace(**state.get("settings", {}))
    if not hasattr(settings, "classes"):
        raise ValueError(f"{args.out} has no checkpoint.pt of a fine-tuning with its class names "
                         "(--linear writes none): give --out of finetune.py, with --fold the "
                         "folder of one fold, such as runs/ucf101/fold1")
    model = classifier(video_encoder(settings.arch), len(settings.classes))
    model.load_state_dict(state["model"])
    dtype, reason = choose_precision(settings.precision, device)
    rows = []
    for file in args.files:
        row, failure = probe_file(file, settings.classes[0])    # a label that is not looked at
        if row:
            rows.append(row)
        else:
            say(f"failed: {file}: {failure}", sys.stderr)
    clips = ActionClips(rows, settings.classes, settings.frames, settings.fps, settings.size,
                        clips_per_file=settings.test_clips, crops=3)
    scores, _, rows = evaluate(model.to(device), clips, dtype, max_failures=1)  # (n, classes)
    say(f"{path}: epoch {state['position'][0]} of {settings.epochs}, {len(settings.classes)} "
        f"classes, {settings.test_clips} clips x 3 crops, {str(dtype)[6:]} ({reason})")
    if rank() == 0:
        write(Path(args.out, "predictions.csv"), rows, settings.classes, scores)
    if len(rows) < len(args.files):
        sys.exit(1)


def write(path, rows, classes, scores):
    """Print the 5 best classes of each row, and write them to a csv."""
    lines = [["file", "rank", "class", "probability"]]
    for row, p in zip(rows, scores):
        print(row.path)
        for place, n in enumerate(p.topk(min(5, len(classes))).indices, 1):
            print(f"{place:4}  {p[n]:6.3f}  {classes[n]}")
            lines.append([row.path, place, classes[n], f"{p[n]:.4f}"])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(lines)


if __name__ == "__main__":
    launch(predict, parse())
