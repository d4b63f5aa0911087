"""The networks of §2 and §2.3: encoders f and g, projectors h_v and h_a, the mapping l of Eq. 2.

    model = SvaCLR()
    ly_a, ly_v, z_a, z_v = model(audio, video)        # (B, K, 1, M, F), (B, K, 3, T, H, W)

This file needs torch and torchvision alone. Symbols: f video encoder, g audio encoder (Eq. 3 writes
g(a), f(v)); B clips, K views, C = 512 encoder width, D projection width, T frames, H, W pixels, M
mel bands, F spectrogram frames.
"""

import pickle
from argparse import Namespace

import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock
from torchvision.models.video import R2Plus1D_18_Weights, R3D_18_Weights
from torchvision.models.video import resnet as video_resnet

C = 512
SUPERVISED = {"r2plus1d_18": R2Plus1D_18_Weights.KINETICS400_V1,
              "r3d_18": R3D_18_Weights.KINETICS400_V1}


def video_encoder(arch="r2plus1d_18"):
    """Build f: (n, 3, T, H, W) -> (n, 512), with torchvision's names and without its head `fc`.

    arch: "r2plus1d_18" (§2.3; Tables 1 and 2) | "r3d_18" (Table 2) | "r2plus1d_10", which has one
    block per stage instead of two and is for CPUs (not in the paper).
    """
    if arch == "r3d_18":
        conv, stem = video_resnet.Conv3DSimple, video_resnet.BasicStem
    elif arch in ("r2plus1d_18", "r2plus1d_10"):
        conv, stem = video_resnet.Conv2Plus1D, video_resnet.R2Plus1dStem
    else:
        raise ValueError(f"arch={arch!r}: choose 'r2plus1d_18', 'r3d_18' or 'r2plus1d_10'")
    blocks = 1 if arch == "r2plus1d_10" else 2
    net = video_resnet.VideoResNet(video_resnet.BasicBlock, [conv] * 4, [blocks] * 4, stem)
    net.fc = nn.Identity()
    for module in net.modules():
        if isinstance(module, nn.Conv3d) and module.padding[0]:
            module.register_forward_pre_hook(pad_first)
    return net


def read_state(path, names=()):
    """Read the dict in a checkpoint: tensors and plain values. Code in the file is not run.

    Raises ValueError if the file is missing, truncated, of another program, or lacks a name.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {path}: run pretrain.py first, or name another") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError,
            ValueError) as error:
        raise ValueError(f"{path} cannot be loaded: it is truncated, or another program wrote it, "
                         "or it carries code, which we do not run; delete it or name another"
                         ) from error
    if not isinstance(state, dict) or not isinstance(state.get("model", {}), dict):
        raise ValueError(f"{path} is no checkpoint: it does not hold named tensors; name another")
    if names and "args" in state and "settings" not in state:
        raise ValueError(f"{path} was written by an earlier version of this project, which alone "
                         "can continue it: give another --out, or use that version")
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"{path} is no checkpoint.pt of this project: it lacks "
                         f"{', '.join(missing)}; delete it or name another")
    return state


def load_svaclr(path):
    """Load the model in a checkpoint.pt of pretrain.py, and its settings, a Namespace of the flags.

    settings.sound names the input of g, see augment.sound_input.
    Raises ValueError if the file is no such checkpoint, or if it has no projectors.
    """
    state = read_state(path, ("model", "settings"))
    settings = Namespace(**{"sound": None} | state["settings"])
    if not hasattr(settings, "mapping"):
        raise ValueError(f"{path} was not written by pretrain.py: give a checkpoint.pt of it")
    if "h_v.0.weight" not in state["model"]:
        raise ValueError(f"{path} holds encoders without projectors, which were not trained to be "
                         "compared: give it to finetune.py or to --pair video-video, or give "
                         "another checkpoint")
    with torch.device("meta"):                  # no initial values, which the load would replace
        model = SvaCLR(settings.arch, settings.mapping)
    model.load_state_dict(state["model"], assign=True)
    return model, settings


def load_encoder(source, arch="r2plus1d_18"):
    """Build f and load the weights of `source`.

    source: "none": random weights | "torchvision": weights trained on Kinetics-400 with labels,
    which torchvision downloads once | the path of a checkpoint.pt or video_encoder.pt of
    pretrain.py, or of torchvision's file. Raises ValueError if a tensor is missing, is left over or
    has another shape, or if the file cannot be read.
    """
    net = video_encoder(arch)
    if source == "none":
        return net
    if source == "torchvision":
        if arch not in SUPERVISED:
            raise ValueError(f"torchvision has no weights for {arch}: choose "
                             f"{' or '.join(SUPERVISED)}")
        url = SUPERVISED[arch].url
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except OSError as error:
            raise ValueError(f"cannot download {url} ({error}): fetch it and give its path"
                             ) from error
    else:
        state = read_state(source)
    trained = state.get("settings", {}).get("arch", arch)
    if "model" in state:
        state = {name[2:]: x for name, x in state["model"].items() if name.startswith("f.")}
    state = {name: x for name, x in state.items() if not name.startswith("fc.")}
    own = net.state_dict()
    reshaped = {n for n in own.keys() & state.keys() if own[n].shape != state[n].shape}
    faults = {"lacks": own.keys() - state.keys(), "has besides": state.keys() - own.keys(),
              "has in another shape": reshaped}
    if any(faults.values()):
        lists = [f"{what} {len(names)} tensors, {min(names)} the first"
                 for what, names in faults.items() if names]
        raise ValueError(f"{source} does not fit --arch {arch}: it {'; '.join(lists)}"
                         + (f"; it was trained with --arch {trained}" if trained != arch else ""))
    net.load_state_dict(state)
    return net


def pad_first(conv, inputs):
    """On CPUs, zero-pad a clip of two frames before a convolution in time. The result is the same.

    If the convolution pads, oneDNN 3.12 (torch 2.14) returns a bfloat16 weight gradient that holds
    uninitialised memory, infinities included. tests/test_models.py shows it.
    """
    deep2 = inputs[0].shape[2] == 2 and inputs[0].device.type == "cpu"
    conv.padding_mode = "constant" if deep2 else "zeros"


def audio_encoder():
    """Build g: (n, 1, M, F) -> (n, 512), the "9-layered 2D ResNet" of §2.3.

    conv1 takes 1 channel to 64; one BasicBlock per stage follows (GDT).
    """
    net = ResNet(BasicBlock, [1, 1, 1, 1])
    net.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.fc = nn.Identity()
    return net


def projector(width=512, D=256):
    """Build h: (n, C) -> (n, D), a "two-layered MLP" (§2.3). Widths and BatchNorm are GDT's."""
    return nn.Sequential(nn.Linear(C, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True),
                         nn.Linear(width, D))


class Mapping(nn.Sequential):
    """l of Eq. 2, one for both modalities: (..., C) -> (..., C).

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

    Each encoder runs once over all views, so its BatchNorm sees both speeds together. ly is l(y) of
    the encoder output y, which is y itself for the identity mapping. z is h(y); the loss brings it
    to unit length.
    """

    def __init__(self, arch="r2plus1d_18", mapping="identity"):
        super().__init__()
        self.f, self.g = video_encoder(arch), audio_encoder()
        self.h_v, self.h_a = projector(), projector()
        self.l = Mapping(mapping)

    def forward(self, audio, video):
        if audio.dim() != 5 or video.dim() != 6 or audio.shape[:2] != video.shape[:2]:
            raise ValueError(f"audio {tuple(audio.shape)}, video {tuple(video.shape)}: give "
                             "(B, K, 1, M, F) and (B, K, 3, T, H, W), with the same B and K")
        views = video.shape[:2]                                         # (B, K)
        y_a = self.g(audio.flatten(0, 1))                               # (B K, C)
        y_v = self.f(video.flatten(0, 1))                               # (B K, C)
        z_a, z_v = self.h_a(y_a), self.h_v(y_v)                         # (B K, D) x 2
        return tuple(x.unflatten(0, views) for x in (self.l(y_a), self.l(y_v), z_a, z_v))
