"""Frames that show their own number as a barcode."""

import av
import numpy as np

BITS = 9        # of a barcode


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
