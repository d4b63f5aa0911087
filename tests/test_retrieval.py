"""Retrieval against a brute-force copy, chance against random features, and bad input."""

import json
import math
import re
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, make_video, run, run_here, with_damaged
from torch.nn.functional import normalize

import retrieval
from augment import LogMel, centre_crop, normalize_frames
from data import read_clip
from models import SvaCLR, video_encoder
from prepare import scan
from retrieval import chance, class_chance, ranks, read_query, recall_at_k
from support import pools
from support.checkpoints import load_encoder, load_svaclr
from support.pools import sound_clips, video_ranks
from support.reading import RATE, read_sound


def brute_force(query, gallery, labels, k):
    """One query after the other; of equal neighbours the wrong ones come first."""
    hits = np.zeros((2, len(query)))
    for i, q in enumerate(query):
        s = gallery @ q
        for level, right in enumerate((np.arange(len(s)) == i, labels == labels[i])):
            order = sorted(range(len(s)), key=lambda j: (-s[j], right[j]))
            hits[level, i] = any(right[j] for j in order[:k])
    return tuple(hits.mean(1))


@pytest.mark.parametrize("ties", [False, True])
def test_recall_is_the_brute_force_one(ties):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (60,), generator=g)
    size = (60, 3 if ties else 40)
    query, gallery = (torch.randint(-2, 3, size, generator=g).float() for _ in range(2))
    found = recall_at_k(query, gallery, labels, (1, 5, 10, 20))
    for k in found:
        expected = brute_force(query.numpy(), gallery.numpy(), labels.numpy(), k)
        assert found[k] == pytest.approx(expected, abs=1e-12)


def test_recall_of_known_features():
    q, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    assert recall_at_k(q, q, labels, (1,)) == {1: (1.0, 1.0)}
    swapped = q[[1, 0, 3, 2]]           # each query finds the other clip of its class
    assert recall_at_k(q, swapped, labels, (1, 2)) == {1: (0.0, 1.0), 2: (0.0, 1.0)}
    alike = torch.ones(4, 1)                              # all ties: counted against the model
    found = recall_at_k(alike, alike, labels, (1, 3, 4))
    assert found == {1: (0.0, 0.0), 3: (0.0, 1.0), 4: (1.0, 1.0)}


def test_ranks_do_not_depend_on_how_queries_are_cut():
    g = torch.Generator().manual_seed(1)
    q, v = (torch.randn(70, 8, generator=g).double() for _ in range(2))
    labels = torch.arange(70) % 6
    whole = torch.stack(ranks(q, v, labels))
    for chunk in (1, 7, 70):
        assert torch.stack(ranks(q, v, labels, chunk=chunk)).equal(whole)
    parts = [torch.stack(ranks(q, v, labels, first, last, 9))
             for first, last in ((0, 23), (23, 23), (23, 70))]
    assert torch.cat(parts, 1).equal(whole)


@pytest.mark.parametrize("labels", [torch.arange(200) % 8, (torch.arange(200) ** 0.5).long() % 7])
def test_random_features_land_on_chance(labels):
    g = torch.Generator().manual_seed(0)
    ks, trials = (1, 5, 10, 20), 30
    expected = chance(labels, ks)
    draw = lambda: torch.randn(200, 64, generator=g)
    found = [recall_at_k(draw(), draw(), labels, ks) for _ in range(trials)]
    for k in ks:
        for level in (0, 1):
            values = np.array([f[k][level] for f in found])
            error = max(values.std() / trials ** 0.5, 1e-3)
            assert abs(values.mean() - expected[k][level]) < 3 * error, (k, level)


def test_command_prints_and_keeps_the_table(brief, capsys):
    for feature in ("y", "z"):
        assert run_here(retrieval, "--checkpoint", brief, "--clips", "2", "--feature", feature) == 0
        text = capsys.readouterr().out
        kept = json.loads((brief.parent / "retrieval.json").read_text())
        assert kept["pool"] == 24 and kept["classes"] == 2 and kept["feature"] == feature
        value, error = kept["class, video -> audio"]["R@5"]
        assert f"{100 * value:.1f} +- {100 * error:.1f}" in text and f"feature {feature}" in text
        assert kept["instance, chance"]["R@5"] == pytest.approx(5 / 24)


def damaged(tree, tmp_path, chosen):
    """`with_damaged` of the tree's test part."""
    rows = [row for row in scan.scan(tree) if row["split"] == "test"]
    return with_damaged(rows, tmp_path, chosen)


@pytest.mark.slow
def test_a_file_that_fails_leaves_the_pool(tree, brief, tmp_path):
    """One of 24, on the last process: the numbers are those without it, and the table says so."""
    with_it, without = damaged(tree, tmp_path, (13,))
    found = []
    for data, processes in ((without, 1), (with_it, 1), (with_it, 2)):
        done = run("--checkpoint", brief, "--data", data, "--clips", "2", script="retrieval.py",
                   processes=processes)
        kept = json.loads((brief.parent / "retrieval.json").read_text())
        many = int(data == with_it)
        assert (kept.pop("failed"), kept.pop("videos"), kept["pool"]) == (many, 23 + many, 23)
        assert done.stdout.count("of 2 classes (0 left out; 1 of 24 videos failed)") == many
        assert done.stderr.count(f"failed: {tmp_path / 'bad13.mp4'}: Invalid data") == many
        kept.pop("data")
        found.append(kept)
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_two_processes_count_their_failures_together(tree, brief, tmp_path):
    """One of each process's twelve: each alone is within the share of 24, both are not."""
    data, _ = damaged(tree, tmp_path, (4, 13))
    done = run("--checkpoint", brief, "--data", data, "--clips", "2", script="retrieval.py",
               processes=2, check=False)
    assert done.returncode != 0 and "R@20" not in done.stdout
    assert re.search("error(?: on rank 1)?: 2 of 24 videos failed, more than a share of 0.05, the "
                     f"last: {tmp_path}/bad13.mp4: Invalid", done.stderr)


def test_bad_input(brief, tmp_path, capsys):
    made = make_video(tmp_path / "silent" / "test" / "c" / "0.mp4", 1, 10, tone=None)
    for n in range(1, 22):
        (made.parent / f"{n}.mp4").write_bytes(made.read_bytes())
    made = make_video(tmp_path / "one" / "test" / "c" / "0.mp4", 1, 10)
    for n in range(1, 22):
        (made.parent / f"{n}.mp4").write_bytes(made.read_bytes())
    (tmp_path / "few" / "test" / "c").mkdir(parents=True)
    (tmp_path / "few" / "test" / "c" / "0.mp4").write_bytes(made.read_bytes())
    state = torch.load(brief, weights_only=True)
    state["model"]["h_a.3.bias"][:] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    for n in range(22):
        path = tmp_path / "bad" / f"class{n % 2}" / f"bad{n}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.read_bytes())
    scan.write(scan.scan(tmp_path / "bad"), tmp_path / "bad.csv")
    for n in (0, 2):
        (tmp_path / "bad" / "class0" / f"bad{n}.mp4").write_bytes(b"damaged since the scan")
    with open(tmp_path / "bad.csv") as file, open(tmp_path / "twenty.csv", "w") as twenty:
        twenty.writelines(line for line in file if not re.search("bad[23].mp4", line))
    for flags, sentence in (
            (["--checkpoint", tmp_path / "gone.pt"], "no checkpoint"),
            (["--checkpoint", brief.parent / "video_encoder.pt"],
             "is no checkpoint.pt of this project: it lacks model, settings"),
            (["--data", tmp_path / "silent"], "0 usable clips in the 'test' part, but R@20 needs "
             "20 or more; left out: 22 no audio"),
            (["--data", tmp_path / "few"], "1 usable clips in the 'test' part"),
            (["--data", tmp_path / "bad.csv", "--split", "all"],
             "2 of 22 videos failed, more than a share of 0.05, "
             f"the last: {tmp_path}/bad/class0/bad2.mp4: Invalid data found when processing input; "
             "all are named above"),
            (["--data", tmp_path / "twenty.csv", "--split", "all"], "19 usable clips in the 'all' "
             "part, but R@20 "
             "needs 20 or more; left out: 1 failed"),
            (["--checkpoint", tmp_path / "nan.pt"], "features are not finite"),
            (["--data", tmp_path / "one", "--split", "val"], "has no 'val' part")):
        status = run_here(retrieval, "--checkpoint", brief, *flags)
        errors = [line for line in capsys.readouterr().err.splitlines()
                  if line.startswith("error: ")]
        assert status == 1 and len(errors) == 1 and sentence in errors[0], errors


# ---- data without labels or parts

def rows_of(tree, part=None, **changes):
    """The rows of the tree's part, or of all, with columns changed."""
    return [row | changes for row in scan.scan(tree) if part in (None, row["split"])]


@pytest.mark.parametrize("label,many", [("", 24), ("", 1), ("one", 24)])
def test_without_classes_the_table_is_at_instance_level(tree, brief, tmp_path, capsys, label, many):
    """The numbers are those with labels, and no line compares by class."""
    found, labelled = [], rows_of(tree, "test")
    changed = [row | {"label": label} for row in labelled[:many]] + labelled[many:]
    for name, rows in (("with", labelled), ("no", changed)):
        scan.write(rows, tmp_path / f"{name}.csv")
        flags = "--checkpoint", brief, "--data", tmp_path / f"{name}.csv", "--clips", 1
        assert run_here(retrieval, *flags) == 0
        found.append(json.loads((brief.parent / "retrieval.json").read_text()))
    text = capsys.readouterr().out
    assert text.count("\nclass ") == 3 and "24 clips (0 left out)" in text
    assert text.endswith("needs two classes or more, and a label for every clip.\n")
    assert found[1].pop("classes") == 0 and found[0].pop("classes") == 2
    assert found[1].pop("data") != found[0].pop("data")
    assert found[1] == {key: value for key, value in found[0].items() if "class," not in key}


def test_data_without_parts_need_a_word(tree, brief, tmp_path, capsys):
    """They are refused, also for a query; --split all takes all parts of any data, and says so."""
    scan.write(rows_of(tree, split=""), tmp_path / "no.csv")
    scan.write(rows_of(tree), tmp_path / "parts.csv")
    film = scan.scan(tree)[0]["path"]
    for more in ([], ["--query", film]):
        assert run_here(retrieval, "--checkpoint", brief, "--data", tmp_path / "no.csv", *more) == 1
        error = capsys.readouterr().err
        assert "error: --data" in error and "no.csv has no parts" in error
        assert "python -m prepare.manifest folder ROOT --test-share 0.2" in error
        assert "--split all" in error
    flags = "--checkpoint", brief, "--clips", 1
    for name in ("no.csv", "parts.csv"):
        assert run_here(retrieval, *flags, "--data", tmp_path / name, "--split", "all") == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert "34 clips of 2 classes, includes training clips (0 left out)" in first
        kept = json.loads((brief.parent / "retrieval.json").read_text())
        assert kept["includes_training_clips"] is True and kept["pool"] == 34
    assert run_here(retrieval, *flags, "--split", "all", "--query", film) == 0
    assert "pool of 34 clips, includes training clips" in capsys.readouterr().out.splitlines()[0]
    for split in ("train", "test"):
        assert run_here(retrieval, *flags, "--split", split, "--query", film) == 0
        assert ("includes training clips" in capsys.readouterr().out) == (split == "train")
    assert run_here(retrieval, *flags) == 0
    assert "training clips" not in capsys.readouterr().out
    kept = json.loads((brief.parent / "retrieval.json").read_text())
    assert "includes_training_clips" not in kept


# ---- one's own files

def write_wave(path, samples, rate=RATE, codec=None):
    """A file of sound alone: wav in 32-bit floats, or mp3."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec or "pcm_f32le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], "fltp", "mono")
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for piece in av.AudioResampler(stream.format.name, "mono", rate).resample(frame):
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return path


def tone(hz, seconds, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


@pytest.fixture
def float32(monkeypatch):
    """The same numbers on all CPUs, as exact as those of a plain loop."""
    monkeypatch.setattr(retrieval, "choose_precision", lambda *_: (torch.float32, "test"))


@pytest.fixture(scope="module")
def pool(tree, brief, tmp_path_factory):
    """The npz of the tree's test part, and one in which sounds and videos have changed places."""
    saved = tmp_path_factory.mktemp("pool") / "features.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "choose_precision", lambda *_: (torch.float32, "test"))
        assert run_here(retrieval, "--checkpoint", brief, "--clips", 3, "--save", saved) == 0
    arrays = dict(np.load(saved))
    exchanged = {name: arrays[name.replace("audio", "x").replace("video", "audio")
                              .replace("x", "video")] for name in arrays}
    np.savez(saved.with_name("exchanged.npz"), **exchanged)
    return saved, saved.with_name("exchanged.npz")


def ask(brief, *flags, status=0):
    """Run a query: {"file: its sound finds these videos": [(similarity, label, path)]}, text."""
    done = run("--checkpoint", brief, *flags, script="retrieval.py", check=status == 0)
    assert done.returncode == status
    found = {}
    for line in done.stdout.splitlines():
        if line.endswith((" finds these videos", " find these sounds")):
            hits = found.setdefault(line.rsplit("/", 1)[-1], [])
        elif re.match(r" +\d+ ", line):
            place, similarity, label, path = line.split()
            hits.append((float(similarity), label, path))
            assert int(place) == len(hits)
    return found, done.stdout + done.stderr


def test_pool_has_the_features_of_each_file(tree, brief, pool):
    """In a plain loop: each clip alone through f, g, h_v and h_a."""
    arrays = np.load(pool[0])
    rows = rows_of(tree, "test")
    assert arrays["paths"].tolist() == [row["path"] for row in rows]
    assert arrays["labels"].tolist() == [row["label"] for row in rows]
    model, settings = load_svaclr(brief, SvaCLR)
    model.eval()
    for n in (0, 17):
        means = {}
        for t0 in np.linspace(0, rows[n]["duration"] - 0.5, 3):
            frames, wave = read_clip(rows[n]["path"], t0, (1,), (1,), 4, 8, 16, centre_crop)
            with torch.no_grad():
                y_a = model.g(LogMel()(wave))
                y_v = model.f(normalize_frames(frames))
                features = {"y_audio": y_a, "y_video": y_v, "z_audio": model.h_a(y_a),
                            "z_video": model.h_v(y_v)}
            for name, x in features.items():
                means[name] = means.get(name, 0) + normalize(x[0], dim=0) / 3
        for name, x in means.items():
            assert arrays[name].dtype == np.float32 and arrays[name].shape == (24, len(x))
            assert np.allclose(np.linalg.norm(arrays[name], axis=1), 1, atol=1e-5)
            assert arrays[name][n] @ normalize(x, dim=0).numpy() > 0.999, name
    about = json.loads(str(arrays["settings"]))
    assert about["clips_per_file"] == 3 and about["split"] == "test" and len(about["weights"]) == 8


@pytest.mark.parametrize("feature", ["z", "y"])
def test_a_file_of_the_pool_finds_itself(tree, brief, pool, float32, feature):
    """Where sounds and videos have changed places, a sound searches sounds, among them its own."""
    paths = [rows["path"] for rows in rows_of(tree, "test")]
    for n in (3, 20):
        flags = "--query", paths[n], "--pool", pool[1], "--feature", feature, "--top", 3
        found, _ = ask(brief, *flags)
        assert len(found) == 2
        for hits in found.values():
            assert len(hits) == 3 and hits[0][0] == pytest.approx(1, abs=1e-3)
            assert hits[0][2] == paths[n] and hits[0][0] >= hits[2][0]


def test_a_saved_pool_answers_as_the_videos_do(tree, brief, pool, float32):
    """The same lines, to the digit. They are the cosines of the npz, in descending order."""
    film = rows_of(tree, "test")[5]["path"]
    saved, _ = ask(brief, "--query", film, "--pool", pool[0], "--top", 24)
    read, _ = ask(brief, "--query", film, "--top", 24, "--clips", 3)
    assert saved == read and len(saved) == 2
    arrays = np.load(pool[0])
    for (way, hits), (q, g) in zip(saved.items(), (("audio", "video"), ("video", "audio"))):
        similarity = arrays[f"z_{g}"] @ arrays[f"z_{q}"][5]
        order = similarity.argsort()[::-1]
        what = {"audio": "sound finds these videos", "video": "pictures find these sounds"}[q]
        assert way == f"{Path(film).name}: its {what}"
        assert [s for s, _, _ in hits] == pytest.approx(similarity[order], abs=2e-3)
        assert sorted(path for *_, path in hits) == sorted(arrays["paths"])


def test_files_with_one_modality_ask_in_one_direction(brief, pool, tmp_path):
    """A wav and an mp3 find the sounds of their pitch, a silent film the pictures of its gray."""
    write_wave(tmp_path / "high.wav", tone(1010, 3))
    write_wave(tmp_path / "low.mp3", tone(410, 3, 44100), 44100, "mp3")
    make_video(tmp_path / "silent.mp4", 3.0, 10, tone=None, gray=lambda t: 205)
    make_video(tmp_path / "short.mp4", 0.3, 10, tone=410, gray=lambda t: 75)
    files = [tmp_path / name for name in ("high.wav", "low.mp3", "silent.mp4", "short.mp4")]
    found, text = ask(brief, "--query", *files, "--pool", pool[1])
    assert list(found) == ["high.wav: its sound finds these videos",
                           "low.mp3: its sound finds these videos",
                           "silent.mp4: its pictures find these sounds",
                           "short.mp4: its sound finds these videos",
                           "short.mp4: its pictures find these sounds"]
    for (_, hits), label in zip(found.items(), ("high", "low", "high", "low", "low")):
        assert [hit[1] for hit in hits] == [label] * 5
    for name in ("high.wav", "low.mp3"):
        assert f"{name}: its pictures cannot be used (no video stream)" in text
    assert "silent.mp4: its sound cannot be used (no audio stream)" in text
    assert text.count("cannot be used") == 3


def test_clips_of_a_query(tmp_path):
    """They are spaced as those of the pool; a short file ends in its last frame and in silence."""
    settings = retrieval.argparse.Namespace(frames=4, fps=8, size=32)
    wave = np.arange(3 * RATE) / (3 * RATE)
    write_wave(tmp_path / "ramp.wav", wave)
    read, damaged = read_sound(tmp_path / "ramp.wav")
    assert np.abs(read - wave).max() < 1e-6 and damaged == []
    waves = sound_clips(tmp_path / "ramp.wav", "", 6, 0.5)
    starts = [0, 0.5, 1.0, 1.5, 2.0, 2.5]
    for clip, t0 in zip(waves, starts, strict=True):
        assert np.abs(clip.numpy() - wave[round(t0 * RATE):][:RATE // 2]).max() < 1e-6
    middle, = sound_clips(tmp_path / "ramp.wav", "", 1, 0.5)
    assert middle[0] == pytest.approx(1.25 / 3, abs=1e-4)
    write_wave(tmp_path / "short.wav", wave[-RATE // 4:])
    for clip in sound_clips(tmp_path / "short.wav", "", 2, 0.5):
        assert np.allclose(clip[:RATE // 4], wave[-RATE // 4:]) and not clip[RATE // 4:].any()

    film = make_video(tmp_path / "film.mp4", 4.0, 8, tone=500)
    frames, waves, missing = read_query(film, settings, 3)
    assert missing == {} and frames.shape == (1, 3, 4, 32, 32, 3) and waves.shape == (1, 3, 12000)
    short = make_video(tmp_path / "short.mp4", 0.25, 8, tone=500)
    frames, waves, missing = read_query(short, settings, 2)
    assert missing == {} and (frames[0, :, 1:] == frames[0, :, 1:2]).all()
    assert waves[0, :, :5000].std() > 0.1 and not waves[0, :, 9000:].any()


def test_damage_between_the_clips_of_a_query_does_no_harm(tmp_path):
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


def test_figure_of_queries(tree, brief, pool, tmp_path):
    """A line for each query. Films that have gone leave empty places."""
    arrays = dict(np.load(pool[0]))
    arrays["paths"][:] = "/gone/a$^$_$film.mp4"            # is no formula
    np.savez(tmp_path / "gone.npz", **arrays)
    write_wave(tmp_path / "a.wav", tone(700, 1))
    film, out = rows_of(tree, "test")[0]["path"], tmp_path / "out.png"
    sizes, drawn = [], []
    for queries, saved in (([film], pool[0]), ([film, tmp_path / "a.wav"], tmp_path / "gone.npz")):
        _, text = ask(brief, "--query", *queries, "--pool", saved, "--top", 6, "--figure", out)
        assert f"{out}: the queries and what they find" in text
        with av.open(str(out)) as container:
            image = next(container.decode(video=0)).to_ndarray(format="rgb24")
        sizes.append(image.shape)
        drawn.append((image[:, 250:] < 240).mean())                     # right of the queries
    assert sizes == [(480, 1330, 3), (720, 1330, 3)]
    assert drawn[0] > 0.4 and drawn[1] < 0.1


def test_bad_queries(tree, brief, pool, tmp_path, capsys):
    film = rows_of(tree, "test")[0]["path"]
    (tmp_path / "text.mp4").write_text("no film")
    state = torch.load(brief, weights_only=True)
    state["model"]["h_a.3.bias"][:] += 1
    torch.save(state, tmp_path / "other.pt")
    np.savez(tmp_path / "array.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(pool[0].read_bytes()[:20000])
    (tmp_path / "text.npz").write_text("no pool")
    saved = ["--query", film, "--pool"]
    for flags, status, sentence in (
            (["--query", tmp_path / "gone.wav", "--pool", pool[0]], 1,
             f"--query {tmp_path}/gone.wav has no pictures (cannot be read: No such file"),
            (["--query", tmp_path / "text.mp4", "--pool", pool[0]], 1,
             "and no sound (Invalid data found when processing input): give a sound or video file"),
            (["--query", film, tmp_path / "gone.wav"], 1, "gone.wav has no pictures"),
            ([*saved, tmp_path / "gone.npz"], 1, "gone.npz: No such file or directory"),
            *(([*saved, tmp_path / name], 1, f"--pool {tmp_path / name} is no pool")
              for name in ("array.npz", "array.npy", "cut.npz", "text.npz", "other.pt")),
            ([*saved, pool[0], "--checkpoint", tmp_path / "other.pt"], 1,
             f"{pool[0]} has features of another model, {brief} with the weights "),
            (["--pool", pool[0]], 2, "--pool is for --query FILE"),
            (["--top", 3], 2, "--top is for --query FILE"),
            (["--figure", "a.png"], 2, "--figure is for --query FILE"),
            ([*saved, pool[0], "--clips", 4], 2, "--clips is not read with --pool"),
            ([*saved, pool[0], "--data", tree], 2, "--data is not read with --pool"),
            (["--save", tmp_path / "no" / "a.npz"], 2, f"there is no folder {tmp_path}/no"),
            (["--save", brief], 2, "give a name that ends in .npz"),
            (["--query", film, "--figure", film], 2, "a name that ends in .png or .pdf or .svg"),
            (["--gallery", "val"], 2, "--gallery is for --pair video-video"),
            (["--frames", 3], 2, "--frames is for --pair video-video"),
            (["--pair", "video-video", "--query", film], 2, "--query is for --pair audio-video"),
            (["--pair", "video-video", "--feature", "y"], 2, "--feature is for --pair audio-video"),
            (["--pair", "video-video", "--split", "train"], 2, "a video would find itself"),
            (["--pair", "video-video", "--gallery", "all"], 2, "a video would find itself")):
        try:
            found = run_here(retrieval, "--checkpoint", brief, *flags)
        except SystemExit as stop:
            found = stop.code
        error = capsys.readouterr().err
        assert found == status and error.count("error: ") == 1 and sentence in error, error


def test_lines_for_numpy_run_as_written(pool, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/running.md").read_text().partition("## Your own files")[2]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 5
    monkeypatch.chdir(pool[0].parent)
    exec(code, {})
    arrays = np.load(pool[0])
    nearest = (arrays["z_video"] @ arrays["z_audio"][0]).argmax()
    assert arrays["paths"][nearest] in capsys.readouterr().out.split("'")[1]


# ---- video to video

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


def test_chance_of_videos():
    """Drawing k of the gallery without putting back misses the class in C(n-m, k) of C(n, k)."""
    labels, gallery_labels = torch.tensor([0, 0, 1, 2]), torch.tensor([0] * 3 + [1] * 20 + [3] * 7)
    for k, found in class_chance(labels, gallery_labels, (1, 5, 20)).items():
        miss = [math.comb(30 - m, k) / math.comb(30, k) for m in (3, 3, 20, 0)]
        assert found == pytest.approx(1 - sum(miss) / 4)


def compare(checkpoint, data, *flags, written=None, **how):
    """Run the comparison of videos: what it writes, and what it prints."""
    done = run("--checkpoint", checkpoint, "--pair", "video-video", "--data", data, "--clips", 3,
               "--split", "train", "--gallery", "test", *flags, script="retrieval.py", **how)
    written = written or checkpoint.with_name("retrieval.json")
    return json.loads(written.read_text()), done.stdout


@pytest.fixture
def features(monkeypatch):
    """A list that grows by the y_v of the queries of each comparison."""
    found = []
    monkeypatch.setattr(pools, "video_ranks", lambda query, *more: (
        found.append(query), video_ranks(query, *more))[1])
    return found


@pytest.fixture
def silent(tree, tmp_path):
    """The tree's manifest. Half of the files have no sound, one query's class is unique, and one
    query becomes brighter from clip to clip."""
    rows = [row | {"has_audio": n % 2} for n, row in enumerate(scan.scan(tree))]
    only, bright = (row for row in rows if row["path"].endswith(("train/low/0.mp4",
                                                                 "train/low/1.mp4")))
    only["label"] = "only"
    bright["path"] = str(make_video(tmp_path / "bright.mp4", 3.0, 10, gray=lambda t: 30 + 60 * t))
    scan.write(rows, tmp_path / "silent.csv")
    return rows, tmp_path / "silent.csv"


def test_videos_find_videos(brief, silent, features, float32):
    """The features in a plain loop, y_v of each clip through f, and their ranks in plain loops."""
    rows, data = silent
    kept, text = compare(brief, data)
    f, y = load_encoder(brief, video_encoder("r2plus1d_10"), "r2plus1d_10").eval(), {"train": [], "test": []}
    labels = {"train": [], "test": []}
    for row in rows:
        clips = [read_clip(row["path"], t0, (1,), (), 4, 8, 16, centre_crop)[0][0]
                 for t0 in np.linspace(0, row["video_duration"] - 0.5, 3)]
        with torch.no_grad():
            y_v = f(normalize_frames(torch.stack(clips)))
        y[row["split"]].append(normalize(normalize(y_v, dim=1).mean(0), dim=0).numpy())
        labels[row["split"]].append(row["label"])
    assert np.allclose(features[0], y["train"], atol=1e-5)
    before, right = plain_video_ranks(y["train"], np.stack(y["test"]), labels["train"],
                                      labels["test"])
    found = kept["class, video -> video"]
    for k in (1, 5, 10, 20):
        assert found[f"R@{k}"][0] == pytest.approx(np.mean([n < k for n in before]))
    assert found["20-NN"][0] == pytest.approx(np.mean(right)) and 0.4 < np.mean(right) < 1
    assert (kept["queries"], kept["pool"], kept["classes"]) == (10, 24, 2)
    assert kept["queries_without_class"] == 1
    assert "1 of 10 queries miss always: the gallery has no video of their class." in text
    assert re.search(r"R@20 +20-NN\nclass +video -> video(?: +[\d.]+ \+- [\d.]+){5}\n"
                     r"class +chance(?: +[\d.]+){4} *\n", text)
    assert kept["class, chance"]["R@1"] == pytest.approx(0.45)


def test_every_encoder_can_be_compared(brief, silent, features, tmp_path, monkeypatch, capsys):
    """video_encoder.pt gives the numbers of checkpoint.pt, whose settings are then flags."""
    data = silent[1]
    clip = "--frames", 4, "--fps", 8, "--size", 16, "--arch", "r2plus1d_10"
    expected, _ = compare(brief, data)
    kept, _ = compare(brief.with_name("video_encoder.pt"), data, *clip,
                      written=brief.with_name("retrieval-video_encoder.json"))
    for key in ("class, video -> video", "class, chance", "queries", "pool", "frames", "fps",
                "size"):
        assert kept[key] == expected[key], key
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for _ in range(2):                          # random weights are the same each time
        kept, _ = compare("none", data, *clip, "--clips", 1,
                          written=Path("runs/retrieval-none.json"))
        assert kept["checkpoint"] == "none"
    assert torch.allclose(*features[-2:], atol=1e-6)
    shutil.copy(brief.with_name("video_encoder.pt"), tmp_path)
    assert run_here(retrieval, "--pair", "video-video", *clip, "--checkpoint",
                    tmp_path / "video_encoder.pt") == 1                 # no built-in set is made
    assert "does not say what data it is to be measured on: give --data" in capsys.readouterr().err
    flags = "--pair", "video-video", "--data", data, "--gallery", "train"
    for more, sentence in (
            (["--checkpoint", brief.with_name("video_encoder.pt")],
             "does not fit --arch r2plus1d_18"),
            (["--checkpoint", tmp_path / "gone.pt"], "no checkpoint"),
            (["--checkpoint", brief], "10 usable clips in the 'train' part, but R@20 needs 20"),
            (["--checkpoint", brief, "--split", "val"], "has no 'val' part")):
        assert run_here(retrieval, *flags, *more) == 1
        error = capsys.readouterr().err
        assert sentence in error and "evaluating" not in error          # before the work
    rows = [row | {"label": row["label"] * (n > 0)} for n, row in enumerate(silent[0])]
    scan.write(rows, tmp_path / "no.csv")
    assert run_here(retrieval, "--checkpoint", brief, "--pair", "video-video", "--split", "train",
                    "--gallery", "test", "--data", tmp_path / "no.csv") == 1
    assert "it needs a label for every video" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_save_and_compare_as_one(tree, brief, silent, tmp_path):
    one, _ = compare(brief, silent[1])
    two, _ = compare(brief, silent[1], processes=2)
    assert one == two
    film, flags = rows_of(tree, "test")[5]["path"], ["--checkpoint", brief, "--clips", 2, "--query"]
    for n in (1, 2):
        done = run(*flags, film, "--save", tmp_path / f"{n}.npz", script="retrieval.py",
                   processes=n)
        assert done.stdout.count("finds these videos") == 1
    saved, again = (np.load(tmp_path / f"{n}.npz") for n in (1, 2))
    assert saved.keys() == again.keys()
    for name in saved:
        if saved[name].dtype == np.float32:
            assert np.allclose(saved[name], again[name], atol=2e-3)
        elif name != "settings":
            assert saved[name].tolist() == again[name].tolist()
