"""experiments.search: pools, queries and video retrieval against plain loops; bad input."""

import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, make_video, remux, run, run_here
from matplotlib.image import imread
from test_retrieval import plain_video_ranks, rows_of, written
from torch.nn.functional import normalize

from augment import LogMel, centre_crop, normalize_frames
from data import read_clip
from experiments import search
from experiments.search import sound_clips, video_ranks
from models import SvaCLR
from support.checkpoints import load_svaclr
from support.reading import RATE
from support.rows import write_rows

COMPARE = "--pair video-video --clips 3 --split train --gallery test"
SOUND, PICTURES = "its sound finds these videos", "its pictures find these sounds"
CLIP = "--frames 4 --fps 8 --size 16 --arch r2plus1d_10"


def write_sound(path, seconds, codec="pcm_f32le", **sound):
    """A file of sound alone, by default in 32-bit floats."""
    film = make_video(path.with_suffix(".mkv"), seconds, 10, audio_codec=codec, **sound)
    return remux(film, path, ["audio"])


@pytest.fixture(scope="module")
def pool(brief, tmp_path_factory):
    """The npz of the tree's test part."""
    saved = tmp_path_factory.mktemp("pool") / "features.npz"
    assert run_here(search, "--checkpoint", brief, "--clips", 3, "--save", saved) == 0
    return saved


def ask(brief, *flags, processes=1):
    """Run queries: their ways, hits [(place, cosine, label, path)], and the whole text."""
    done = run("--checkpoint", brief, *flags, script="experiments.search", processes=processes)
    ways = re.findall(r"[^/\n]+: its \w+ finds? these \w+", done.stdout)
    hits = re.findall(r"^ +(\d+) +([\d.-]+) +(\w+) +(\S+)$", done.stdout, re.MULTILINE)
    top = len(hits) // len(ways)
    assert [int(place) for place, *_ in hits] == [*range(1, top + 1)] * len(ways)
    return ways, hits, done.stdout


def plain_features(model, row):
    """{one of the features of a pool: (D,)} of 3 clips of a file, in a plain loop."""
    sums = dict.fromkeys(("y_audio", "y_video", "z_audio", "z_video"), 0)
    for t0 in np.linspace(0, row["duration"] - 0.5, 3):
        frames, wave = read_clip(row["path"], t0, (1,), (1,), 4, 8, 16, centre_crop)
        with torch.no_grad():
            y_a, y_v = model.g(LogMel()(wave)), model.f(normalize_frames(frames))
            for name, x in zip(sums, (y_a, y_v, model.h_a(y_a), model.h_v(y_v))):
                sums[name] = sums[name] + normalize(x[0], dim=0)
    return {name: normalize(x, dim=0).numpy() for name, x in sums.items()}


def test_pool_has_the_features_of_each_file(tree, brief, pool, monkeypatch, capsys):
    """The lines for NumPy of the docs find in it what is nearest."""
    arrays, rows = np.load(pool), rows_of(tree, "test")
    assert arrays["paths"].tolist() == [row["path"] for row in rows]
    assert arrays["labels"].tolist() == [row["label"] for row in rows]
    model = load_svaclr(brief, SvaCLR)[0].eval()
    for n in (0, 17):
        for name, x in plain_features(model, rows[n]).items():
            assert arrays[name].dtype == np.float32 and arrays[name].shape == (24, len(x))
            assert np.allclose(arrays[name][n], x, atol=1e-4), name
    text = (ROOT / "docs/using.md").read_text().partition("## Your own files")[2]
    monkeypatch.chdir(pool.parent)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    nearest = (arrays["z_video"] @ arrays["z_audio"][0]).argmax()
    assert arrays["paths"][nearest] in capsys.readouterr().out.split("'")[1]


@pytest.mark.slow
def test_a_saved_pool_answers_as_the_videos_do(tree, brief, pool, tmp_path):
    """To the digit: by its cosines, in descending order. Two processes save and draw as one."""
    film, arrays = rows_of(tree, "test")[5]["path"], dict(np.load(pool))
    for feature in ("y", "z"):
        flags = "--query", film, "--top", 24, "--feature", feature
        ways, saved, _ = ask(brief, *flags, "--pool", pool)
        assert ways == [f"{Path(film).name}: {words}" for words in (SOUND, PICTURES)]
        for hits, query, found in ((saved[:24], "audio", "video"), (saved[24:], "video", "audio")):
            expected = arrays[f"{feature}_{found}"] @ arrays[f"{feature}_{query}"][5]
            cosines = [float(cosine) for _, cosine, _, _ in hits]
            assert cosines == pytest.approx(sorted(expected, reverse=True), abs=2e-3)
            assert sorted(path for *_, path in hits) == sorted(arrays["paths"])
    _, read, text = ask(brief, *flags, "--clips", 3)
    assert saved == read
    assert "training clips" not in text
    _, _, text = ask(brief, "--query", film, "--split", "all", "--clips", 1)
    assert "pool of 34 clips, includes training clips" in text.splitlines()[0]
    sound = write_sound(tmp_path / "a$^$_$.wav", 1, tone=700)   # no formula
    figure, out = tmp_path / "out.png", tmp_path / "2.npz"
    drawn = f"{figure}: the queries and what they find"
    flags = "--query", film, sound, "--top", 6, "--figure", figure
    _, _, text = ask(brief, *flags, "--clips", 3, "--save", out, processes=2)
    assert text.count(PICTURES) == 1 and drawn in text
    image = imread(figure)[..., :3]
    assert image.shape == (720, 1330, 3)
    assert (image[:, 250:] < 240 / 255).mean() > 0.4
    again = np.load(out)
    assert again["paths"].tolist() == arrays["paths"].tolist()
    for name in ("y_audio", "y_video", "z_audio", "z_video"):
        assert np.allclose(arrays[name], again[name], atol=2e-3)
    arrays["paths"] = np.array([f"gone/{n}.mp4" for n in range(24)])
    np.savez(out, **arrays)
    _, _, text = ask(brief, *flags, "--pool", out)
    assert "gone/" in text and drawn in text


def test_files_with_one_modality_ask_in_one_direction(brief, pool, tmp_path):
    """A wav and an mp3 find the sounds of their pitch, a silent film the pictures of its gray: in
    this pool sounds and pictures have changed places."""
    arrays = dict(np.load(pool))
    np.savez(tmp_path / "exchanged.npz", **arrays | {
        "z_audio": arrays["z_video"], "z_video": arrays["z_audio"]})
    write_sound(tmp_path / "high.wav", 3, tone=1010)
    write_sound(tmp_path / "low.mp3", 3, "mp3", tone=410)
    make_video(tmp_path / "silent.mp4", 3.0, 10, tone=None, gray=lambda t: 205)
    make_video(tmp_path / "short.mp4", 0.3, 10, tone=410, gray=lambda t: 75)
    files = [tmp_path / name for name in "high.wav low.mp3 silent.mp4 short.mp4".split()]
    ways, hits, text = ask(brief, "--query", *files, "--pool", tmp_path / "exchanged.npz")
    assert ways == [f"high.wav: {SOUND}", f"low.mp3: {SOUND}", f"silent.mp4: {PICTURES}",
                    f"short.mp4: {SOUND}", f"short.mp4: {PICTURES}"]
    assert [label for _, _, label, _ in hits] == (
        ["high"] * 5 + ["low"] * 5 + ["high"] * 5 + ["low"] * 10)
    for name in ("high.wav", "low.mp3"):
        assert f"{name}: its pictures cannot be used (no video stream)" in text
    assert "silent.mp4: its sound cannot be used (no audio stream)" in text
    assert text.count("cannot be used") == 3


def test_clips_of_a_query(tmp_path):
    """Evenly spaced. A short sound ends in silence. Damage between them does no harm."""
    wave, ramp = torch.arange(3 * RATE) / (3 * RATE), lambda t: t / 3
    long = write_sound(tmp_path / "long.wav", 3, rate=RATE, wave=ramp)
    assert torch.allclose(sound_clips(long, "", 6, 0.5).flatten(), wave, atol=1e-6)
    assert sound_clips(long, "", 1, 0.5)[0, 0] == pytest.approx(1.25 / 3, abs=1e-4)
    short = write_sound(tmp_path / "short.wav", 0.25, rate=RATE, wave=ramp)
    for clip in sound_clips(short, "", 2, 0.5):
        assert torch.allclose(clip[:6000], wave[:6000], atol=1e-6) and not clip[6000:].any()
    path = write_sound(tmp_path / "a.mp3", 8, "mp3", tone=500)
    content = bytearray(path.read_bytes())
    content[len(content) // 2:len(content) // 2 + 300] = bytes(300)
    path.write_bytes(content)
    assert sound_clips(path, "", 2, 0.5).std(1).min() > 0.1     # at both ends
    with pytest.raises(ValueError, match=r"a.mp3: its sound is damaged at [34]\.\d\d s: mend"):
        sound_clips(path, "", 1, 0.5)           # in the middle


@pytest.mark.slow
def test_bad_input(tree, brief, pool, monkeypatch, capsys):
    """Each gets its sentence before the work."""
    monkeypatch.chdir(pool.parent)
    Path("text.mp4").write_text("no film")
    invalid = "Invalid data found when processing input"
    state = torch.load(brief, weights_only=True)
    state["model"]["h_a.3.bias"][:] += 1
    torch.save(state, "other.pt")
    np.savez("array.npz", x=np.zeros(3))
    np.save("array.npy", np.zeros(3))
    Path("cut.npz").write_bytes(pool.read_bytes()[:20000])
    write_rows(rows_of(tree, has_audio=0), "silent.csv")
    rows = rows_of(tree)
    write_rows([rows[0] | {"label": ""}, *rows[1:]], "unlabelled.csv")
    for flags, sentence in (
            ("--query text.mp4 --pool features.npz",
             f"--query text.mp4 has no pictures (cannot be read: {invalid}) and no sound "
             f"({invalid}): give a sound or video file"),
            ("--save a.npz --data silent.csv", "0 usable clips in the 'test' part, but a query "
             "needs 1 or more; left out: 24 no audio"),
            *((f"--query a --pool {name}", f"--pool {name} is missing, damaged or no pool")
              for name in "gone.npz array.npz array.npy cut.npz text.mp4".split()),
            ("--query a --pool features.npz --checkpoint other.pt",
             f"features.npz has features of another model, {brief} with the weights "),
            (f"{COMPARE} --checkpoint none {CLIP}",     # no built-in set is made
             "does not say what data it is to be measured on: give --data"),
            (f"{COMPARE} --checkpoint {brief.with_name('video_encoder.pt')}",
             "does not fit --arch r2plus1d_18"),
            ("--pair video-video --data silent.csv",
             "10 usable clips in the 'train' part, but R@20 needs 20"),
            (f"{COMPARE} --data unlabelled.csv", "it needs a label for every video")):
        assert run_here(search, "--checkpoint", brief, *flags.split()) == 1
        errors = capsys.readouterr().err
        assert sentence in error_of(errors) and "evaluating" not in errors, errors


@pytest.mark.parametrize("flags,sentence", [
    ("", "nothing to search: give --query FILE, --save FILE.npz or --pair video-video"),
    ("--save a.npz --top 3", "--top is for --query FILE"),
    ("--query a --pool a.npz --max-failures 0", "--max-failures is not read with --pool, which"),
    ("--query a --figure a", "--figure a: give a name that ends in .png, .pdf or .svg"),
    ("--save no/a.npz", "--save no/a.npz: there is no folder no, make it first"),
    ("--frames 3", "--frames is for --pair video-video: give both or none"),
    ("--pair video-video --query a", "--query is for --pair audio-video: leave out --pair"),
    ("--pair video-video --split train", "--split train --gallery train: a video would find"),
    ("--pair video-video --gallery all", "--split test --gallery all: a video would find itself")])
def test_bad_flags(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        search.parse(flags.split())
    assert stop.value.code == 2 and f"error: {sentence}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("pool")     # for its float32
def test_videos_find_videos(tree, brief, capsys, tmp_path, monkeypatch):
    """Features and ranks are those of plain loops, with video_encoder.pt too, and two processes."""
    calls = Mock(wraps=video_ranks)
    monkeypatch.setattr(search, "video_ranks", calls)
    rows = [row | {"has_audio": n % 2} for n, row in enumerate(rows_of(tree))]
    only, bright = rows[-2:]    # of the training part
    only["label"] = "only"
    bright["path"] = str(make_video(tmp_path / "bright.mp4", 3.0, 10, gray=lambda t: 30 + 60 * t))
    data = tmp_path / "silent.csv"
    write_rows(rows, data)
    flags = [*COMPARE.split(), "--data", data, "--checkpoint"]
    assert run_here(search, *flags, brief) == 0
    kept, text = written(brief), capsys.readouterr().out
    model = load_svaclr(brief, SvaCLR)[0].eval()
    y_v = np.stack([plain_features(model, row)["y_video"] for row in rows])
    labels = np.array([row["label"] for row in rows])
    assert np.allclose(calls.call_args.args[0], y_v[24:], atol=1e-5)
    before, right = plain_video_ranks(y_v[24:], y_v[:24], labels[24:], labels[:24])
    found = kept["class, video -> video"]
    for k in (1, 5, 10, 20):
        assert found[f"R@{k}"][0] == pytest.approx(np.mean([n < k for n in before]))
    assert found["20-NN"][0] == pytest.approx(np.mean(right))
    assert 0.4 < np.mean(right) < 1
    for name, many in (("queries", 10), ("pool", 24), ("classes", 2), ("queries_without_class", 1)):
        assert kept[name] == many
    assert "1 of 10 queries miss always: the gallery has no video of their class." in text
    assert kept["class, chance"]["R@1"] == pytest.approx(0.45)
    run(*flags, brief, script="experiments.search", processes=2)
    assert written(brief) == kept
    encoder = brief.with_name("video_encoder.pt")
    assert run_here(search, *flags, encoder, *CLIP.split()) == 0
    again = written(brief, "retrieval-video_encoder.json")
    assert again == kept | {"checkpoint": str(encoder)}
    monkeypatch.chdir(tmp_path)
    for _ in range(2):          # random weights are the same each time
        assert run_here(search, *flags, "none", *CLIP.split(), "--clips", 1) == 0
    assert '"checkpoint": "none"' in Path("runs/retrieval-none.json").read_text()
    assert torch.allclose(*(call.args[0] for call in calls.call_args_list[-2:]), atol=1e-6)
