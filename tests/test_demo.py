"""prepare/demo.py: the set repeats, its files are real, and sight and sound are linked."""

from itertools import combinations, product

import av
import numpy as np
import pytest

from data import read_clip
from prepare import demo


def test_a_clip_depends_on_seed_and_name_alone(tmp_path):
    contents = []
    for root, seed in (("a", 0), ("b", 0), ("c", 1)):
        # Free memory holds other bytes each time, and none may come into the files.
        held = [np.random.bytes(n) for n in np.random.randint(100, 100_000, 300)][::2]
        demo.make_clip(tmp_path / root, seed, (), ("train", "bell", 3))
        path = tmp_path / root / "train" / "bell" / "003.mp4"
        contents.append(path.read_bytes())
        del held
    assert contents[0] == contents[1] != contents[2]
    with av.open(str(path)) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]
        assert container.duration / av.time_base >= 4
    video, audio = read_clip(path, 0, (1, 4), (1, 4), 8, 8, 64)
    assert video.float().std() > 5 and audio.abs().max() > 0.1


def test_landings_are_seen_and_heard_together():
    times = demo.landings((2, 1, 1), tempo=1.5, phase=0.4)
    inside = times[(times > 0.3) & (times < 4.2)]
    film = demo.draw("disc", 10, times, np.random.default_rng(1)).astype(float)
    wave = demo.synthesise(400, (1,), 0.03, 0, times, np.random.default_rng(0))
    difference = np.abs(film - film[:, :8].mean((1, 2), keepdims=True)).sum(3)
    near_floor = difference[:, 54:].sum((1, 2))
    landing_frames = np.round(inside * demo.FPS).astype(int)
    flight_frames = np.round((inside[:-1] + inside[1:]) / 2 * demo.FPS).astype(int)
    assert len(inside) >= 5
    assert near_floor[landing_frames].min() > near_floor[flight_frames].max()
    for landing in inside:
        n = int(landing * demo.RATE)
        assert np.abs(wave[n:n + 1200]).max() > 3 * np.abs(wave[n - 2400:n - 100]).max()


@pytest.mark.parametrize("hide", [[], ["kind"], ["rhythm"], ["kind", "rhythm"]])
def test_hidden_links(hide, tmp_path, monkeypatch):
    """Of six films of three kinds. Each keeps a tempo of its own."""
    seen, heard = [], []
    monkeypatch.setattr(demo, "draw", lambda *drawn: seen.append(drawn))
    monkeypatch.setattr(demo, "synthesise", lambda *sounded: heard.append(sounded))
    monkeypatch.setattr(demo, "write", lambda *_: None)
    for kind, n in product(("bell", "string", "plate"), range(2)):
        demo.make_clip(tmp_path, 0, hide, ("test", kind, n))
    shapes, radii, landings, _ = zip(*seen)
    pitches, *modes, landings_heard, _ = zip(*heard)
    assert all(times is same for times, same in zip(landings, landings_heard))
    looks, sizes = (1, 1) if "kind" in hide else (3, 6)
    assert len({*shapes}) == len({*zip(*modes)}) == looks
    assert len({*radii}) == len({*pitches}) == sizes
    hops = [np.diff(times) for times in landings]
    assert [np.allclose(hop, hop[0]) for hop in hops] == ["rhythm" in hide] * 6
    assert len({times[0] for times in landings}) == len({hop[0] for hop in hops}) == 6


def test_shapes_differ():
    y, x = np.mgrid[0:64, 0:64] - 31.5
    masks = [demo.mask(shape, x, y, 14) for shape, *_ in demo.KINDS.values()]
    assert all(100 < mask.sum() < 1000 for mask in masks)
    assert all(np.abs(a - b).sum() > 80 for a, b in combinations(masks, 2))
