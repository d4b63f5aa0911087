"""prepare/demo.py: the set repeats, its files are real, and sight and sound are linked as its
docstring says."""

import av
import numpy as np

from data import read_clip
from prepare import demo


def test_a_clip_depends_on_seed_and_name_alone(tmp_path):
    contents = []
    for root, seed in (("a", 0), ("b", 0), ("c", 1)):
        # Free memory has other contents each time, and none of it may come into the files.
        sizes = np.random.default_rng().integers(100, 1e5, 300)
        held = [np.random.bytes(size) for size in sizes][::2]
        demo.make_clip(tmp_path / root, seed, (), ("train", "bell", 3))
        contents.append((tmp_path / root / "train" / "bell" / "003.mp4").read_bytes())
        assert len(held) == 150
    assert contents[0] == contents[1] != contents[2]
    path = tmp_path / "a" / "train" / "bell" / "003.mp4"
    with av.open(str(path)) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]
        assert container.duration / av.time_base >= 4
    video, audio = read_clip(path, 0, (1, 4), (1, 4), 8, 8, 64)
    assert video.float().std() > 5 and audio.abs().max() > 0.1


def test_landings_are_seen_and_heard_together():
    rng = np.random.default_rng(0)
    times = demo.landings((2, 1, 1), tempo=1.5, phase=0.4)
    inside = times[(times > 0.3) & (times < 4.2)]
    film = demo.draw("disc", 10, times, np.random.default_rng(1)).astype(float)
    wave = demo.synthesise(400, (1,), 0.03, 0, times, rng)
    difference = np.abs(film - film[:, :8].mean((1, 2), keepdims=True)).sum(3)      # (T, H, W)
    near_floor = difference[:, 54:].sum((1, 2))            # (T,): how much of the body is low
    landing_frames = np.round(inside * demo.FPS).astype(int)
    flight_frames = np.round((inside[:-1] + inside[1:]) / 2 * demo.FPS).astype(int)
    assert len(inside) >= 5
    assert near_floor[landing_frames].min() > near_floor[flight_frames].max()
    for landing in inside:
        n = int(landing * demo.RATE)
        assert np.abs(wave[n:n + 1200]).max() > 3 * np.abs(wave[n - 2400:n - 100]).max()


def test_hidden_links(tmp_path, monkeypatch):
    """What is drawn and sounded of films of three kinds: looks, sizes, and patterns of landings."""
    made = []
    monkeypatch.setattr(demo, "draw", lambda shape, r, times, rng: made.append([shape, r, times]))
    monkeypatch.setattr(demo, "synthesise", lambda f, ratios, damping, noise, times, rng:
                        made[-1].append((f, ratios, damping, noise, times is made[-1][2])))
    monkeypatch.setattr(demo, "write", lambda *_: None)

    def count(*hide):
        """How many looks, sounds and sizes there are among 6 films, and which share of the hops of
        a film are as long as its first."""
        made.clear()
        for kind in ("bell", "string", "plate"):
            for n in range(2):
                demo.make_clip(tmp_path, 0, hide, ("test", kind, n))
        assert all(sound[-1] for *_, sound in made)         # landings are seen and heard together
        even = [np.mean(np.isclose(np.diff(times), np.diff(times)[0])) for *_, times, _ in made]
        return (len({shape for shape, *_ in made}), len({sound[1:] for *_, sound in made}),
                len({r for _, r, *_ in made}), max(even) < 1, min(even) == 1)

    assert count() == (3, 3, 6, True, False)
    assert count("kind") == (1, 1, 1, True, False)
    assert count("rhythm") == (3, 3, 6, False, True)
    assert count("kind", "rhythm") == (1, 1, 1, False, True)
    assert len({times[0] for *_, times, _ in made}) == 6    # tempo and phase stay their own


def test_shapes_differ():
    y, x = np.mgrid[0:64, 0:64] - 31.5
    masks = {kind: demo.mask(row[0], x, y, 14) for kind, row in demo.KINDS.items()}
    kinds = list(masks)
    for i, a in enumerate(kinds):
        assert 100 < masks[a].sum() < 1000
        for b in kinds[i + 1:]:
            assert np.abs(masks[a] - masks[b]).sum() > 80, (a, b)
