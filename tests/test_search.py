"""experiments.search: the pool, queries and video retrieval against plain loops, and bad input."""

import json
import re
import shutil
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, make_video, run, run_here
from test_augment import tone
from test_retrieval import manifest, rows_of, written
from torch.nn.functional import normalize

from augment import LogMel, centre_crop, normalize_frames
from data import read_clip
from experiments import search
from experiments.search import read_clips, sound_clips, video_ranks
from models import SvaCLR
from support.checkpoints import load_svaclr
from support.reading import RATE, read_sound


def write_wave(path, samples, rate=RATE, codec="pcm_f32le"):
    """A file of sound alone, by default a wav in 32-bit floats."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.float().numpy()[None], "fltp", "mono")
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for piece in av.AudioResampler(stream.format.name, "mono", rate).resample(frame):
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module", autouse=True)
def float32():
    """The same numbers on all CPUs, as exact as those of a plain loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "choose_precision", lambda *_: (torch.float32, "test"))
        yield


@pytest.fixture(scope="module")
def pool(brief, tmp_path_factory):
    """The npz of the tree's test part."""
    saved = tmp_path_factory.mktemp("pool") / "features.npz"
    assert run_here(search, "--checkpoint", brief, "--clips", 3, "--save", saved) == 0
    return saved


def ask(brief, *flags):
    """Run a query: {"file: its sound finds these videos": [(similarity, label, path)]}, text."""
    done = run("--checkpoint", brief, *flags, script="experiments.search")
    found = {}
    for line in done.stdout.splitlines():
        if line.endswith((" finds these videos", " find these sounds")):
            hits = found.setdefault(line.rsplit("/", 1)[-1], [])
        elif re.match(r" +\d+ ", line):
            place, similarity, label, path = line.split()
            hits.append((float(similarity), label, path))
            assert int(place) == len(hits)
    return found, done.stdout


def plain_features(model, row, sound):
    """{one of the features of a pool: (D,)} of 3 clips of a file, in a plain loop. Without sound
    there is y_video alone."""
    means, seconds = {}, row["duration" if sound else "video_duration"]
    for t0 in np.linspace(0, seconds - 0.5, 3):
        frames, wave = read_clip(row["path"], t0, (1,), (1,) if sound else (), 4, 8, 16,
                                 centre_crop)
        with torch.no_grad():
            features = {"y_video": model.f(normalize_frames(frames))}
            if sound:
                y_a, y_v = model.g(LogMel()(wave)), features["y_video"]
                features |= {"y_audio": y_a, "z_audio": model.h_a(y_a), "z_video": model.h_v(y_v)}
        for name, x in features.items():
            means[name] = means.get(name, 0) + normalize(x[0], dim=0) / 3
    return {name: normalize(x, dim=0).numpy() for name, x in means.items()}


def test_pool_has_the_features_of_each_file(tree, brief, pool, monkeypatch, capsys):
    """The lines for NumPy of the docs find in it what is nearest."""
    arrays, rows = np.load(pool), rows_of(tree, "test")
    assert arrays["paths"].tolist() == [row["path"] for row in rows]
    assert arrays["labels"].tolist() == [row["label"] for row in rows]
    model = load_svaclr(brief, SvaCLR)[0].eval()
    for n in (0, 17):
        for name, x in plain_features(model, rows[n], sound=True).items():
            assert arrays[name].dtype == np.float32 and arrays[name].shape == (24, len(x))
            assert np.allclose(np.linalg.norm(arrays[name], axis=1), 1, atol=1e-5)
            assert arrays[name][n] @ x > 0.999, name
    about = json.loads(str(arrays["settings"]))
    assert about["clips_per_file"] == 3 and about["split"] == "test" and len(about["weights"]) == 8
    text = (ROOT / "docs/running.md").read_text().partition("## Your own files")[2]
    monkeypatch.chdir(pool.parent)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    nearest = (arrays["z_video"] @ arrays["z_audio"][0]).argmax()
    assert arrays["paths"][nearest] in capsys.readouterr().out.split("'")[1]


@pytest.mark.slow
def test_a_saved_pool_answers_as_the_videos_do(tree, brief, pool):
    """The same lines, to the digit. They are the cosines of the npz, in descending order."""
    film, arrays = rows_of(tree, "test")[5]["path"], np.load(pool)
    for feature in ("y", "z"):
        flags = "--query", film, "--top", 24, "--feature", feature
        saved, _ = ask(brief, *flags, "--pool", pool)
        for (way, hits), (query, found, words) in zip(saved.items(), (
                ("audio", "video", "sound finds these videos"),
                ("video", "audio", "pictures find these sounds")), strict=True):
            similarity = arrays[f"{feature}_{found}"] @ arrays[f"{feature}_{query}"][5]
            assert way == f"{Path(film).name}: its {words}"
            assert [s for s, _, _ in hits] == pytest.approx(sorted(similarity)[::-1], abs=2e-3)
            assert sorted(path for *_, path in hits) == sorted(arrays["paths"])
    read, text = ask(brief, *flags, "--clips", 3)
    assert saved == read and "training clips" not in text
    _, text = ask(brief, "--query", film, "--split", "all", "--clips", 1)
    assert "pool of 34 clips, includes training clips" in text.splitlines()[0]


def test_files_with_one_modality_ask_in_one_direction(brief, pool, tmp_path):
    """A wav and an mp3 find the sounds of their pitch, a silent film the pictures of its gray: here
    sounds and videos of the pool have changed places."""
    arrays = dict(np.load(pool))
    np.savez(tmp_path / "exchanged.npz", **arrays | {
        f"{kind}_{new}": arrays[f"{kind}_{old}"] for kind in "yz"
        for new, old in (("audio", "video"), ("video", "audio"))})
    write_wave(tmp_path / "high.wav", tone(1010, 3))
    write_wave(tmp_path / "low.mp3", tone(410, 3, 44100), 44100, "mp3")
    make_video(tmp_path / "silent.mp4", 3.0, 10, tone=None, gray=lambda t: 205)
    make_video(tmp_path / "short.mp4", 0.3, 10, tone=410, gray=lambda t: 75)
    files = [tmp_path / name for name in ("high.wav", "low.mp3", "silent.mp4", "short.mp4")]
    found, text = ask(brief, "--query", *files, "--pool", tmp_path / "exchanged.npz")
    for (way, hits), (expected, label) in zip(found.items(), (
            ("high.wav: its sound finds these videos", "high"),
            ("low.mp3: its sound finds these videos", "low"),
            ("silent.mp4: its pictures find these sounds", "high"),
            ("short.mp4: its sound finds these videos", "low"),
            ("short.mp4: its pictures find these sounds", "low")), strict=True):
        assert way == expected and [hit[1] for hit in hits] == [label] * 5
    for name in ("high.wav", "low.mp3"):
        assert f"{name}: its pictures cannot be used (no video stream)" in text
    assert "silent.mp4: its sound cannot be used (no audio stream)" in text
    assert text.count("cannot be used") == 3


def test_clips_of_a_query(tmp_path):
    """They are spaced as those of the pool. A short file ends in its last frame and in silence, and
    damage that lies between the clips does no harm."""
    wave = torch.arange(3 * RATE) / (3 * RATE)
    ramp = write_wave(tmp_path / "ramp.wav", wave)
    assert torch.allclose(sound_clips(ramp, "", 6, 0.5).flatten(), wave, atol=1e-6)
    middle, = sound_clips(ramp, "", 1, 0.5)
    assert middle[0] == pytest.approx(1.25 / 3, abs=1e-4)
    short = write_wave(tmp_path / "short.wav", wave[-RATE // 4:])
    for clip in sound_clips(short, "", 2, 0.5):
        assert torch.allclose(clip[:RATE // 4], wave[-RATE // 4:]) and not clip[RATE // 4:].any()
    film = make_video(tmp_path / "short.mp4", 0.25, 8, tone=500)
    frames, waves, missing = read_clips(film, Namespace(frames=4, fps=8, size=32), 2)
    assert missing == {} and frames.shape == (1, 2, 4, 32, 32, 3) and waves.shape == (1, 2, 12000)
    assert (frames[0, :, 1:] == frames[0, :, 1:2]).all()
    assert waves[0, :, :5000].std() > 0.1 and not waves[0, :, 9000:].any()
    path = write_wave(tmp_path / "a.mp3", tone(500, 8), codec="libmp3lame")
    content = bytearray(path.read_bytes())
    content[len(content) // 2:len(content) // 2 + 300] = bytes(300)
    path.write_bytes(content)
    _, damaged = read_sound(path)
    assert damaged and all(abs(t - 4) < 0.3 for t in damaged)
    for clip in sound_clips(path, "", 2, 0.5):          # at both ends
        assert clip.std() > 0.1
    with pytest.raises(ValueError, match=r"a.mp3: its sound is damaged at [34]\.\d\d s: mend"):
        sound_clips(path, "", 1, 0.5)                   # in the middle


@pytest.mark.slow
def test_figure_of_queries(tree, brief, pool, tmp_path):
    """A line for each query: here the sound and the pictures of a film, and a sound."""
    film, out = rows_of(tree, "test")[0]["path"], tmp_path / "out.png"
    write_wave(tmp_path / "a$^$_$.wav", tone(700, 1))       # is no formula
    _, text = ask(brief, "--query", film, tmp_path / "a$^$_$.wav", "--pool", pool, "--top", 6,
                  "--figure", out)
    assert f"{out}: the queries and what they find" in text
    with av.open(str(out)) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert image.shape == (720, 1330, 3) and (image[:, 250:] < 240).mean() > 0.4
    arrays = dict(np.load(pool))                            # its films are elsewhere by now
    arrays["paths"] = np.array([f"gone/{n}.mp4" for n in range(len(arrays["paths"]))])
    np.savez(tmp_path / "moved.npz", **arrays)
    _, text = ask(brief, "--query", film, "--pool", tmp_path / "moved.npz", "--figure", out)
    assert "gone/" in text and f"{out}: the queries and what they find" in text


@pytest.mark.slow
def test_bad_input(tree, brief, pool, tmp_path, capsys):
    """Each gets its sentence before the work."""
    for name in ("text.mp4", "text.npz"):
        (tmp_path / name).write_text("no film")
    state = torch.load(brief, weights_only=True)
    state["model"]["h_a.3.bias"][:] += 1
    torch.save(state, tmp_path / "other.pt")
    np.savez(tmp_path / "array.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(pool.read_bytes()[:20000])
    silent = manifest(rows_of(tree, has_audio=0), tmp_path / "silent.csv")
    all_rows = rows_of(tree)
    all_rows[0]["label"] = ""
    unlabelled = manifest(all_rows, tmp_path / "unlabelled.csv")
    encoder = Path(shutil.copy(brief.with_name("video_encoder.pt"), tmp_path))
    film = rows_of(tree, "test")[0]["path"]
    saved, videos = ["--query", film, "--pool"], ["--pair", "video-video"]
    for flags, sentence in (
            (["--query", tmp_path / "text.mp4", "--pool", pool],
             "and no sound (Invalid data found when processing input): give a sound or video file"),
            (["--query", film, tmp_path / "gone.wav"],
             f"--query {tmp_path}/gone.wav has no pictures (cannot be read: No such file"),
            (["--save", tmp_path / "a.npz", "--data", silent], "0 usable clips in the 'test' part, "
             "but a query needs 1 or more; left out: 24 no audio"),
            *(([*saved, tmp_path / name], f"--pool {tmp_path / name} is missing, damaged or no")
              for name in ("gone.npz", "array.npz", "array.npy", "cut.npz", "text.npz")),
            ([*saved, pool, "--checkpoint", tmp_path / "other.pt"],
             f"{pool} has features of another model, {brief} with the weights "),
            ([*videos, "--checkpoint", encoder, *CLIP],                 # no built-in set is made
             "does not say what data it is to be measured on: give --data"),
            ([*videos, "--checkpoint", encoder, "--data", silent],
             "does not fit --arch r2plus1d_18"),
            ([*videos, "--data", silent], "10 usable clips in the 'train' part, but R@20 needs 20"),
            ([*COMPARE, "--data", unlabelled], "it needs a label for every video")):
        assert run_here(search, "--checkpoint", brief, *flags) == 1
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


# ---- video to video

COMPARE = "--pair", "video-video", "--clips", 3, "--split", "train", "--gallery", "test"
CLIP = "--frames", 4, "--fps", 8, "--size", 16, "--arch", "r2plus1d_10"


def plain_video_ranks(query, gallery, labels, gallery_labels):
    """One query after the other: how many come before its class, and is it the majority's?"""
    before, right = [], []
    for q, label in zip(query, labels):
        s = gallery @ q
        own = [s[j] for j in range(len(s)) if gallery_labels[j] == label]
        before.append(sum(s[j] >= max(own, default=-np.inf) for j in range(len(s))
                          if gallery_labels[j] != label))
        near = sorted(range(len(s)), key=lambda j: (-s[j], j))[:20]
        votes = {}
        for j in near:
            votes[gallery_labels[j]] = votes.get(gallery_labels[j], 0) + 1
        winners = [c for c in votes if votes[c] == max(votes.values())]   # the nearest's come first
        right.append(winners[0] == label)
    return before, right


@pytest.mark.parametrize("ties", [False, True])
def test_video_ranks_are_the_plain_ones(ties):
    """With a class (6) that the gallery lacks."""
    g = torch.Generator().manual_seed(3)
    labels, gallery_labels = (torch.randint(0, c, (n,), generator=g) for c, n in ((7, 90), (6, 50)))
    size = 3 if ties else 16
    query, gallery = (torch.randint(-2, 3, (n, size), generator=g).float() for n in (90, 50))
    expected = plain_video_ranks(*(x.numpy() for x in (query, gallery, labels, gallery_labels)))
    for chunk in (256, 7):
        found = video_ranks(query, gallery, labels, gallery_labels, chunk)
        assert found[0].tolist() == expected[0] and found[1].tolist() == expected[1]
    missing = labels == 6
    assert missing.any() and (found[0][missing] == 50).all() and not found[1][missing].any()


@pytest.mark.slow
def test_videos_find_videos(tree, brief, capsys, tmp_path, monkeypatch):
    """The features in a plain loop, y_v of each clip through f, and their ranks in plain loops.
    video_encoder.pt gives the same numbers, where flags replace the settings of checkpoint.pt, and
    so do two processes. Half of the files have no sound, one query's class is unique, and one query
    becomes brighter from clip to clip."""
    def watched(query, *more):
        features.append(query)                          # y_v of the queries
        return video_ranks(query, *more)

    rows = [row | {"has_audio": n % 2} for n, row in enumerate(rows_of(tree))]
    only, bright = (row for row in rows if row["path"].endswith(("train/low/0.mp4",
                                                                 "train/low/1.mp4")))
    only["label"] = "only"
    bright["path"] = str(make_video(tmp_path / "bright.mp4", 3.0, 10, gray=lambda t: 30 + 60 * t))
    features, data = [], manifest(rows, tmp_path / "silent.csv")
    monkeypatch.setattr(search, "video_ranks", watched)
    assert run_here(search, *COMPARE, "--checkpoint", brief, "--data", data) == 0
    kept, text = written(brief), capsys.readouterr().out
    model = load_svaclr(brief, SvaCLR)[0].eval()
    (q, of_q), (g, of_g) = (zip(*((plain_features(model, row, sound=False)["y_video"], row["label"])
                                  for row in rows if row["split"] == part))
                            for part in ("train", "test"))
    assert np.allclose(features[0], np.stack(q), atol=1e-5)
    before, right = plain_video_ranks(q, np.stack(g), of_q, of_g)
    found = kept["class, video -> video"]
    for k in (1, 5, 10, 20):
        assert found[f"R@{k}"][0] == pytest.approx(np.mean([n < k for n in before]))
    assert found["20-NN"][0] == pytest.approx(np.mean(right)) and 0.4 < np.mean(right) < 1
    assert (kept["queries"], kept["pool"], kept["classes"]) == (10, 24, 2)
    assert kept["queries_without_class"] == 1
    assert "1 of 10 queries miss always: the gallery has no video of their class." in text
    assert kept["class, chance"]["R@1"] == pytest.approx(0.45)
    run(*COMPARE, "--checkpoint", brief, "--data", data, script="experiments.search", processes=2)
    assert written(brief) == kept

    encoder = brief.with_name("video_encoder.pt")
    assert run_here(search, *COMPARE, "--checkpoint", encoder, "--data", data, *CLIP) == 0
    again = json.loads(brief.with_name("retrieval-video_encoder.json").read_text())
    assert again == kept | {"checkpoint": str(encoder)}
    monkeypatch.chdir(tmp_path)
    for _ in range(2):                          # random weights are the same each time
        assert run_here(search, *COMPARE, "--checkpoint", "none", "--data", data, *CLIP,
                        "--clips", 1) == 0
    assert json.loads(Path("runs/retrieval-none.json").read_text())["checkpoint"] == "none"
    assert torch.allclose(*features[-2:], atol=1e-6)


@pytest.mark.slow
def test_two_processes_save_and_answer_as_one(tree, brief, pool, tmp_path):
    film, out = rows_of(tree, "test")[5]["path"], tmp_path / "2.npz"
    done = run("--checkpoint", brief, "--clips", 3, "--query", film, "--save", out,
               script="experiments.search", processes=2)
    assert done.stdout.count("finds these videos") == 1
    saved, again = np.load(pool), np.load(out)
    assert saved["paths"].tolist() == again["paths"].tolist()
    for name in ("y_audio", "y_video", "z_audio", "z_video"):
        assert np.allclose(saved[name], again[name], atol=2e-3)
