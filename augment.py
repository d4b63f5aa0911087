"""Speed co-augmentation (§2.1 of arXiv 2309.13942), windows, mirror, colours, the log-mel input.

    import torch
    from augment import (LogMel, frame_times, normalize_frames, random_crop, sample_speeds,
                         speed_up_audio)
    H, W, L = 72, 96, 24000                   # a film of 4 s at 30 frames per s, and its sound
    film = torch.randint(256, (120, H, W, 3), dtype=torch.uint8)
    wave = torch.rand(4 * L) * 2 - 1
    tau_v, tau_a = sample_speeds(4)           # ([1, 3], [1, 2]): view 0 at speed 1, view 1 sped up
    times = frame_times(30, 30, tau_v[1])     # (T,) s: three frame intervals apart
    frames = film[::tau_v[1]][:30]            # the same of a film that is in memory, (T, H, W, 3)
    source = wave[:tau_a[1] * L]              # (tau L,): L samples of a view, tau times the source
    fast = speed_up_audio(source, tau_a[1])   # (tau L,) -> (L,): the pitch is tau times as high
    x = LogMel()(fast)                        # (L,) -> (1, M, F)

    window, mirrored = random_crop()          # of one clip, for all its frames (T, H, W, 3)
    left, top, width, height = map(round, window(W, H))             # pixels
    frames = frames[:, top:top + height, left:left + width]         # if mirrored, .flip(-2)
    video = normalize_frames(frames)          # (3, T, h, w), and at the network's H, W:
    video = torch.nn.functional.interpolate(video, (128, 128), mode="bilinear", antialias=True)

This file needs torch, torchvision and torchaudio alone, and the MIT licence of this unofficial
implementation beside a copy. Speed is a sampling rate ("implemented by applying different sampling
rates", §2.1): a view at speed tau covers tau times the source in the same number of frames and
samples. All views of a clip begin at the same moment. GDT is the paper's reference [17],
github.com/facebookresearch/GDT. Symbols: T frames of a view, H, W pixels, L samples of a view, M
mel bands, F spectrogram frames, tau a speed from {1, ..., S}.
"""

import torch
import torchaudio
from torchvision.transforms import v2

MEAN, STD = 0.45, 0.225                                 # of pixels in [0, 1] (paper silent; GDT)


def kind(x):
    """What was given in place of a tensor of another kind, in words for an error."""
    return f"{str(x.dtype)[6:]} {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__


def is_video(frames):
    """Whether they are a tensor (..., T, H, W, 3) uint8."""
    return (torch.is_tensor(frames) and frames.dtype == torch.uint8 and frames.dim() >= 4
            and frames.shape[-1] == 3)


def is_speed(tau):
    """Whether tau is one whole number of 1 or more."""
    return not isinstance(tau, (list, tuple, str)) and tau >= 1 and tau % 1 == 0


def sample_speeds(max_speed, generator=None, same=False):
    """Draw tau_v and tau_a, the speeds of the video views and of the audio views of a clip (§2.1).

    Both are lists of two integers. View 0 is the given pair (§2), at speed 1. View 1 draws from
    {1, ..., max_speed}, uniformly (paper silent) and independently for video and audio, or once for
    both (`same`). For a film shorter than max_speed clip lengths pass the number of whole ones.
    Raises ValueError if max_speed is not an integer >= 1.
    """
    if not is_speed(max_speed):
        raise ValueError(f"max_speed is {max_speed!r}: give a whole speed of 1 or more")
    tau_v, tau_a = torch.randint(1, int(max_speed) + 1, (2,), generator=generator).tolist()
    return [1, tau_v], [1, tau_v if same else tau_a]


def frame_times(T, fps, tau):
    """When the T frames of a view are taken, in seconds after its start: (T,).

    At speed tau a view takes every tau-th of the times that lie 1/fps seconds apart, so it covers
    tau times the source. Raises ValueError if tau is not an integer >= 1, or fps not above 0.
    """
    if not is_speed(tau) or not fps > 0:
        raise ValueError(f"tau is {tau!r} and fps is {fps}: give one whole speed of 1 or more, and "
                         "fps above 0")
    return torch.arange(T) * tau / fps


def speed_up_audio(wave, tau):
    """Squeeze tau times the source into the same length: (..., tau L) -> (..., L).

    The sampling rate stays, so a tone of f Hz comes out at tau f Hz. A windowed sinc first weakens
    the frequencies that would pass the Nyquist limit and be folded back: by 8 dB close above it,
    and by 28 dB and more from 1.2 times the limit on. The samples come last (stereo is (2, n)); n
    of them become ceil(n / tau), so see to it that n = tau L. Raises ValueError if the wave holds
    integers, or if tau is not an integer >= 1.
    """
    if not (torch.is_tensor(wave) and wave.is_floating_point() and is_speed(tau)):
        raise ValueError(f"the wave is {kind(wave)} and tau is {tau!r}: give a tensor of floats in "
                         "[-1, 1] (for 16-bit integers wave / 32768), and one whole speed of 1 or "
                         "more")
    decimate = torchaudio.transforms.Resample(int(tau), 1).to(wave.device, wave.dtype)
    with torch.autocast(wave.device.type, enabled=False):
        return decimate(wave)


# A window is the part of a picture to read: a function (W, H) -> (left, top, width, height). It is
# drawn before the picture is opened. All frames and views of a clip share the window and the
# mirror, so the views differ by their speed alone (paper silent).

def random_crop(generator=None):
    """Draw the crop of pre-training (paper silent; GDT): a window, and whether to mirror it.

    The window is a square whose side is 7/8 to 7/10 of the shorter side, as GDT's 112 pixels are of
    128 to 160. Half of the crops are mirrored.
    """
    scale, x, y, mirror = torch.rand(4, generator=generator).tolist()

    def window(W, H):
        side = 7 / (8 + 2 * scale) * min(W, H)
        return x * (W - side), y * (H - side), side, side
    return window, mirror < 0.5


def random_resized_crop(generator=None):
    """Draw the window of fine-tuning (paper silent; GDT), as torchvision's RandomResizedCrop does.

    It has 14 to 100 % of the area and an aspect of 3/4 to 4/3. The first of ten draws that fits
    into the picture counts. If none does, it is the largest one in the middle.
    """
    draws = torch.rand(10, 4, generator=generator).tolist()

    def window(W, H):
        for area, aspect, x, y in draws:
            area, aspect = (0.14 + 0.86 * area) * W * H, (4 / 3) ** (2 * aspect - 1)
            width, height = (area * aspect) ** 0.5, (area / aspect) ** 0.5
            if width <= W and height <= H:
                return x * (W - width), y * (H - height), width, height
        width, height = min(W, H * 4 / 3), min(H, W * 4 / 3)
        return (W - width) / 2, (H - height) / 2, width, height
    return window


def centre_crop(W, H):
    """The window of evaluation: a square in the middle, whose side is 7/8 of the shorter side."""
    side = 7 / 8 * min(W, H)
    return (W - side) / 2, (H - side) / 2, side, side


def centre_band(W, H):
    """The window that holds all crops of an evaluation along the longer side, see crop_at."""
    side = 7 / 8 * min(W, H)
    return (0, (H - side) / 2, W, side) if W >= H else ((W - side) / 2, 0, side, H)


def crop_at(frames, size, place=0.5):
    """Cut size x size out of (..., H, W, 3) for evaluation.

    The crop lies in the middle of the shorter side. Along the longer side it lies at `place`, from
    0 (left or top end) to 1 (right or bottom end). Raises ValueError if it lies outside, or for
    another layout.
    """
    if not torch.is_tensor(frames) or frames.dim() < 3 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {kind(frames)}: give a tensor (..., H, W, 3), the colours "
                         "last")
    H, W = frames.shape[-3:-1]
    if not 0 < size <= min(H, W) or not 0 <= place <= 1:
        raise ValueError(f"a crop of {size} pixels at place {place} does not lie in frames of "
                         f"{H} x {W}: give a smaller one, and a place from 0 to 1")
    top, left = (round((side - size) * (place if side == max(H, W) else 0.5)) for side in (H, W))
    return frames[..., top:top + size, left:left + size, :]


def flip_jitter(frames, seed):
    """Mirror half of the clips of fine-tuning, and change the colours of four of five (GDT).

    Brightness, contrast and saturation change by up to 40 %. frames: (T, H, W, 3) uint8 -> the same
    shape. All frames are treated alike, and the result depends on `seed` alone. Raises ValueError
    for other types or layouts.
    """
    if not is_video(frames) or frames.dim() != 4:
        raise ValueError(f"frames are {kind(frames)}: give a tensor (T, H, W, 3) of uint8, the "
                         "colours last")
    view = v2.Compose([v2.RandomHorizontalFlip(),
                       v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4)], p=0.8)])
    with torch.random.fork_rng(devices=[]):      # these transforms draw from the CPU's generator
        torch.default_generator.manual_seed(seed)
        return view(frames.movedim(-1, -3)).movedim(-3, -1)


def normalize_frames(frames):
    """Normalise uint8 (..., T, H, W, 3) to float32 (..., 3, T, H, W): mean 0.45, std 0.225 (GDT).

    The channels stay innermost in memory, which convolutions call channels-last, so that nothing
    is rearranged. Raises ValueError for other types or layouts.
    """
    if not is_video(frames):
        raise ValueError(f"frames are {kind(frames)}: give a tensor (..., T, H, W, 3) of uint8, "
                         "the colours last")
    x = torch.movedim(frames, -1, -4)                                   # (..., 3, T, H, W)
    return x.float().mul_(1 / (255 * STD)).sub_(MEAN / STD)


class LogMel(torch.nn.Module):
    """Turn waveforms in [-1, 1] into normalised log-mel spectrograms, in float32, on any device.

    (..., L) -> (..., 1, M, F), F = 1 + L // hop. Mono at 24 kHz, 40 bands, window 20 ms, hop 10 ms,
    n_fft 1024 (paper silent; GDT), or the window's length if that is more. We measured mean and std
    on 14 real clips (8 of Kinetics-400, 6 of VGGSound), because GDT's belong to 16-bit integers.
    For another rate or number of bands measure those of x = LogMel(rate, bands, 0, 1)(waves).
    Raises ValueError for integers, and for waves of n_fft // 2 samples or less.
    """

    def __init__(self, rate=24000, bands=40, mean=-0.9, std=4.3):
        super().__init__()
        rate = int(rate)                                                # samples in 1 s
        window = rate // 50                                             # samples in 20 ms
        self.mel = torchaudio.transforms.MelSpectrogram(
            rate, n_fft=max(1024, window), win_length=window, hop_length=rate // 100, n_mels=bands)
        self.mean, self.std = mean, std

    def forward(self, wave):
        shortest = self.mel.n_fft // 2 + 1
        if not (torch.is_tensor(wave) and wave.is_floating_point()
                and wave.shape[-1] >= shortest):
            raise ValueError(f"the wave is {kind(wave)}: give a tensor of floats in [-1, 1] (for "
                             "16-bit integers wave / 32768), the samples last, "
                             f"{shortest} or more")
        with torch.autocast(wave.device.type, enabled=False):
            x = torch.log(self.mel(wave.float()) + 1e-6)                # (..., M, F)
            return ((x - self.mean) / self.std).unsqueeze(-3)           # (..., 1, M, F)
