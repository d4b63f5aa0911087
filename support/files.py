"""Files that are written whole or not at all. (Without torch, which a scan does not need.)"""

import os
from contextlib import contextmanager


@contextmanager
def writing(path):
    """An OSError in here becomes one whose sentence says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}): make room or mend that, then give "
                      "the same command again") from error


def write_atomic(content, path):
    """Write a temporary file and rename it, so that the disk has either the old or the new content.

    Raises OSError if the file cannot be written.
    """
    temporary = path.with_suffix(".part")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
