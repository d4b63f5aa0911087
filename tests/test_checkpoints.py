"""support/checkpoints.py: how weights are read, and what is refused."""

from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
import torchvision

import finetune
from models import SvaCLR, audio_encoder, video_encoder
from support.checkpoints import load_audio_encoder, load_encoder, load_svaclr


@pytest.mark.parametrize("arch", [pytest.param("r2plus1d_18", marks=pytest.mark.slow), "r3d_18"])
def test_torchvisions_encoder_comes_from_its_file_and_its_address(arch, tmp_path, monkeypatch):
    theirs = torchvision.models.get_model(arch).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")    # with a classifier, fc
    download = Mock(return_value=theirs.state_dict())
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    theirs.fc = torch.nn.Identity()
    x = torch.randn(1, 3, 5, 32, 32)
    for source in (tmp_path / "theirs.pth", "torchvision"):
        ours = load_encoder(source, video_encoder(arch), arch).eval()
        torch.testing.assert_close(ours(x), theirs(x))
    assert load_encoder("none", theirs, arch) is theirs
    url = torchvision.models.get_model_weights(arch).KINETICS400_V1.url
    assert [call.args for call in download.call_args_list] == [(url,)]
    download.side_effect = URLError("no network")
    with pytest.raises(ValueError, match="cannot download https://.*pth .*no network.*: "
                                         "fetch it and give its path"):
        load_encoder("torchvision", theirs, arch)


class Bomb:
    """It carries code in its pickle, which writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_checkpoints_are_not_trusted(tmp_path):
    """Nor is one of finetune.py taken for one of pretrain.py."""
    state = {"settings": vars(finetune.parse([])), "model": {}}
    torch.save(state, tmp_path / "finetune.pt")
    with pytest.raises(ValueError, match="finetune.pt was not written by pretrain.py: give a"):
        load_svaclr(tmp_path / "finetune.pt", SvaCLR)
    torch.save({"model": {"g.conv2.weight": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt does not fit the audio encoder: it lacks "):
        load_audio_encoder(tmp_path / "other.pt", audio_encoder())
    torch.save(state | {"model": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    (tmp_path / "exploded").unlink()            # so the code does run if it is trusted
    (tmp_path / "cut.pt").write_bytes((tmp_path / "finetune.pt").read_bytes()[:300])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    for name in ("bomb.pt", "cut.pt", "text.pt", "empty.pt"):
        with pytest.raises(ValueError, match="cannot be loaded: it is truncated, or another "
                                             "program wrote it, or it carries code"):
            load_svaclr(tmp_path / name, SvaCLR)
    assert not (tmp_path / "exploded").exists()
