"""prepare/weights.py: networks in the layout of GDT and SeLaVi, saved as they save them, come back
with the same outputs, and other files are refused."""

import argparse
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import command, run_here
from test_augment import tone
from test_checkpoints import Bomb
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import retrieval
from experiments import figures
from models import SvaCLR, video_encoder
from prepare import weights
from prepare.weights import GDTLogMel
from support.checkpoints import load_encoder, load_svaclr


class Network(nn.Module):
    """A base network whose classifier fc is saved but not applied."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        for name, module in self.base.named_children():
            x = x if name == "fc" else module(x)
        return x.flatten(1)


class Head(nn.Module):
    """Two layers in the places that they have in GDT's files."""

    def __init__(self, classes=256):
        super().__init__()
        self.block_forward = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 512, bias=False),
            nn.Unflatten(1, (512, 1)), nn.BatchNorm1d(512), nn.Flatten(), nn.ReLU(),
            nn.Dropout(0.3), nn.Linear(512, classes))

    def forward(self, x):
        return self.block_forward(x)


class GDT(nn.Module):
    def __init__(self):
        super().__init__()
        self.video_network = Network(torchvision.models.video.r2plus1d_18(weights=None))
        self.audio_network = Network(ResNet(BasicBlock, [1, 1, 1, 1]))
        self.audio_network.base.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        self.mlp_v, self.mlp_a = Head(), Head()

    def forward(self, video, audio):
        y_v, y_a = self.video_network(video), self.audio_network(audio)
        return y_a, y_v, F.normalize(self.mlp_a(y_a)), F.normalize(self.mlp_v(y_v))


@pytest.fixture(scope="module")
def gdt():
    """A model with random weights and random BatchNorm statistics."""
    torch.manual_seed(0)
    model = GDT().eval()
    for name, x in model.state_dict().items():
        if name.endswith(("weight", "running_var")) and x.dim() == 1:     # of BatchNorm
            x.uniform_(0.5, 1.5)
        elif x.dim() == 1:
            x.normal_(0, 0.1)
    return model


def save(tensors, path, wrapper="model", prefix="", zipped=True):
    """Save named tensors as GDT does: with its flags, and with the objects of its scheduler."""
    tensors = {prefix + name: x for name, x in tensors.items()}
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedulers = torch.optim.lr_scheduler
    after = (schedulers.MultiStepLR(optimizer, [3]) if wrapper == "model"
             else schedulers.CosineAnnealingLR(optimizer, 100))
    if wrapper:
        tensors = {wrapper: tensors, "optimizer": optimizer.state_dict(), "epoch": 201,
                   "lr_scheduler": {"after_scheduler": after, "finished": True},
                   "args": argparse.Namespace(lr=1e-2, aug_audio=[1, 1, 3, 6])}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("wrapper, prefix, zipped", [
    ("model", "", True), ("state_dict", "module.", False), (None, "", True)])
def test_gdt_gives_the_same_outputs(gdt, tmp_path, monkeypatch, wrapper, prefix, zipped):
    """The file is of the earlier format of torch.save too, which GDT's torch 1.3.1 wrote."""
    file = save(gdt.state_dict(), tmp_path / "gdt_K400.pth", wrapper, prefix, zipped)
    monkeypatch.chdir(tmp_path)
    status, stdout, _ = command(weights, "gdt", file)
    assert (status, stdout) == (0, "gdt/checkpoint.pt: 312 tensors of GDT\n")
    model, settings = load_svaclr("gdt/checkpoint.pt", SvaCLR)
    assert vars(settings) == {
        "arch": "r2plus1d_18", "mapping": "identity", "frames": 30, "fps": 30, "size": 112,
        "data": "", "sound": "gdt", "peer": "GDT", "source": "gdt_K400.pth"}
    g = torch.Generator().manual_seed(1)
    video = torch.randn(3, 3, 4, 24, 24, generator=g)     # (B, 3, T, H, W)
    audio = torch.randn(3, 1, 40, 99, generator=g)        # (B, 1, M, F)
    with torch.no_grad():
        theirs = gdt(video, audio)
        ours = list(model.eval()(audio[:, None], video[:, None]))
        ours[2:] = (F.normalize(z, dim=2) for z in ours[2:])
    for name, their, our in zip(("y_a", "y_v", "z_a", "z_v"), theirs, ours):
        assert their.std(0).mean() > 1e-3, name           # the outputs depend on the input
        torch.testing.assert_close(our[:, 0], their, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_scripts_take_gdt_with_its_sound_input(gdt, tree, tmp_path, monkeypatch):
    """At 0.5 s GDT's input has 49 spectrogram frames, and the log-mel has 51."""
    shapes, load, path = set(), retrieval.load_svaclr, tmp_path / "checkpoint.pt"

    def watched(path, build):
        model, settings = load(path, build)
        model.g.register_forward_hook(lambda g, inputs, y_a: shapes.add(inputs[0].shape[1:]))
        return model, settings

    monkeypatch.setattr(retrieval, "load_svaclr", watched)
    command(weights, "gdt", save(gdt.state_dict(), tmp_path / "gdt_K400.pth"), "--out", path)
    state = torch.load(path, weights_only=True)
    state["settings"] |= dict(frames=4, fps=8, size=16)
    torch.save(state, path)
    assert run_here(retrieval, "--checkpoint", path, "--data", tree, "--clips", "1") == 0
    assert shapes == {(1, 40, 49)}
    with pytest.raises(SystemExit, match="holds weights of GDT, which has no lambda to draw"):
        figures.main(["affinity", "--checkpoint", str(path), "--data", str(tree), "--out",
                      str(tmp_path / "n.png")])


@pytest.mark.slow
def test_selavi_is_for_videos_alone(gdt, tree, tmp_path, capsys):
    """Its ten heads predict clusters, so they are dropped, and retrieval refuses the result."""
    tensors = {name: x for name, x in gdt.state_dict().items() if not name.startswith("mlp")}
    tensors |= {f"mlp_{modality}{n}.{name}": x for n in range(10) for modality in "va"
                for name, x in Head(9).state_dict().items()}
    file = save(tensors, tmp_path / "selavi_vgg_sound_150.pth", "model", "module.")
    out = tmp_path / "checkpoint.pt"
    status, stdout, _ = command(weights, "selavi", file, "--out", out)
    assert (status, stdout) == (0, f"{out}: 294 tensors of SeLaVi\n")
    last = load_encoder(out, video_encoder(), "r2plus1d_18").layer4[1].conv2[0][3].weight
    assert last.equal(gdt.video_network.base.layer4[1].conv2[0][3].weight)
    assert run_here(retrieval, "--checkpoint", out, "--data", tree) == 1
    assert "holds encoders without projectors" in capsys.readouterr().err


def test_files_that_are_refused(gdt, tmp_path):
    """Among them are weights of another model, of a deeper network, with a head without BatchNorm
    and a first layer with a bias."""
    good = save({"text_network.fc1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"model": {}, "args": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pth")
    tensors = {name: x for name, x in gdt.state_dict().items()
               if not name.startswith("mlp_a.block_forward.4.")} | {
        "video_network.base.layer1.2.conv1.0.0.weight": torch.zeros(1),
        "mlp_v.block_forward.2.bias": torch.zeros(512),
        "mlp_v.block_forward.8.weight": torch.zeros(128, 512)}
    save(tensors, tmp_path / "deep.pth")
    new, content = tmp_path / "new" / "checkpoint.pt", good.read_bytes()
    published = "{} is not GDT with R(2+1)D-18 and ResNet-9 as published: it lacks "
    for name, out, sentence in (
            ("gone.pth", new, "no checkpoint {}: "), ("bomb.pth", new, "{} cannot be loaded: "),
            ("other.pth", new, published + "310 tensors"),
            ("deep.pth", new, published + "5 tensors, mlp_a.block_forward.4.bias the first; has "
             "besides 2 tensors, mlp_v.block_forward.2.bias the first; has in another shape 1 "
             "tensors, mlp_v.block_forward.8.weight the first"),
            ("deep.pth", good, f"--out {good} exists already: give another, or delete it first")):
        status, stdout, stderr = command(weights, "gdt", tmp_path / name, "--out", out)
        assert (status, stdout, stderr.count("\n")) == (1, "", 1)
        assert stderr.startswith(f"error: {sentence.format(tmp_path / name)}")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "new").exists()
    assert good.read_bytes() == content


def logfbank(samples, rate=24000, nfft=1024, nfilt=40, width=480, step=240):
    """The published formula of python_speech_features.logfbank, loop by loop in float64.

    samples: (L,) integers -> (frames, nfilt). Its defaults are a pre-emphasis of 0.97, a
    rectangular window, and bands from 0 to half the rate.
    """
    x = samples.astype(np.float64)
    x = np.concatenate([x[:1], x[1:] - 0.97 * x[:-1]])
    count = 1 if len(x) <= width else 1 + math.ceil((len(x) - width) / step)
    x = np.concatenate([x, np.zeros((count - 1) * step + width - len(x))])
    frames = np.stack([x[n * step:n * step + width] for n in range(count)])
    power = np.abs(np.fft.rfft(frames, nfft)) ** 2 / nfft               # (frames, nfft // 2 + 1)
    top = 2595 * math.log10(1 + rate / 2 / 700)
    mel = [top * k / (nfilt + 1) for k in range(nfilt + 2)]
    edges = [math.floor((nfft + 1) * 700 * (10 ** (m / 2595) - 1) / rate) for m in mel]
    bands = np.zeros((nfilt, nfft // 2 + 1))
    for band, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:])):
        for k in range(low, middle):
            bands[band, k] = (k - low) / (middle - low)
        for k in range(middle, high):
            bands[band, k] = (high - k) / (high - middle)
    energy = power @ bands.T
    return np.log(np.where(energy == 0, np.finfo(float).eps, energy))


def test_gdt_log_mel_is_the_published_formula():
    """Noise, a tone, silence, and sound that starts and ends within silence."""
    g = torch.Generator().manual_seed(0)
    noise, silence = 0.3 * torch.randn(24000, generator=g), torch.zeros(24000)
    part = torch.cat([silence[:7000], 1e-3 * noise[:9000], silence[:8000]])
    waves = torch.stack([noise, 0.8 * tone(440), silence, part])
    x = GDTLogMel()(waves)                                # (4, 1, 40, F)
    assert x.shape == (4, 1, 40, 99) and x.dtype == torch.float32
    assert len(x[2].unique()) == 1 and x[2].max() < -2    # silence is the log of the float64 eps
    for length in (24000, 24001, 480, 200):               # the last frame is padded
        found = GDTLogMel()(waves[:, :length])
        for wave, row in zip(waves[:, :length], found):
            samples = np.clip(np.rint(wave.double().numpy() * 32768), -32768, 32767)
            expected = (logfbank(samples).T - 1.93) / 17.89
            assert row.shape == (1, *expected.shape), length
            assert np.abs(row[0].numpy() - expected).max() < 1e-4, length
    torch.testing.assert_close(GDTLogMel()(waves.reshape(2, 2, -1)), x.reshape(2, 2, 1, 40, 99))
    with torch.autocast("cpu", torch.bfloat16):
        assert GDTLogMel()(waves).equal(x)
