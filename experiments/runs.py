"""Many runs of the scripts: one on every core at a time, and means over their seeds."""

import csv
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from support.checkpoints import write_atomic

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"


def run_script(name, flags, log):
    """Run a script of the top level, and add its output to the file `log`.

    Raises ValueError if it fails.
    """
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, ROOT / name, *flags], stdout=file, stderr=file)
    if done.returncode:
        raise ValueError(f"{name} ended with {done.returncode}: see {log}")


def take_core(free):
    """Keep this process and those that it starts to one core, off GPUs, and hide progress bars."""
    os.sched_setaffinity(0, free.get())
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.stderr = open(os.devnull, "w")


def run_all(jobs):
    """Run the jobs {key: (function, *arguments)}, each on one core, and one on every core.

    GPUs are not used. Yields (key, what the function returned, error) as each ends. Either of the
    last two is None: the error is a ValueError that the function raised. Any other error is raised
    here, when the jobs that have begun have ended.
    """
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put({core})
    with ProcessPoolExecutor(len(cores), context, take_core, (free,)) as pool:
        futures = {pool.submit(*job): key for key, job in jobs.items()}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error and not isinstance(error, ValueError):
                    raise error
                yield futures[future], None if error else future.result(), error
        finally:
            pool.shutdown(cancel_futures=True)


def write_csv(lines, columns, path):
    """Write the lines [{column: text}] of a csv."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(text.getvalue().encode(), path)


def read_csv(path, columns):
    """The lines [{column: text}] of a csv. Without a file there are none.

    Ends the program with a sentence if the csv does not have these columns.
    """
    if not path.exists():
        return []
    lines = list(csv.DictReader(path.read_text().splitlines()))
    if any(list(line) != columns or None in line.values() for line in lines):
        sys.exit(f"error: {path} has other columns than this version writes ({', '.join(columns)}):"
                 " move it away, then give the same command again")
    return lines


def spread(values, deviation, sign=""):
    """'mean ± deviation', or the value if there is only one, or 'not run'."""
    if not values:
        return "not run"
    text = f"{statistics.mean(values):{sign}.1f}"
    return text + (f" ± {deviation(values):.1f}" if len(values) > 1 else "")


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5
