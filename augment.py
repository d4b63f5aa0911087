"""Speed co-augmentation (§2.1), crops, flip and colours, and the log-mel input. Needs torch, torchvision, torchaudio.

    tau_v, tau_a = sample_speeds(4)                    # ([1, 3], [1, 2]): view 0 at speed 1, view 1 sped up
    fast = speed_up_video(frames, tau_v[1])            # (s T, H, W, 3) -> (T, H, W, 3)
    fast = speed_up_audio(wave, tau_a[1])              # (s L,) -> (L,), pitch s times as high
    x = LogMel()(fast)                                 # (L,) -> (1, M, F)

Speed is a sampling rate ("implemented by applying different sampling rates", §2.1): a view at speed s covers s times
the source in the same number of frames and samples. Legend: T frames, H, W pixels, L samples, M mel bands,
F spectrogram frames, s or tau a speed from {1, ..., S}.
"""

import torch
import torchaudio
from torchvision.transforms import v2

MEAN, STD = 0.45, 0.225                                 # of pixels in [0, 1] (paper silent; GDT)


def sample_speeds(max_speed, generator=None):
    """tau_v, tau_a: speeds of the two video views and of the two audio views of a clip (§2.1), two lists.

    View 0 has speed 1; view 1 draws from T = {1, ..., max_speed}, uniformly (paper silent) and independently for
    video and audio.
    """
    tau_v, tau_a = torch.randint(1, max_speed + 1, (2,), generator=generator).tolist()
    return [1, tau_v], [1, tau_a]


def speed_up_video(frames, speed):
    """Every speed-th frame: (s T, ...) -> (T, ...), time first. A view, no copy. speed is an integer >= 1."""
    return frames[::speed]


def speed_up_audio(wave, speed):
    """speed times the source in the same length: (..., s L) -> (..., L), sampling rate unchanged, so that a tone of
    f Hz comes out at s f Hz. Low-passed first (windowed sinc), so that what would pass the Nyquist limit is removed
    and not folded back. speed is an integer >= 1.
    """
    return wave if speed == 1 else torchaudio.functional.resample(wave, speed, 1)


def crop_flip(frames, size, generator=None):
    """One random size x size crop and, in half of the cases, a mirror image, the same for all frames.

    frames: (..., H, W, 3), H and W >= size -> (..., size, size, 3). Leading axes may hold time and views: all share
    the crop, so that the views of a clip differ by their speed alone (paper silent).
    """
    H, W = frames.shape[-3:-1]
    top = int(torch.randint(H - size + 1, (), generator=generator))
    left = int(torch.randint(W - size + 1, (), generator=generator))
    frames = frames[..., top:top + size, left:left + size, :]
    return frames.flip(-2) if torch.rand((), generator=generator) < 0.5 else frames


def crop_at(frames, size, place=0.5):
    """size x size of (..., H, W, 3) for evaluation: the middle of the shorter side, and of the longer side the part
    at `place` from 0 (left or top end) to 1 (right or bottom end)."""
    H, W = frames.shape[-3:-1]
    top, left = (round((side - size) * (place if side == max(H, W) else 0.5)) for side in (H, W))
    return frames[..., top:top + size, left:left + size, :]


def crop_flip_jitter(frames, size, seed):
    """The training view of fine-tuning (paper silent; GDT): a crop of 14 to 100 % of the area brought to size x size, a
    mirror image in half of the cases, brightness, contrast and saturation changed by up to 40 % in four of five.

    frames (T, H, W, 3) uint8 -> (T, size, size, 3) uint8, all frames alike, a function of `seed` alone.
    """
    view = v2.Compose([v2.RandomResizedCrop(size, scale=(0.14, 1)), v2.RandomHorizontalFlip(),
                       v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4)], p=0.8)])
    with torch.random.fork_rng(devices=[]):               # these transforms draw from the global generator
        torch.manual_seed(seed)
        return view(frames.movedim(-1, -3)).movedim(-3, -1)


def normalize_frames(frames):
    """uint8 (..., T, H, W, 3) -> float32 (..., 3, T, H, W), mean 0.45 and deviation 0.225 taken off.

    The memory stays as it was, channels innermost: what convolutions call channels-last, without a copy.
    """
    x = torch.movedim(frames, -1, -4)                                               # (..., 3, T, H, W)
    return x.float().mul_(1 / (255 * STD)).sub_(MEAN / STD)


class LogMel(torch.nn.Module):
    """Waveforms in [-1, 1] -> normalised log-mel spectrograms, for batches on any device, in float32.

    (..., L) -> (..., 1, M, F), F = 1 + L // hop. Mono 24 kHz, 40 bands, window 20 ms, hop 10 ms, n_fft 1024 (paper
    silent; GDT). mean and std were measured on the sound of 14 real clips (8 of Kinetics-400, 6 of VGGSound)
    after decoding to [-1, 1]; GDT's constants belong to sound scaled to 16-bit integers.
    """

    def __init__(self, rate=24000, bands=40, mean=-0.4, std=4.3):
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(
            rate, n_fft=1024, win_length=rate // 50, hop_length=rate // 100, n_mels=bands)
        self.mean, self.std = mean, std

    def forward(self, wave):
        with torch.autocast(wave.device.type, enabled=False):
            x = torch.log(self.mel(wave.float()) + 1e-6)                            # (..., M, F)
            return ((x - self.mean) / self.std).unsqueeze(-3)                       # (..., 1, M, F)
