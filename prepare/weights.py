"""Published weights of other models -> a checkpoint.pt that our scripts can measure (Tables 2, 3).

    python -m prepare.weights gdt gdt_K400.pth --out gdt/checkpoint.pt
    python -m prepare.weights selavi selavi_vgg_sound_150.pth --out selavi/checkpoint.pt

Both have the encoders of this project under other names. GDT's heads become our projectors, and
SeLaVi's, which predict clusters, are dropped. Code in the published file is not run. docs/data.md
says which scripts take the checkpoints.
"""

import argparse
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from augment import LogMel
from models import SvaCLR
from support.checkpoints import misfit, read_state, write_state
from support.commands import errors_in_one_line

TITLES = {"gdt": "GDT", "selavi": "SeLaVi"}
# GDT's head is Flatten, Dropout, Linear without bias, Unsqueeze, BatchNorm1d, Flatten, ReLU,
# Dropout, Linear. Those without weights change nothing in a test but the ReLU, which we have too.
NAMES = {"f.": "video_network.base.", "g.": "audio_network.base.",
         "h_v.0.": "mlp_v.block_forward.2.", "h_a.0.": "mlp_a.block_forward.2.",
         "h_v.1.": "mlp_v.block_forward.4.", "h_a.1.": "mlp_a.block_forward.4.",
         "h_v.3.": "mlp_v.block_forward.8.", "h_a.3.": "mlp_a.block_forward.8."}
UNUSED = {"gdt": r"(video|audio)_network\.base\.fc\.",
          "selavi": r"(video|audio)_network\.base\.fc\.|mlp_[va]\d*\."}


class GDTLogMel(nn.Module):
    """GDT's sound input, which its weights expect: (..., L) -> (..., 1, 40, F), in float32.

    This is python_speech_features.logfbank of 16-bit sound at 24 kHz: window 20 ms, hop 10 ms.
    """

    def __init__(self):
        super().__init__()
        hz = 700 * ((1 + 12000 / 700) ** (torch.arange(42).double() / 41) - 1)  # even steps of mel
        edges = (1025 * hz / 24000).floor()[:, None]                    # (42, 1) bins of the FFT
        rise = (torch.arange(513) - edges[:-1]) / edges.diff(dim=0)     # (41, 513)
        self.register_buffer("bands", torch.minimum(rise[:-1], 1 - rise[1:]).clamp(min=0).float())

    def forward(self, wave):
        with torch.autocast(wave.device.type, enabled=False):
            x = (wave.float() * 32768).round().clamp(-32768, 32767)     # (..., L)
            x = torch.cat([x[..., :1], x[..., 1:] - 0.97 * x[..., :-1]], -1)    # pre-emphasis
            x = F.pad(x, (0, max(480 - x.shape[-1], -x.shape[-1] % 240)))
            x = x.unfold(-1, 480, 240)                                  # (..., F, 480)
            x = torch.fft.rfft(x, 1024).abs() ** 2 / 1024 @ self.bands.T    # (..., F, 40)
            return ((x.where(x > 0, 2 ** -52).log() - 1.93) / 17.89).mT.unsqueeze(-3)


def sound_input(name=None):
    """The spectrograms that a model expects: "gdt" for weights of GDT | None for our own."""
    return {None: LogMel, "gdt": GDTLogMel}[name]()


class Ignored:
    """Stands in for an object in a published file other than a tensor. It forgets its content."""

    def __setstate__(self, state):
        pass


# What GDT saves beside the tensors: its flags, and a scheduler that holds the optimiser.
OBJECTS = [(Ignored, "argparse.Namespace"), (Ignored, "torch.optim.lr_scheduler.MultiStepLR"),
           (Ignored, "torch.optim.lr_scheduler.CosineAnnealingLR"),
           (Ignored, "torch.optim.sgd.SGD"), (Ignored, "builtins.dict"),
           (lambda *_: {}, "collections.defaultdict")]


def convert(peer, path):
    """Our tensors by their names, from a published file.

    peer: "gdt" | "selavi". The tensors lie under "model" or "state_dict", or bare, and may have the
    prefix of a parallel run. Raises ValueError if the file cannot be read or is of another model:
    if a tensor is missing, has another shape or is left over.
    """
    with torch.serialization.safe_globals(OBJECTS):
        state = read_state(path)
    tensors = state.get("model", state.get("state_dict", state))
    tensors = {str(name).removeprefix("module."): x for name, x in tensors.items()
               if torch.is_tensor(x)}
    bias = ("h_v.0.bias", "h_a.0.bias")                     # GDT's first linear layer has none
    ours = {name: x for name, x in SvaCLR().state_dict().items()
            if name not in bias and (peer == "gdt" or name.startswith(("f.", "g.")))}
    names = {NAMES[part] + name.removeprefix(part): name    # theirs -> ours
             for name in ours for part in NAMES if name.startswith(part)}
    used = {name: x for name, x in tensors.items() if not re.match(UNUSED[peer], name)}
    faults = misfit({their: ours[our] for their, our in names.items()}, used)
    if faults:
        raise ValueError(f"{path} is not {TITLES[peer]} with R(2+1)D-18 and ResNet-9 as published: "
                         f"it {faults}")
    weights = {our: tensors[their] for their, our in names.items()}
    if peer == "gdt":
        weights |= {name: torch.zeros(len(weights["h_v.0.weight"])) for name in bias}
    return weights


def main():
    """Run the command. The exit status is 1, with a sentence on stderr, if nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=TITLES, help="the model whose weights the file holds")
    parser.add_argument("file", help="the published file")
    parser.add_argument("--out", help="the checkpoint.pt to write (default PEER/checkpoint.pt)")
    args = parser.parse_args()
    out = Path(args.out or f"{args.peer}/checkpoint.pt")
    # Clips as GDT and SeLaVi saw them. "sound": see sound_input. SeLaVi's g is not used.
    settings = {"arch": "r2plus1d_18", "mapping": "identity", "frames": 30, "fps": 30, "size": 112,
                "data": "", "sound": "gdt" if args.peer == "gdt" else None,
                "peer": TITLES[args.peer], "source": Path(args.file).name}
    with errors_in_one_line():
        if out.exists():
            raise ValueError(f"--out {out} exists already: give another, or delete it first")
        weights = convert(args.peer, args.file)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_state({"settings": settings, "model": weights}, out)
    print(f"{out}: {len(weights)} tensors of {TITLES[args.peer]}")


if __name__ == "__main__":
    main()
