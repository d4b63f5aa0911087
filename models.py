"""The networks of arXiv 2309.13942 (§2, §2.3): encoders f, g, projectors h_v, h_a, l of Eq. 2.

    import torch
    from models import SvaCLR
    model = SvaCLR()
    audio = torch.randn(2, 2, 1, 40, 101)             # (B, K, 1, M, F)
    video = torch.randn(2, 2, 3, 8, 64, 64)           # (B, K, 3, T, H, W)
    ly_a, ly_v, z_a, z_v = model(audio, video)        # (B, K, C) x 2, (B, K, D) x 2

This file needs torch and torchvision alone, and the MIT licence of this unofficial implementation
beside a copy. For other encoders replace model.f or model.g: they take (n, 3, T, H, W) and
(n, 1, M, F), and give (n, C). End them with nn.Linear(width, C), or change C in your copy. In
several processes BatchNorm has to take the statistics of all (paper silent; GDT): on GPUs convert
the model by nn.SyncBatchNorm.convert_sync_batchnorm(model), and on CPUs by prepare_layers of
support/layers.py, which can be copied too. GDT is the paper's reference [17],
github.com/facebookresearch/GDT.

Symbols: f video encoder, g audio encoder (Eq. 3 writes g(a), f(v)); B clips, K views, C = 512
encoder width, D projection width, T frames, H, W pixels (the paper: 128 or 224), M mel bands, F
spectrogram frames (augment.LogMel: 40, 101 in 1 s).
"""

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.video import resnet as video_resnet

C = 512
ARCHS = {"r2plus1d_18": (video_resnet.Conv2Plus1D, video_resnet.R2Plus1dStem, 2),
         "r2plus1d_10": (video_resnet.Conv2Plus1D, video_resnet.R2Plus1dStem, 1),
         "r3d_18": (video_resnet.Conv3DSimple, video_resnet.BasicStem, 2)}


def video_encoder(arch="r2plus1d_18"):
    """Build f: (n, 3, T, H, W) -> (n, C), torchvision's network without its head `fc`. It loads
    torchvision's weights, if those of `fc` are left out.

    arch: "r2plus1d_18" (§2.3; Tables 1 and 2) | "r3d_18" (Table 2) | "r2plus1d_10", which has one
    block per stage instead of two and is for CPUs (not in the paper).
    """
    if arch not in ARCHS:
        raise ValueError(f"arch={arch!r}: choose {', '.join(ARCHS)}")
    conv, stem, blocks = ARCHS[arch]
    net = video_resnet.VideoResNet(video_resnet.BasicBlock, [conv] * 4, [blocks] * 4, stem)
    net.fc = nn.Identity()
    return net


def audio_encoder():
    """Build g: (n, 1, M, F) -> (n, C), the "9-layered 2D ResNet" of §2.3: one convolution, and
    one block of two convolutions per stage (GDT)."""
    net = ResNet(BasicBlock, [1, 1, 1, 1])
    net.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.fc = nn.Identity()
    return net


def projector(D=256):
    """Build h: (n, C) -> (n, D), a "two-layered MLP" (§2.3). Widths and BatchNorm are GDT's."""
    return nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(inplace=True),
                         nn.Linear(C, D))


class Mapping(nn.Sequential):
    """l of Eq. 2, one for both modalities (as Eq. 2 writes it): (..., C) -> (..., C).

    mapping: "identity" (the paper's best) | "linear" | "mlp", which has two layers.
    """

    def __init__(self, mapping="identity"):
        layers = {"identity": [], "linear": [nn.Linear(C, C)],
                  "mlp": [nn.Linear(C, C), nn.ReLU(inplace=True), nn.Linear(C, C)]}
        if mapping not in layers:
            raise ValueError(f"mapping={mapping!r}: choose 'identity', 'linear' or 'mlp'")
        super().__init__(*layers[mapping])


class SvaCLR(nn.Module):
    """audio (B, K, 1, M, F), video (B, K, 3, T, H, W) -> ly_a, ly_v (B, K, C), z_a, z_v (B, K, D).

    audio is the output of augment.LogMel (log-mel of mean 0 and deviation 1), and video that of
    augment.normalize_frames (uint8 / 255, less 0.45, over 0.225). Each encoder runs once over all
    views, so its BatchNorm sees both speeds together. y = f(v) or g(a), z = h(y), and ly = l(y),
    which is y itself for the identity mapping. The loss brings z to unit length. The weights are
    random. arch: see video_encoder. mapping: see Mapping. D: projection width. Raises ValueError
    for another number of axes or channels, or for integers; M and F are not checked.
    """

    def __init__(self, arch="r2plus1d_18", mapping="identity", D=256):
        super().__init__()
        self.f, self.g = video_encoder(arch), audio_encoder()
        self.h_v, self.h_a = projector(D), projector(D)
        self.l = Mapping(mapping)

    def forward(self, audio, video):
        if (audio.dim() != 5 or video.dim() != 6 or audio.shape[:2] != video.shape[:2]
                or audio.shape[2] != 1 or video.shape[2] != 3
                or not audio.is_floating_point() or not video.is_floating_point()):
            raise ValueError(f"audio {audio.dtype} {tuple(audio.shape)}, video {video.dtype} "
                             f"{tuple(video.shape)}: give floats (B, K, 1, M, F) and (B, K, 3, T, "
                             "H, W), with the same B and K")
        views = video.shape[:2]                                         # (B, K)
        y_a = self.g(audio.flatten(0, 1))                               # (B K, C)
        y_v = self.f(video.flatten(0, 1))                               # (B K, C)
        for name, y in (("g", y_a), ("f", y_v)):
            if y.shape != (views.numel(), C):
                raise ValueError(f"{name} gives {tuple(y.shape)} for {tuple(views)} clips and "
                                 f"views: end it with nn.Linear(width, {C}), or change C of "
                                 "models.py")
        z_a, z_v = self.h_a(y_a), self.h_v(y_v)                         # (B K, D) x 2
        return tuple(x.unflatten(0, views) for x in (self.l(y_a), self.l(y_v), z_a, z_v))
