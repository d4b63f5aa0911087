"""The built-in set: reproducible, real files, and the links between sight and sound that its docstring promises."""

import av
import numpy as np
from conftest import peak_hz

from data import read_clip
from prepare import demo


def test_a_clip_is_a_function_of_seed_and_name(tmp_path):
    bytes_of = []
    for root, seed in (("a", 0), ("b", 0), ("c", 1)):
        held = [np.random.bytes(size) for size in np.random.default_rng().integers(100, 1e5, 300)][::2]
        (tmp_path / root / "train" / "bell").mkdir(parents=True)
        demo.make_clip(tmp_path / root, seed, ("train", "bell", 3))
        bytes_of.append((tmp_path / root / "train" / "bell" / "003.mp4").read_bytes())
        assert len(held) == 150                           # memory looks different every time
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]
    with av.open(str(tmp_path / "a" / "train" / "bell" / "003.mp4")) as container:
        assert [s.codec_context.name for s in container.streams] == ["h264", "aac"]
        assert container.duration / av.time_base >= 4
    video, audio = read_clip(tmp_path / "a" / "train" / "bell" / "003.mp4", 0, (1, 4), (1, 4), 8, 8, 64)
    assert video.float().std() > 5 and audio.abs().max() > 0.1


def test_landings_are_seen_and_heard_together():
    rng = np.random.default_rng(0)
    times = demo.landings((2, 1, 1), tempo=1.5, phase=0.4)
    inside = times[(times > 0.3) & (times < 4.2)]
    film = demo.draw("disc", 10, times, np.random.default_rng(1)).astype(float)
    wave = demo.synthesise(400, (1,), 0.03, 0, times, rng)
    low = np.abs(film - film[:, :8].mean((1, 2), keepdims=True)).sum(3)[:, 54:].sum((1, 2))     # the body near the floor
    frame = np.round(inside * demo.FPS).astype(int)
    aloft = np.round((inside[:-1] + inside[1:]) / 2 * demo.FPS).astype(int)
    assert len(inside) >= 5 and low[frame].min() > low[aloft].max()
    for landing in inside:
        at = int(landing * demo.RATE)
        assert np.abs(wave[at:at + 1200]).max() > 3 * np.abs(wave[at - 2400:at - 100]).max()


def test_pitch_goes_with_size_and_class_with_ratios():
    rng = np.random.default_rng(0)
    for f in (180, 450):
        wave = demo.synthesise(f, demo.KINDS["woodblock"][1], 0.3, 0, np.array([0.0, 9.0]), rng)
        assert abs(peak_hz(wave[:24000]) - f) < 5


def test_shapes_differ():
    y, x = np.mgrid[0:64, 0:64] - 31.5
    masks = {kind: demo.mask(row[0], x, y, 14) for kind, row in demo.KINDS.items()}
    names = list(masks)
    for i, a in enumerate(names):
        assert 100 < masks[a].sum() < 1000
        for b in names[i + 1:]:
            assert np.abs(masks[a] - masks[b]).sum() > 80, (a, b)
