"""support/checkpoints.py: how checkpoints and published weights are read, and what is refused."""

from urllib.error import URLError

import pytest
import torch
import torchvision

import finetune
from models import SvaCLR, video_encoder
from support.checkpoints import load_encoder, load_svaclr, read_state


def load(source, arch="r2plus1d_18"):
    return load_encoder(source, video_encoder(arch), arch)


@pytest.mark.slow
def test_torchvisions_encoder_comes_from_its_file_and_its_address(tmp_path, monkeypatch):
    torch.manual_seed(0)
    theirs = torchvision.models.video.r2plus1d_18(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")      # this one has a classifier, fc
    urls = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url",
                        lambda url, **_: urls.append(url) or theirs.state_dict())
    last = theirs.layer4[1].conv2[0][3].weight
    for source in (tmp_path / "theirs.pth", "torchvision"):
        assert load(source).layer4[1].conv2[0][3].weight.equal(last)
    assert urls == [torchvision.models.video.R2Plus1D_18_Weights.KINETICS400_V1.url]
    assert not load("none").stem[0].weight.equal(theirs.stem[0].weight)


def test_a_download_that_fails(monkeypatch):
    def offline(url, **_):
        raise URLError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="cannot download https://.*pth .*no network.*: "
                                         "fetch it and give its path"):
        load("torchvision", "r3d_18")


class Bomb:
    """An object that carries code in its pickle: the code writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_checkpoints_are_not_trusted(tmp_path):
    torch.save({"settings": {}, "model": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    (tmp_path / "exploded").unlink()            # so the code does run if it is trusted
    torch.save({"settings": {}}, tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:300])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    for name in ("bomb.pt", "cut.pt", "text.pt", "empty.pt"):
        with pytest.raises(ValueError, match="cannot be loaded: it is truncated, or another "
                                             "program wrote it, or it carries code"):
            read_state(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_svaclr_comes_back_with_its_settings(brief, tmp_path):
    """Of a checkpoint.pt of pretrain.py alone: one of finetune.py has other settings."""
    _, settings = load_svaclr(brief, SvaCLR)
    assert vars(settings) == torch.load(brief, weights_only=True)["settings"] | {"sound": None}
    assert settings.arch == "r2plus1d_10" and settings.frames == 4 and settings.max_speed == 4
    other = tmp_path / "finetune.pt"
    torch.save({"settings": vars(finetune.parse([])), "model": {}}, other)
    with pytest.raises(ValueError, match="finetune.pt was not written by pretrain.py: give a"):
        load_svaclr(other, SvaCLR)
