#!/usr/bin/env bash
# torchrun of torch 2.14.1 ends when its terminal closes, also under nohup.
#
# nohup lets a program ignore SIGHUP, which a closing terminal sends. torchrun puts a handler of its
# own in that place, and ends its processes. With a list of --signals-to-handle that leaves SIGHUP
# out, nohup works as it does for Python alone.
# Seen on 2026-11-30 (torch 2.14.1, Python 3.11, Linux x86_64), after SIGHUP to each:
#     python: status 0, finished
#     torchrun: status 1, not finished
#     torchrun --signals-to-handle=SIGTERM,SIGINT: status 0, finished
# The script installs 6 GB into a temporary folder, and fails if one of the lines changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cd "$folder"
cat > work.py <<'PY'
import time

print("started", flush=True)
time.sleep(10)
print("finished", flush=True)
PY

# try NAME EXPECTED COMMAND...: run the command under nohup, and send it SIGHUP once it works.
try() {
    local name=$1 expected=$2 status=0 end="not finished"
    shift 2
    nohup "$@" > out.txt 2>&1 < /dev/null &
    local process=$!
    until grep -q started out.txt; do sleep 0.2; done
    kill -HUP "$process"
    wait "$process" || status=$?
    if grep -q finished out.txt; then end=finished; fi
    echo "$name: status $status, $end"
    [ "status $status, $end" = "$expected" ]
}
export CUDA_VISIBLE_DEVICES=
try "python" "status 0, finished" env/bin/python work.py
try "torchrun" "status 1, not finished" env/bin/torchrun --nproc_per_node=1 work.py
try "torchrun --signals-to-handle=SIGTERM,SIGINT" "status 0, finished" \
    env/bin/torchrun --nproc_per_node=1 --signals-to-handle=SIGTERM,SIGINT work.py
