"""Films that show the number of each frame as a barcode, and beep, and what is read of them."""

import av
import numpy as np

from support.reading import RATE, read

BITS = 9        # of a barcode
# Stamps of 52 frames, 1 to 6 units of time apart.
UNEVEN = np.random.default_rng(0).integers(1, 7, 52).cumsum().tolist()


def barcode(n, size):
    """Draw the number n as BITS black or white columns, (H, W, 3) uint8."""
    width, height = size
    bits = (n >> np.arange(BITS)) & 1     # (BITS,)
    line = (235 * bits[np.arange(width) * BITS // width]).astype(np.uint8)    # (W,)
    return np.tile(line[None, :, None], (height, 1, 3))


def read_barcode(images):
    """Read the numbers off images: (..., H, W, 3) -> (...)."""
    images = np.asarray(images)
    W = images.shape[-2]
    columns = [(2 * b + 1) * W // (2 * BITS) for b in range(BITS)]
    bits = images[..., columns, :].mean((-3, -1)) > 120     # (..., BITS)
    return (bits * 2 ** np.arange(BITS)).sum(-1)


def truth(path):
    """Decode a whole film. Return the times in s and the numbers of its frames in the order of
    display, and when its streams begin: [the pictures, the sound if the film has any]."""
    with av.open(str(path)) as container:
        streams = [container.streams.video[0], *container.streams.audio[:1]]
        begins = [float((stream.start_time or 0) * stream.time_base) for stream in streams]
        times, numbers = [], []
        for frame in container.decode(streams[0]):
            times.append(frame.time)
            numbers.append(read_barcode(frame.to_ndarray(format="rgb24")))
    return np.sort(times), np.array(numbers), begins


def shown(path, times, sound=False):
    """Return the numbers of the frames that the reader gives for the times."""
    samples = round((times[-1] - times[0] + 0.1) * RATE) if sound else 0
    return read_barcode(np.stack(read(path, times, samples, size=48)[0]))


def beep(t):
    """Return the samples at the times t of a sound that beeps for 20 ms at 0.5 s, 1.5 s, ..."""
    return 0.9 * np.sin(3000 * np.pi * t) * (abs(t % 1 - 0.51) < 0.01)


def beeps_of(path, t0, seconds):
    """Return when the beeps of a clip begin, but not a beep that the clip cuts."""
    _, wave = read(path, [t0], round(seconds * RATE), size=48)
    loud = np.flatnonzero(abs(wave) > 0.3)
    beeps = loud[np.diff(loud, prepend=-RATE) > RATE / 5] / RATE
    return t0 + beeps[beeps > 0.025]
