"""The built-in set: 800 short films of hopping bodies that sound, as H.264 and AAC in mp4 files.

    python -m prepare.demo runs/demo              # runs/demo/{train,test}/<kind>/*.mp4, 24 MB
    python -m prepare.demo runs/timing --hide kind rhythm       # sets with fewer links

The method needs clips in which sight and sound share two kinds of links: one that a change of speed
keeps and one that it breaks, as with the cow of the paper's Fig. 1. The films have both.

(a) The class is kept. Each body is of one of 8 kinds. A kind has a shape to see, and to hear it has
    the modes of its material (frequency ratios, damping) and the rhythm in which the body hops.
    Resampling scales all frequencies and all intervals by one factor, so the ratios of partials and
    of intervals survive any speed, as the shape does.
(b) The size is broken. The size of a body gives its pitch (frequency ~ 1 / size, as for every
    vibrating solid), and each landing is seen and heard at the same instant, at the clip's own
    tempo. A sped-up sound belongs to a smaller body, in a greater hurry than the one on the screen.
(c) Everything else is noise, independent between sight and sound: the colours of body and wall, the
    pattern of the wall, the place, camera noise; loudness, background noise, and the place in the
    rhythm at which the clip begins.

Links can be hidden, to see what speed does to those that are left. `--hide kind` gives all bodies
the shape, modes and size of one drum: sight and sound then share the rhythm of a kind, the tempo,
and the moments of landing. `--hide rhythm` makes all intervals of a clip equal. With both, timing
alone links them, and a film's class is a name without meaning.

Physics: between two landings T seconds apart the body flies a parabola whose height is ~ T^2. A
landing excites modes A_k exp(-t / tau_k) sin(2 pi ratio_k f t). A noisy material is noise that
passes through the same modes.
"""

import argparse
import json
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

VERSION = 1                     # of the recipe; a set of another version is built again
PIXELS, FPS, RATE = 64, 16, 24000
SECONDS = 4.5                   # a window of 1 s at speed 4 fits, with some room for its start
TRAIN, TEST = 72, 28            # clips per kind
HIDDEN = "kind", "rhythm"       # links that can be left out

# kind: (shape, ratios of the modes, damping time of the first mode in s, share of noise,
#        rhythm: relative intervals)
# The modes are those of an ideal membrane, a church bell with its minor third, a free bar, a string
# with all harmonics, a stopped pipe with the odd ones, a wine glass, noise through a few modes, and
# a free square plate.
KINDS = {
    "drum": ("disc", (1, 1.59, 2.14, 2.30, 2.65, 2.92), 0.10, 0.2, (1,)),
    "bell": ("bell", (0.5, 1, 1.2, 1.5, 2, 2.6, 4.1), 0.60, 0.0, (2, 1, 1)),
    "woodblock": ("bar", (1, 2.76, 5.40, 8.93), 0.04, 0.1, (1, 1, 2)),
    "string": ("cross", (1, 2, 3, 4, 5, 6, 7, 8), 0.30, 0.0, (3, 1)),
    "pipe": ("post", (1, 3, 5, 7), 0.22, 0.05, (1, 2)),
    "glass": ("ring", (1, 2.32, 4.25, 6.63, 9.38), 0.45, 0.0, (1, 1, 1, 3)),
    "rattle": ("pair", (1, 1.4, 1.9, 2.7), 0.08, 1.0, (1, 1, 4)),
    "plate": ("triangle", (1, 1.73, 2.33, 3.91, 4.11, 6.30, 6.71), 0.25, 0.5, (3, 3, 2)),
}


def mask(shape, x, y, r):
    """A soft mask in [0, 1] of a shape with radius r (pixels) and its centre at 0.

    x, y: the coordinates of each pixel, y downwards; the mask has their shape.
    """
    ax, ay = np.abs(x), np.abs(y)
    # The distance from the edge, negative inside, correct up to a factor near 1.
    distance = {
        "disc": lambda: np.hypot(x, y) - r,
        "ring": lambda: np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r,
        "bar": lambda: np.maximum(ax - r, ay - 0.35 * r),
        "post": lambda: np.maximum(ax - 0.35 * r, ay - r),
        "cross": lambda: np.minimum(np.maximum(ax - r, ay - 0.28 * r),
                                    np.maximum(ax - 0.28 * r, ay - r)),
        "triangle": lambda: np.maximum(y - 0.8 * r, 0.87 * ax - 0.5 * y - 0.5 * r),
        "bell": lambda: np.minimum(
            np.maximum(np.hypot(x, y + 0.2 * r) - 0.75 * r, y),
            np.maximum(np.maximum(ax - 0.75 * r - 0.4 * np.maximum(y, 0), y - 0.8 * r), -y)),
        "pair": lambda: np.minimum(np.hypot(x - 0.55 * r, y),
                                   np.hypot(x + 0.55 * r, y)) - 0.42 * r,
    }[shape]()
    return np.clip(0.5 - distance, 0, 1)


def landings(rhythm, tempo, phase):
    """The times (s) of all landings in the clip and around it.

    rhythm: relative intervals. tempo: landings per second on average. phase: where in the rhythm
    the clip begins, in units of the mean interval.
    """
    gaps = np.array(rhythm) * len(rhythm) / sum(rhythm) / tempo                 # s
    times = np.cumsum(np.tile(gaps, int(np.ceil((SECONDS + 4) * tempo / len(gaps))) + 2))
    return times - 2 - phase / tempo


def draw(shape, r, times, rng):
    """The frames (T, PIXELS, PIXELS, 3) uint8 of a body of radius r (pixels) that lands at `times`
    (s). rng draws the place, the colours, the wall and the camera noise."""
    t = (np.arange(round(SECONDS * FPS)) / FPS)[:, None, None]                  # (T, 1, 1), s
    y, x = np.mgrid[0:PIXELS, 0:PIXELS] + 0.5                                   # (H, W)
    place = PIXELS / 2 + rng.uniform(-8, 8)
    floor = PIXELS - 6 - 0.8 * r
    last = np.searchsorted(times, t, side="right") - 1
    gap = times[last + 1] - times[last]                 # (T, 1, 1), s: how long this hop takes
    u = (t - times[last]) / gap                         # how much of the hop is over, in [0, 1)
    ceiling = floor - r - 2
    height = np.minimum(60 * gap ** 2, ceiling) * 4 * u * (1 - u)               # pixels, a parabola
    squash = 1 + 0.35 * np.exp(-(t - times[last]) / 0.06)                       # by the landing
    body = mask(shape, (x - place) / squash, (y - floor + height) * squash, r)
    body = body[..., None]                                                      # (T, H, W, 1)
    top, bottom = rng.uniform(10, 110, (2, 3))                                  # wall in the shade
    colour = rng.uniform(140, 250, 3)                                           # body in the light
    wall = top + (bottom - top) * (y / PIXELS)[..., None]                       # (H, W, 3)
    kx, ky = rng.uniform(-0.6, 0.6, 2)
    wall = wall + rng.uniform(0, 15) * np.sin(kx * x + ky * y)[..., None]       # its pattern
    wall, colour = wall.astype(np.float32), colour.astype(np.float32)
    film = wall + body.astype(np.float32) * (colour - wall)                     # (T, H, W, 3)
    film += np.float32(rng.uniform(1, 4)) * rng.standard_normal(film.shape, dtype=np.float32)
    return np.clip(film, 0, 255, out=film).astype(np.uint8)


def synthesise(f, ratios, damping, noise, times, rng):
    """The waveform (L,) float32 in [-1, 1]: each landing at `times` (s) excites the modes.

    f: the frequency (Hz) of ratio 1. ratios, damping, noise: see KINDS. rng draws the noise and
    the loudness.
    """
    t = np.arange(round(1.2 * RATE)) / RATE                                     # s, of one landing
    hit = np.zeros(len(t))
    for k, ratio in enumerate(ratios):
        if ratio * f < 0.45 * RATE:
            envelope = np.exp(-t * ratio ** 0.5 / damping) / (k + 1) ** 0.7
            tone = np.sin(2 * np.pi * ratio * f * t)
            # The noise is as wide as the frequency of the mode.
            hiss = np.interp(t * ratio * f * 2, np.arange(65536), rng.standard_normal(65536))
            hiss = noise * hiss * np.sin(2 * np.pi * ratio * f * t)
            hit += envelope * ((1 - noise) * tone + hiss)
    length = round(SECONDS * RATE)
    wave = np.zeros(length + len(t))
    for position in np.round(times * RATE).astype(int):
        if -len(t) < position < length:
            start = max(position, 0)
            wave[start:position + len(t)] += hit[start - position:] * rng.uniform(0.8, 1.0)
    wave = wave[:length]
    wave = wave / np.abs(wave).max() * 10 ** rng.uniform(-0.8, -0.1)            # loudness, 14 dB
    wave = wave + 10 ** rng.uniform(-3.5, -2) * rng.standard_normal(len(wave))  # background
    return np.clip(wave, -1, 1).astype(np.float32)


def write(path, film, wave):
    """Write one mp4 of H.264, with a keyframe each second, and AAC. The file gets its name when it
    is complete, so that two runs may build the set at once. The encoder has one thread, so that the
    same film gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with av.open(str(temporary), "w", format="mp4") as out:
        # The code of mbtree (x264 in av 18.1, AVX-512) lets old contents of memory into the bytes.
        options = {"crf": "27", "preset": "veryfast", "g": str(FPS), "threads": "1",
                   "x264-params": "mbtree=0"}
        video = out.add_stream("libx264", rate=FPS, width=PIXELS, height=PIXELS, pix_fmt="yuv420p",
                               options=options)
        audio = out.add_stream("aac", rate=RATE, layout="mono", bit_rate=32000,
                               options={"aac_coder": "fast"})
        for image in film:
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))
    os.replace(temporary, path)


def make_clip(root, seed, hide, name):
    """Write the film `name` = (split, kind, n), which depends on seed, `hide` and name alone."""
    split, kind, n = name
    shape, ratios, damping, noise, _ = KINDS["drum" if "kind" in hide else kind]
    rhythm = (1,) if "rhythm" in hide else KINDS[kind][-1]
    sequence = np.random.SeedSequence(
        [seed, ["train", "test"].index(split), list(KINDS).index(kind), n])
    sight, sound, both = (np.random.default_rng(child) for child in sequence.spawn(3))
    size = both.uniform()
    r = 8 * 2.5 ** (0.5 if "kind" in hide else size)    # 8 to 20 pixels
    f = 180 * 20 / r                                    # 180 to 450 Hz: pitch ~ 1 / size
    tempo = 1.2 * 3 ** both.uniform()                   # 1.2 to 3.6 landings per second
    times = landings(rhythm, tempo, both.uniform(0, len(rhythm)))
    film = draw(shape, r, times, sight)
    wave = synthesise(f, ratios, damping, noise, times, sound)
    write(root / split / kind / f"{n:03d}.mp4", film, wave)


def build(root, seed=0, hide=()):
    """Build the set under root and return root. Nothing is done if the set is complete already, and
    of this version, seed and `hide`."""
    root = Path(root)
    recipe = {"version": VERSION, "seed": seed} | ({"hide": sorted(hide)} if hide else {})
    recipe_file = root / "recipe.json"                  # written when the set is complete
    if recipe_file.exists() and json.loads(recipe_file.read_text()) == recipe:
        return root
    names = [(split, kind, n) for split, number in (("train", TRAIN), ("test", TEST))
             for kind in KINDS for n in range(number)]
    # Ctrl-C ends this process, which then ends the pool.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=signal.signal,
                             initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        done = pool.map(partial(make_clip, root, seed, hide), names, chunksize=8)
        for _ in tqdm(done, total=len(names), desc="building the built-in set", unit="clip",
                      file=sys.stderr):
            pass
    recipe_file.write_text(json.dumps(recipe))
    return root


def main():
    """Run the command, which prints the folder."""
    parser = argparse.ArgumentParser(description="Build the built-in set.")
    parser.add_argument("root", help="folder to build it in")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    parser.add_argument("--hide", nargs="+", default=(), choices=HIDDEN,
                        help="links of sight and sound to leave out (none)")
    args = parser.parse_args()
    print(build(args.root, args.seed, hide=args.hide))


if __name__ == "__main__":
    main()
