"""Checkpoints: read without running code from them, and loaded strictly."""

import io
import pickle
import zlib
from argparse import Namespace

import torch
from torchvision.models.video import R2Plus1D_18_Weights, R3D_18_Weights

from support.files import write_atomic
from support.processes import say

SUPERVISED = {"r2plus1d_18": R2Plus1D_18_Weights.KINETICS400_V1,
              "r3d_18": R3D_18_Weights.KINETICS400_V1}


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
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"{path} is no checkpoint.pt of this project: it lacks "
                         f"{', '.join(missing)}; name another file, or another --out")
    return state


def load_svaclr(path, build):
    """Load the model in a checkpoint.pt of pretrain.py, and its settings, a Namespace of the flags.

    build(arch, mapping) makes the model: models.SvaCLR. settings.sound names the input of g, see
    prepare.weights.sound_input, and settings.precision is that of the training. Raises ValueError
    if the file is no such checkpoint, or if it has no projectors.
    """
    state = read_state(path, ("model", "settings"))
    settings = Namespace(**{"sound": None, "precision": "auto"} | state["settings"])
    if not hasattr(settings, "mapping"):
        raise ValueError(f"{path} was not written by pretrain.py: give a checkpoint.pt of it")
    if "h_v.0.weight" not in state["model"]:
        raise ValueError(f"{path} holds encoders without projectors, which were not trained to be "
                         "compared: give it to finetune.py or to experiments.search --pair "
                         "video-video, or give another checkpoint")
    with torch.device("meta"):                  # no initial values, which the load would replace
        model = build(settings.arch, settings.mapping)
    model.load_state_dict(state["model"], assign=True)
    return model, settings


def load_encoder(source, net, arch):
    """Load the weights of `source` into net, which is models.video_encoder(arch), and return it.

    source: "none": random weights | "torchvision": weights trained on Kinetics-400 with labels,
    which torchvision downloads once | the path of a checkpoint.pt or video_encoder.pt of
    pretrain.py, or of torchvision's file. Raises ValueError if a tensor is missing, is left over or
    has another shape, or if the file cannot be read.
    """
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
    faults = misfit(net.state_dict(), state)
    if faults:
        raise ValueError(f"{source} does not fit --arch {arch}: it {faults}"
                         + (f"; it was trained with --arch {trained}" if trained != arch else ""))
    net.load_state_dict(state)
    return net


def say_torchvision(source, frames, fps, size):
    """With --checkpoint torchvision, say which input its weights expect, and which they get."""
    if source == "torchvision":
        say("torchvision's weights were trained with --frames 16 --fps 15 --size 112 and with a "
            f"mean and deviation for each colour; here they get --frames {frames} --fps {fps} "
            f"--size {size}, and mean 0.45 and deviation 0.225 for all colours")


def misfit(own, state):
    """How the tensors of `state` differ from `own` by name and shape, in words, or ""."""
    faults = {"lacks": own.keys() - state.keys(), "has besides": state.keys() - own.keys(),
              "has in another shape": {name for name in own.keys() & state.keys()
                                       if own[name].shape != state[name].shape}}
    return "; ".join(f"{what} {len(names)} tensors, {min(names)} the first"
                     for what, names in faults.items() if names)


def load_audio_encoder(source, net):
    """Load g of a checkpoint.pt into net, if the file holds one. Returns whether it does."""
    model = {} if source == "torchvision" else read_state(source).get("model", {})
    state = {name[2:]: x for name, x in model.items() if name.startswith("g.")}
    if state and (faults := misfit(net.state_dict(), state)):
        raise ValueError(f"{source} does not fit the audio encoder: it {faults}")
    if state:
        net.load_state_dict(state)
    return bool(state)


def write_state(state, path):
    """Write a state for torch.load, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(buffer.getbuffer(), path)


def checksum(model):
    """Tell the weights of models apart: crc32 of all tensors, 8 hexadecimal digits."""
    crc = 0
    for x in model.state_dict().values():
        crc = zlib.crc32(x.cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"
