"""prepare/weights.py: networks saved as by GDT and SeLaVi give the same outputs; bad files."""

import math
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command, run_here
from test_augment import tone
from test_checkpoints import Bomb
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.video import r2plus1d_18

import retrieval
from experiments import figures
from models import SvaCLR, video_encoder
from prepare import weights
from prepare.weights import GDTLogMel
from support.checkpoints import load_encoder, load_svaclr


def network(base):
    """A base network whose classifier fc is saved but not applied."""
    base.fc.register_forward_hook(lambda fc, inputs, y: inputs[0])
    return nn.Sequential(OrderedDict(base=base))


def head(classes=256):
    """Two layers in the places that they have in GDT's files."""
    return nn.Sequential(OrderedDict(block_forward=nn.Sequential(
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 512, bias=False),
        nn.Unflatten(1, (512, 1)), nn.BatchNorm1d(512), nn.Flatten(), nn.ReLU(),
        nn.Dropout(0.3), nn.Linear(512, classes))))


@pytest.fixture(scope="module")
def gdt():
    """GDT's networks with random weights and random BatchNorm statistics."""
    torch.manual_seed(0)
    of_sound = ResNet(BasicBlock, [1, 1, 1, 1])
    of_sound.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model = nn.ModuleDict({"video_network": network(r2plus1d_18(weights=None)), "mlp_v": head(),
                           "audio_network": network(of_sound), "mlp_a": head()}).eval()
    for name, x in model.state_dict().items():
        if name.endswith(("weight", "running_var")) and x.dim() == 1:   # of BatchNorm
            x.uniform_(0.5, 1.5)
        elif x.dim() == 1:
            x.normal_(0, 0.1)
    return model


def save(tensors, path, wrapper="model", prefix="", zipped=True):
    """Save named tensors as GDT does: with its flags, and with the objects of its schedulers."""
    content = {prefix + name: x for name, x in tensors.items()}
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedulers = MultiStepLR(optimizer, [3]), CosineAnnealingLR(optimizer, 100)
    if wrapper:
        content = {wrapper: content, "lr_scheduler": {"after_scheduler": schedulers},
                   "args": Namespace(lr=1e-2, aug_audio=[1, 1, 3, 6]), "epoch": 201}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.slow
def test_gdt_gives_the_same_outputs(gdt, tmp_path, monkeypatch):
    file = save(gdt.state_dict(), tmp_path / "gdt_K400.pth")
    monkeypatch.chdir(tmp_path)
    said = "gdt/checkpoint.pt: 312 tensors of GDT\n"
    assert command(weights, "gdt", file) == (0, said, "")
    model, settings = load_svaclr("gdt/checkpoint.pt", SvaCLR)
    assert vars(settings) == {
        "arch": "r2plus1d_18", "mapping": "identity", "frames": 30, "fps": 30, "size": 112,
        "data": "", "sound": "gdt", "precision": "auto", "peer": "GDT",
        "source": "gdt_K400.pth"}
    torch.manual_seed(1)
    video = torch.randn(3, 3, 4, 24, 24)        # (B, 3, T, H, W)
    audio = torch.randn(3, 1, 40, 99)           # (B, 1, M, F)
    with torch.no_grad():
        y_a, y_v = gdt.audio_network(audio), gdt.video_network(video)
        theirs = y_a, y_v, F.normalize(gdt.mlp_a(y_a)), F.normalize(gdt.mlp_v(y_v))
        ours = list(model.eval()(audio[:, None], video[:, None]))
        ours[2:] = (F.normalize(z, dim=2) for z in ours[2:])
    for their, our in zip(theirs, ours):
        assert their.std(0).mean() > 1e-3       # the outputs depend on the input
        torch.testing.assert_close(our[:, 0], their, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_scripts_take_gdt_with_its_sound_input(gdt, tree, tmp_path, monkeypatch):
    """49 frames in 0.5 s. This file has the earlier format of torch.save, as GDT's have."""
    def watched(model, audio, video):
        shapes.add(audio.shape[2:])
        return forward(model, audio, video)

    shapes, forward, path = set(), SvaCLR.forward, tmp_path / "checkpoint.pt"
    monkeypatch.setattr(SvaCLR, "forward", watched)
    file = save(gdt.state_dict(), tmp_path / "gdt.pth", "state_dict", "module.", zipped=False)
    assert command(weights, "gdt", file, "--out", path)[0] == 0
    state = torch.load(path, weights_only=True)
    state["settings"] |= dict(frames=4, fps=8, size=16)
    torch.save(state, path)
    assert run_here(retrieval, "--checkpoint", path, "--data", tree, "--clips", "1") == 0
    assert shapes == {(1, 40, 49)}
    with pytest.raises(SystemExit, match="holds weights of GDT, which has no lambda to draw"):
        figures.main(["affinity", "--checkpoint", str(path), "--data", str(tree), "--out", "n.png"])


@pytest.mark.slow
def test_selavi_is_for_videos_alone(gdt, tree, tmp_path, capsys):
    """Its ten heads predict clusters, so they are dropped, and retrieval refuses the result."""
    tensors = gdt.state_dict() | {
        f"mlp_{modality}{n}.{name}": x for n in range(10) for modality in "va"
        for name, x in head(9).state_dict().items()}
    file = save(tensors, tmp_path / "selavi.pth", "model", "module.")
    out = tmp_path / "checkpoint.pt"
    said = f"{out}: 294 tensors of SeLaVi\n"
    assert command(weights, "selavi", file, "--out", out) == (0, said, "")
    f = load_encoder(out, video_encoder(), "r2plus1d_18")
    assert all(x.equal(y) for x, y in zip(f.parameters(), gdt.video_network.parameters()))
    assert run_here(retrieval, "--checkpoint", out, "--data", tree) == 1
    assert "holds encoders without projectors" in capsys.readouterr().err


def test_files_that_are_refused(gdt, tmp_path):
    """One is of a deeper network, whose heads lack BatchNorm or have a bias."""
    torch.save({"model": {}, "args": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pth")
    tensors = {name: x for name, x in gdt.state_dict().items()
               if not name.startswith("mlp_a.block_forward.4.")} | {
        "video_network.base.layer1.2.conv1.0.0.weight": torch.zeros(1),
        "mlp_v.block_forward.2.bias": torch.zeros(512),
        "mlp_v.block_forward.8.weight": torch.zeros(128, 512)}
    deep, new = save(tensors, tmp_path / "deep.pth", None), tmp_path / "new" / "checkpoint.pt"
    content = deep.read_bytes()
    for name, out, sentence in (
            ("bomb.pth", new, "{} cannot be loaded: "),
            ("deep.pth", new, "{} is not GDT with R(2+1)D-18 and ResNet-9 as published: it lacks 5 "
             "tensors, mlp_a.block_forward.4.bias the first; has besides 2 tensors, "
             "mlp_v.block_forward.2.bias the first; has in another shape 1 tensors, "
             "mlp_v.block_forward.8.weight the first"),
            ("deep.pth", deep, "--out {} exists already: give another, or delete it first")):
        status, stdout, stderr = command(weights, "gdt", tmp_path / name, "--out", out)
        assert (status, stdout, stderr.count("\n")) == (1, "", 1)
        assert stderr.startswith(f"error: {sentence.format(tmp_path / name)}")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "new").exists()
    assert deep.read_bytes() == content


def logfbank(samples):
    """python_speech_features.logfbank with its defaults, at 24 kHz: (L,) integers -> (frames, 40).
    A frame has 480 samples, 240 apart, and an FFT of 1024."""
    x = samples.astype(np.float64)
    x = np.concatenate([x[:1], x[1:] - 0.97 * x[:-1]])
    count = 1 if len(x) <= 480 else 1 + math.ceil((len(x) - 480) / 240)
    x = np.pad(x, (0, (count - 1) * 240 + 480 - len(x)))
    frames = np.stack([x[n * 240:n * 240 + 480] for n in range(count)])
    power = np.abs(np.fft.rfft(frames, 1024)) ** 2 / 1024      # (frames, 513)
    mel = np.linspace(0, 2595 * math.log10(1 + 12000 / 700), 42)
    edges = np.floor(1025 * 700 * (10 ** (mel / 2595) - 1) / 24000)
    bands = [np.interp(np.arange(513), edges[n:n + 3], (0, 1, 0)) for n in range(40)]
    energy = power @ np.transpose(bands)
    return np.log(np.where(energy == 0, np.finfo(float).eps, energy))


def test_gdt_log_mel_is_the_published_formula():
    """Noise, a tone, silence, and sound that starts and ends within silence."""
    g = torch.Generator().manual_seed(0)
    noise, silence = 0.3 * torch.randn(24000, generator=g), torch.zeros(24000)
    part = torch.cat([silence[:7000], 1e-3 * noise[:9000], silence[:8000]])
    waves = torch.stack([noise, 0.8 * tone(440), silence, part])
    for length in (200, 480, 23999, 24000):      # the last frame of some is padded
        x = GDTLogMel()(waves[:, :length])       # (4, 1, 40, F)
        for wave, row in zip(waves[:, :length], x):
            samples = np.clip(np.rint(wave.double().numpy() * 32768), -32768, 32767)
            expected = (logfbank(samples).T - 1.93) / 17.89
            assert row.shape == (1, *expected.shape) and row.dtype == torch.float32, length
            assert np.abs(row[0].numpy() - expected).max() < 1e-4, length
    torch.testing.assert_close(GDTLogMel()(waves.reshape(2, 2, -1)), x.reshape(2, 2, 1, 40, 99))
    with torch.autocast("cpu", torch.bfloat16):
        assert GDTLogMel()(waves).equal(x)
