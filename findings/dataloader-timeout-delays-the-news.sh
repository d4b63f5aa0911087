#!/usr/bin/env bash
# With a timeout, a DataLoader of torch 2.14.1 reports a worker's death only when the timeout ends.
#
# Without `timeout` the loader looks every 5 s whether its workers live. With `timeout=T` it waits T
# seconds in one piece, and looks then. Workers of "fork" and "spawn" are children of the trainer,
# so a signal tells it of their death at once in both cases. Those of "forkserver", which Python
# 3.14 made the default on Linux, are children of the server: a worker that ran out of memory is
# reported T seconds late. Here a worker ends itself while it loads the second sample.
# Seen on 2026-11-30 (torch 2.14.1, Python 3.11, x86_64):
#     forkserver, no timeout: 5 s: DataLoader worker (pid(s) 14336) exited unexpectedly
#     forkserver, timeout=30: 30 s: DataLoader worker (pid(s) 14351) exited unexpectedly
#     spawn, timeout=30: 1 s: DataLoader worker (pid(s) 14391) exited unexpectedly
# The seconds begin with the first sample. The script installs 6 GB into a temporary folder, and
# fails if the second line is no longer near 30 s, or if another is not below 15 s.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cat > "$folder/try.py" <<'PY'
import os
import signal
import sys
import time

from torch.utils.data import DataLoader


class Films:
    """A data set whose reader is killed at the second sample, as by a lack of memory."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index == 1:
            time.sleep(1)               # until the first sample has left the process
            os.kill(os.getpid(), signal.SIGKILL)
        return index


if __name__ == "__main__":
    for method, timeout in (("forkserver", 0), ("forkserver", 30), ("spawn", 30)):
        batches = iter(DataLoader(Films(), num_workers=1, timeout=timeout,
                                  multiprocessing_context=method))
        try:
            next(batches)
            began = time.monotonic()
            next(batches)
        except RuntimeError as error:
            late = time.monotonic() - began
            limit = f"timeout={timeout}" if timeout else "no timeout"
            print(f"{method}, {limit}: {late:.0f} s: {error}", flush=True)
            expected = (28, 40) if (method, timeout) == ("forkserver", 30) else (0, 15)
            assert expected[0] <= late < expected[1], (method, timeout, late)
        else:
            sys.exit("no error")
PY
CUDA_VISIBLE_DEVICES= "$folder/env/bin/python" "$folder/try.py"
