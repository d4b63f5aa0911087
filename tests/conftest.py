"""What the tests share: real media made with PyAV, the scripts as processes, a process group.

In a film the picture tells its number, and the sound tells its pitch.
"""

import fcntl
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import redirect_stderr, redirect_stdout
from fractions import Fraction
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"       # many processes share the cores: none may spin
os.environ["CUDA_VISIBLE_DEVICES"] = ""         # the tests are of CPUs, also where a GPU is

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

from frames import barcode                      # noqa: E402
from prepare import scan                        # noqa: E402
from support import launch, processes           # noqa: E402
from support.rows import write_rows              # noqa: E402
from support.run import locks                   # noqa: E402

# A run of seconds in float32, which repeats to the bit.
SMALL = ["--arch", "r2plus1d_10", "--size", "16", "--frames", "4", "--fps", "8",
         "--batch-per-process", "4", "--epochs", "4", "--warmup", "1", "--workers", "1",
         "--precision", "fp32"]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts many processes, or takes over two seconds")
    if config.pluginmanager.hasplugin("xdist"):
        config.option.maxworkerrestart = "0"    # or a test that hangs is begun ten times


@pytest.fixture(scope="session", autouse=True)
def server():
    """A server that has imported torch forks the processes of a Job, which saves each of them 4 s.
    It imports while the first tests run."""
    forkserver.set_forkserver_preload(["torch._dynamo", "torchvision", "torchaudio", "av",
                                       "pytest"])
    forkserver.ensure_running()


class Job:
    """A script (a file, or the name of a module) in processes with torchrun's environment.

    Each process leads a process group. method: how it starts its loading processes. core: the only
    one that the processes may use.
    """

    def __init__(self, script, *args, processes=1, cwd=ROOT, method=None, core=None):
        script = ROOT / script if str(script).endswith(".py") else script
        self.files = [tempfile.NamedTemporaryFile("r") for _ in ("stdout", "stderr")]
        self.workers, number, port = [], str(processes), str(free_port())
        for rank in map(str, range(processes)):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number,
                     "LOCAL_WORLD_SIZE": number, "GROUP_WORLD_SIZE": "1",
                     "MASTER_ADDR": "localhost", "MASTER_PORT": port} if processes > 1 else {}
            self.workers.append(multiprocessing.get_context("forkserver").Process(
                target=work, args=([str(word) for word in (script, *args)], os.environ | group,
                                   cwd, [file.name for file in self.files], method, core)))
            self.workers[-1].start()
        self.pid = self.workers[0].pid

    def wait(self, seconds=300):
        """Wait for all processes. Returns an exit status of them, 0 if all have it."""
        for worker in self.workers:
            worker.join(seconds)
        hanging = [worker for worker in self.workers if worker.exitcode is None]
        for worker in hanging:
            worker.kill()
        assert not hanging, self.printed()
        return max((worker.exitcode for worker in self.workers), key=abs)

    def wait_for(self, condition):
        """Wait until condition() holds, while all processes live."""
        while not condition():
            assert all(worker.is_alive() for worker in self.workers), self.printed()
            time.sleep(0.02)

    def printed(self):
        """What the processes have written so far: (stdout, stderr)."""
        return tuple(Path(file.name).read_text() for file in self.files)


def work(words, environment, cwd, outputs, method, core):
    """In a process of the server: do what `python` does with these words."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(method, force=True)    # for the loading processes
    resource_tracker._resource_tracker.__init__()           # one of its own, as there
    for number, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    for stream in (sys.stdout, sys.stderr):     # the lines of several processes stay whole
        stream.reconfigure(line_buffering=True, write_through=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if core is not None:
        os.sched_setaffinity(0, {core})
    sys.argv = words
    try:
        if words[0].endswith(".py"):
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        processes.end_workers()                 # as at exit, which the server's processes leave out


def free_port():
    """The number of a port that no process uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def write_script(path, body):
    """Write a script that finds the project, and return its path."""
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(body))
    return path


def run(*args, processes=1, script="pretrain.py", check=True, cwd=ROOT, fresh=False):
    """Run a script, or a module, in processes of its own. Returns a completed process.

    One process is this one, which is faster, unless it is to be a fresh one.
    """
    if processes == 1 and not fresh:
        module = import_module(script.removesuffix(".py"))
        status, text, errors = captured(lambda: run_here(module, *args))
    else:
        job = Job(script, *args, processes=processes, cwd=cwd)
        status, (text, errors) = job.wait(), job.printed()
    assert not check or status == 0, errors
    return subprocess.CompletedProcess(args, status, text, errors)


def run_two(tmp_path, body):
    """Run a script with this body in two processes. Returns the words that they print."""
    return run(script=write_script(tmp_path / "two.py", body), processes=2).stdout.split()


def captured(job):
    """Call job() in this process. Returns (exit status, stdout, stderr)."""
    text, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(text), redirect_stderr(errors):
        try:
            status = job() or 0
        except SystemExit as stop:
            status = stop.code
    return status, text.getvalue(), errors.getvalue()


def run_here(script, *args):
    """Run a script (a module) in this process, which is faster. Returns its exit status."""
    job = {"pretrain": "train", "finetune": "recognise", "retrieval": "evaluate",
           "experiments.search": "search", "experiments.predict": "predict"}[script.__name__]
    others = set(multiprocessing.active_children())         # processes of Jobs
    try:
        launch.launch(getattr(script, job), script.parse([str(arg) for arg in args]))
    except SystemExit as stop:
        return stop.code
    finally:                                    # as at the end of a process of its own
        locks.clear()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
    return 0


def error_of(errors):
    """The one sentence that begins with "error" in what a run has written to stderr."""
    sentence, = [line for line in errors.splitlines() if line.startswith("error")]
    return sentence


def log_of(out):
    """The lines of OUT/log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def command_lines(text):
    """The command lines of the sh blocks in a document, or of the indented lines in a docstring.

    Comments are cut off, and continued lines are joined.
    """
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    text = "\n".join(blocks or re.findall(r"^    .*", text, re.MULTILINE))
    lines = (line.split("#")[0].strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if re.match(r"(\w+=\w+ )*(python|python3|torchrun) ", line)]


@pytest.fixture(autouse=True)
def process_group():
    """The functions of a script expect a process group, which launch ends."""
    if not dist.is_initialized():
        processes.setup()


def make_video(path, seconds=6.0, fps=30, size=(72, 54), tone=400, codec="libx264",
               audio_codec="aac", rate=44100, layout="mono", gop=12, options={}, settings={},
               start=0.0, time_base=None, ticks=None, turned=None, gray=None, image=None, wave=None,
               pieces=None, sound_seconds=None, bit_rate=None, muxer={}):
    """Write one film, and return its path. Each picture shows its number as a barcode, and the
    sound is a tone in Hz. With tone=None there is no sound.

    gop: pictures from one keyframe to the next. options: of the video codec. settings: attributes
    of the video encoder and of `image`. start: the first time stamp, s. ticks, time_base: the time
    stamps of the pictures and their unit (1/fps s). turned: (degrees counter-clockwise, horizontal
    flip, vertical flip). gray(t), image: one gray value at time t (s), or a frame, in place of the
    barcode. wave(t), pieces: samples (L,) or (channels, L), or [(beginning in s, samples)], in
    place of the tone. sound_seconds: if it has another length than the pictures. bit_rate: of the
    sound, bits per s. muxer: options of the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frame_rate = Fraction(fps).limit_denominator(1001)
    unit = time_base or 1 / frame_rate
    width, height = (image.width, image.height) if image else size
    pixels = image.format.name if image else "yuv420p"
    # On one thread the bytes do not depend on the number of cores.
    defaults = {"libx264": {"g": str(gop), "crf": "5", "threads": "1"},
                "libvpx": {"deadline": "realtime", "cpu-used": "8"}}.get(codec, {})
    with av.open(str(path), "w", options=muxer) as out:
        video = out.add_stream(codec, rate=frame_rate, width=width, height=height, pix_fmt=pixels,
                               options=defaults | options, bit_rate=2_000_000, time_base=unit)
        if turned:
            video.set_display_rotation(*turned)
        if tone is not None:
            audio = out.add_stream(audio_codec, rate=rate, layout=layout)
            if bit_rate:
                audio.bit_rate = bit_rate
        for name, value in settings.items():
            for owner in (video.codec_context, image):
                if hasattr(owner, name):
                    setattr(owner, name, value)
        for n, tick in enumerate(ticks or range(round(seconds * fps))):
            picture = barcode(n, size)
            if gray:
                picture = np.full((size[1], size[0], 3), gray(n / fps), np.uint8)
            frame = image or av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = tick + round(start / unit), unit
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if tone is None:
            return path
        t = np.arange(round((sound_seconds or seconds) * rate)) / rate
        sound = wave(t) if wave else 0.5 * np.sin(2 * np.pi * tone * t)
        # The resampler gives the sample format that the encoder takes.
        resampler = av.AudioResampler(audio.format.name, layout, rate)
        for beginning, sound in pieces or [(start, sound)]:
            many = av.AudioLayout(layout).nb_channels
            waves = np.broadcast_to(sound.astype(np.float32), (many, sound.shape[-1]))
            frame = av.AudioFrame.from_ndarray(waves.T.reshape(1, -1), "flt", layout)
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = round(beginning * rate)
            for piece in resampler.resample(frame):
                out.mux(audio.encode(piece))
        out.mux(audio.encode(None))
    return path


def remux(source, target, tracks=("video", "audio"), change=None, title="", has_cover=False):
    """Copy the best stream of each of these kinds into another container, and return its path.

    change(data): other bytes for each packet. has_cover: whether it gets a picture as its cover.
    """
    with av.open(str(target), "w") as out:
        out.metadata["title"] = title
        streams = [av.open(str(source)).streams.best(kind) for kind in tracks]
        copies = [out.add_stream_from_template(stream) for stream in streams]
        if has_cover:
            cover = out.add_stream("mjpeg", rate=1, width=32, height=32, pix_fmt="yuvj420p")
            cover.disposition = av.stream.Disposition.attached_pic
            out.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")) + cover.encode(None))
        for stream, copy in zip(streams, copies):
            for packet in stream.container.demux(stream):
                if packet.dts is None:
                    continue
                if change:
                    old, packet = packet, av.Packet(change(bytes(packet)))
                    for name in ("time_base", "pts", "dts", "duration", "is_keyframe"):
                        setattr(packet, name, getattr(old, name))
                packet.stream = copy
                out.mux(packet)
    return target


def with_damaged(rows, folder, chosen):
    """Two manifests of the rows: with the chosen files damaged since the scan, and without them."""
    write_rows([row for n, row in enumerate(rows) if n not in chosen], folder / "without.csv")
    for n in chosen:
        path = folder / f"bad{n}{Path(rows[n]['path']).suffix}"
        path.write_bytes(b"damaged since the scan")
        rows[n] = rows[n] | {"path": str(path)}
    write_rows(rows, folder / "with.csv")
    return folder / "with.csv", folder / "without.csv"


def peak_hz(wave, rate=24000):
    """The strongest frequency of a waveform, Hz."""
    wave = np.asarray(wave) * np.hanning(len(wave))
    return np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)


def once(factory, name, make):
    """The folder `name`, which one of the test processes makes by make(folder), for all of them."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / name).exists():
            make(base / f"{name}.part")
            (base / f"{name}.part").rename(base / name)
    return base / name


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """ROOT/{train,test}/{low,high}/: 10 and 24 films of 3 s, of two unlike classes."""
    def make(root):
        for split, many in (("train", 5), ("test", 12)):
            for label, tone, level in (("low", 300, 60), ("high", 900, 190)):
                for n in range(many):
                    make_video(root / split / label / f"{n}.mp4", 3.0, 10, tone=tone + 20 * n,
                               gray=lambda t: level + 3 * n)

    return once(tmp_path_factory, "tree", make)


@pytest.fixture(scope="session")
def trained(tree, tmp_path_factory):
    """A run of seconds on the tree's 10 training films: (OUT, what it printed). No test changes it.

    It tells the two classes. An epoch has 2 steps.
    """
    def make(folder):
        printed = run("--data", tree, "--out", folder, *SMALL, "--epochs", "10").stdout
        (folder / "printed").write_text(printed)

    out = tmp_path_factory.mktemp("runs") / "brief"     # retrieval writes beside the checkpoint
    shutil.copytree(once(tmp_path_factory, "brief", make), out)
    return out, (out / "printed").read_text()


@pytest.fixture(scope="session")
def brief(trained):
    """The checkpoint.pt of `trained`."""
    return trained[0] / "checkpoint.pt"


# ---- for the tests of prepare/

@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """{kind: a film of 1 s} to be copied."""
    root = tmp_path_factory.mktemp("films")
    small = {"seconds": 1.0, "fps": 10, "size": (36, 28)}
    mpeg4 = small | {"codec": "mpeg4"}
    return {"mp4": make_video(root / "a.mp4", **small),
            "silent": make_video(root / "s.mp4", tone=None, **small),
            "avi": make_video(root / "a.avi", audio_codec="mp3", **mpeg4),
            "mkv": make_video(root / "a.mkv", audio_codec="ac3", **mpeg4),
            "mpg": make_video(root / "a.mpg", 1.0, 25, (36, 28), codec="mpeg2video",
                              audio_codec="mp2")}


@pytest.fixture
def put(films, tmp_path):
    """put(path below tmp_path, kind of film) copies the film there and returns its path."""
    def copy(name, kind="mp4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(films[kind], path))
    return copy


@pytest.fixture
def files_read(monkeypatch):
    """The names of the files that a scan reads, a list that grows."""
    names, in_workers = [], scan.in_workers

    def watched(work, items, workers, limit):
        names.extend(Path(item[0]).name for item in items)
        return in_workers(work, items, workers, limit)
    monkeypatch.setattr(scan, "in_workers", watched)
    return names


def write_text(path, content):
    """Write a text file, with the folders above it, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def by_name(rows, *columns):
    """{file name: values of these columns (default: label, split, reason)} of manifest rows."""
    columns = columns or ("label", "split", "reason")
    return {Path(row["path"]).name: tuple(row[name] for name in columns) for row in rows}


def command(module, *args):
    """Run the main of a module in this process. Returns (exit status, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        status, text, errors = captured(module.main)
    if isinstance(status, str):                 # Python prints it and ends with 1
        return 1, text, f"{errors}{status}\n"
    return status, text, errors
