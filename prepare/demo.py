"""The built-in set: 800 short films of sounding bodies, drawn and synthesised, as real H.264 + AAC mp4 files.

    python -m prepare.demo runs/demo                  # runs/demo/{train,test}/<kind>/*.mp4, 24 MB

Why it looks as it does: the method needs clips in which sight and sound share two links, one that a change of speed
keeps and one that it breaks, as the cow of the paper's Fig. 1 does. Links and kinds were settled before anything was
trained on it; contrast and sizes after one trial, in which bodies and walls of any colour taught the encoder nothing in
six minutes: now bodies stand in the light before a wall in the shade.

(a) Kept, the class: a body of one of 8 kinds has a shape to see, and to hear its material's modes (frequency ratios,
    damping) and the rhythm in which it hops. Resampling scales all frequencies and all intervals alike, so ratios
    of partials and of intervals survive any speed, as shapes do.
(b) Broken: the body's size gives the pitch (frequency ~ 1 / size, as for every vibrating solid), and each landing is
    seen and heard at the same instant, at the clip's own tempo. A sped-up sound belongs to a smaller body in a
    greater hurry than the one on the screen.
(c) Nuisance, independent between sight and sound: wall colours and pattern, body colour, place, camera noise;
    loudness, background noise, and where in the rhythm the clip begins.

Physics: between two landings T seconds apart the body flies a parabola of height ~ T^2; a landing excites modes
A_k exp(-t / tau_k) sin(2 pi ratio_k f t); noisy materials are noise passed through the same modes.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

VERSION = 1                                               # of the recipe: a set of another version is built anew
PIXELS, FPS, RATE, SECONDS = 64, 16, 24000, 4.5           # 4.5 s: a 1 s window at speed 4 fits, with room to move
TRAIN, TEST = 72, 28                                      # clips per kind

# kind: (shape, ratios of the modes, damping time of the first mode in s, noise share, rhythm: relative intervals)
KINDS = {
    "drum": ("disc", (1, 1.59, 2.14, 2.30, 2.65, 2.92), 0.10, 0.2, (1,)),                   # ideal membrane
    "bell": ("bell", (0.5, 1, 1.2, 1.5, 2, 2.6, 4.1), 0.60, 0.0, (2, 1, 1)),                # church bell: minor third
    "woodblock": ("bar", (1, 2.76, 5.40, 8.93), 0.04, 0.1, (1, 1, 2)),                      # free bar
    "string": ("cross", (1, 2, 3, 4, 5, 6, 7, 8), 0.30, 0.0, (3, 1)),                       # harmonic
    "pipe": ("post", (1, 3, 5, 7), 0.22, 0.05, (1, 2)),                                     # odd harmonics: stopped pipe
    "glass": ("ring", (1, 2.32, 4.25, 6.63, 9.38), 0.45, 0.0, (1, 1, 1, 3)),                # wine glass
    "rattle": ("pair", (1, 1.4, 1.9, 2.7), 0.08, 1.0, (1, 1, 4)),                           # noise through modes
    "plate": ("triangle", (1, 1.73, 2.33, 3.91, 4.11, 6.30, 6.71), 0.25, 0.5, (3, 3, 2)),   # free square plate
}


def mask(shape, x, y, r):
    """Soft mask in [0, 1] of a shape of radius r centred at 0: x, y and r in pixels, y downwards."""
    ax, ay = np.abs(x), np.abs(y)
    d = {                                                 # signed distance (negative inside), up to a factor near 1
        "disc": lambda: np.hypot(x, y) - r,
        "ring": lambda: np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r,
        "bar": lambda: np.maximum(ax - r, ay - 0.35 * r),
        "post": lambda: np.maximum(ax - 0.35 * r, ay - r),
        "cross": lambda: np.minimum(np.maximum(ax - r, ay - 0.28 * r), np.maximum(ax - 0.28 * r, ay - r)),
        "triangle": lambda: np.maximum(y - 0.8 * r, 0.87 * ax - 0.5 * y - 0.5 * r),
        "bell": lambda: np.minimum(np.maximum(np.hypot(x, y + 0.2 * r) - 0.75 * r, y), np.maximum(
            np.maximum(ax - 0.75 * r - 0.4 * np.maximum(y, 0), y - 0.8 * r), -y)),
        "pair": lambda: np.minimum(np.hypot(x - 0.55 * r, y), np.hypot(x + 0.55 * r, y)) - 0.42 * r,
    }[shape]()
    return np.clip(0.5 - d, 0, 1)


def landings(rhythm, tempo, phase):
    """Times in s of all landings around the clip: tempo landings a second on average, phase in beats."""
    gaps = np.array(rhythm) * len(rhythm) / sum(rhythm) / tempo                     # s
    times = np.cumsum(np.tile(gaps, int(np.ceil((SECONDS + 4) * tempo / len(gaps))) + 2))
    return times - 2 - phase / tempo


def draw(shape, r, times, rng):
    """frames (T, PIXELS, PIXELS, 3) uint8."""
    t = (np.arange(round(SECONDS * FPS)) / FPS)[:, None, None]                      # (T, 1, 1), s
    y, x = np.mgrid[0:PIXELS, 0:PIXELS] + 0.5                                       # (H, W)
    place = PIXELS / 2 + rng.uniform(-8, 8)
    floor = PIXELS - 6 - 0.8 * r
    last = np.searchsorted(times, t, side="right") - 1
    gap = times[last + 1] - times[last]                                             # (T, 1, 1), length of this hop
    u = (t - times[last]) / gap                                                     # in [0, 1) through the hop
    height = np.minimum(60 * gap ** 2, floor - r - 2) * 4 * u * (1 - u)             # px, a parabola below the ceiling
    squash = 1 + 0.35 * np.exp(-(t - times[last]) / 0.06)                           # flattened by the landing
    body = mask(shape, (x - place) / squash, (y - floor + height) * squash, r)[..., None]    # (T, H, W, 1)
    top, bottom = rng.uniform(10, 110, (2, 3))                                      # a wall in the shade,
    colour = rng.uniform(140, 250, 3)                                               # a body in the light
    wall = top + (bottom - top) * (y / PIXELS)[..., None]                           # (H, W, 3)
    kx, ky = rng.uniform(-0.6, 0.6, 2)
    wall = wall + rng.uniform(0, 15) * np.sin(kx * x + ky * y)[..., None]           # its pattern
    wall, colour = wall.astype(np.float32), colour.astype(np.float32)
    film = wall + body.astype(np.float32) * (colour - wall)                         # (T, H, W, 3)
    film += np.float32(rng.uniform(1, 4)) * rng.standard_normal(film.shape, dtype=np.float32)
    return np.clip(film, 0, 255, out=film).astype(np.uint8)


def synthesise(f, ratios, damping, noise, times, rng):
    """wave (L,) float32 in [-1, 1]: the modes of frequencies f * ratios, excited at each landing."""
    t = np.arange(round(1.2 * RATE)) / RATE                                         # s, one landing
    hit = np.zeros(len(t))
    for k, ratio in enumerate(ratios):
        if ratio * f < 0.45 * RATE:
            envelope = np.exp(-t * ratio ** 0.5 / damping) / (k + 1) ** 0.7
            tone = np.sin(2 * np.pi * ratio * f * t)
            hiss = np.interp(t * ratio * f * 2, np.arange(65536), rng.standard_normal(65536))   # of that bandwidth
            hit += envelope * ((1 - noise) * tone + noise * hiss * np.sin(2 * np.pi * ratio * f * t))
    wave = np.zeros(round(SECONDS * RATE) + len(t))
    for at in np.round(times * RATE).astype(int):
        if -len(t) < at < round(SECONDS * RATE):
            lo = max(at, 0)
            wave[lo:at + len(t)] += hit[lo - at:] * rng.uniform(0.8, 1.0)
    wave = wave[:round(SECONDS * RATE)]
    wave = wave / np.abs(wave).max() * 10 ** rng.uniform(-0.8, -0.1)                # loudness, 14 dB
    wave = wave + 10 ** rng.uniform(-3.5, -2) * rng.standard_normal(len(wave))      # background
    return np.clip(wave, -1, 1).astype(np.float32)


def write(path, film, wave):
    """One mp4 (H.264, a keyframe each second, and AAC), named only when complete. One thread, so bytes repeat."""
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as out:
        # without mbtree, whose AVX-512 code (x264 in av 18.1) lets what memory held into the bytes
        options = {"crf": "27", "preset": "veryfast", "g": str(FPS), "threads": "1", "x264-params": "mbtree=0"}
        video = out.add_stream("libx264", rate=FPS, width=PIXELS, height=PIXELS, pix_fmt="yuv420p", options=options)
        audio = out.add_stream("aac", rate=RATE, layout="mono", bit_rate=32000, options={"aac_coder": "fast"})
        for image in film:
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))
    os.replace(part, path)


def make_clip(root, seed, name):
    """Film number `name` = (split, kind, n), a function of (seed, name) alone."""
    split, kind, n = name
    shape, ratios, damping, noise, rhythm = KINDS[kind]
    sight, sound, both = (np.random.default_rng(s) for s in np.random.SeedSequence(
        [seed, ["train", "test"].index(split), list(KINDS).index(kind), n]).spawn(3))
    r = 8 * 2.5 ** both.uniform()                                                   # 8 to 20 px
    f = 180 * 20 / r                                                                # 180 to 450 Hz: pitch ~ 1 / size
    tempo = 1.2 * 3 ** both.uniform()                                               # 1.2 to 3.6 landings a second
    times = landings(rhythm, tempo, both.uniform(0, len(rhythm)))
    path = root / split / kind / f"{n:03d}.mp4"
    write(path, draw(shape, r, times, sight), synthesise(f, ratios, damping, noise, times, sound))


def build(root, seed=0, workers=None):
    """Build the set under root, unless it is there already, complete and of this version and seed. Returns root."""
    root = Path(root)
    recipe = {"version": VERSION, "seed": seed}
    done = root / "recipe.json"
    if done.exists() and json.loads(done.read_text()) == recipe:
        return root
    names = [(split, kind, n) for split, many in (("train", TRAIN), ("test", TEST)) for kind in KINDS
             for n in range(many)]
    for split, kind, _ in names:
        (root / split / kind).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        job = pool.map(partial(make_clip, root, seed), names, chunksize=8)
        for _ in tqdm(job, total=len(names), desc="building the built-in set", unit="clip", file=sys.stderr):
            pass
    done.write_text(json.dumps(recipe))
    return root


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the built-in set.")
    parser.add_argument("root", help="folder to build it in")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    args = parser.parse_args()
    print(build(args.root, args.seed))
