"""One check in this process: `python -m benchmarks.gpu_check.one NAME DEVICE SIZE FOLDER` writes FOLDER/NAME.json."""

import json
import os
import sys
from pathlib import Path

from benchmarks.gpu_check.checks import CHECKS, carry_out
from benchmarks.gpu_check.setting import CUBLAS, setting


def main() -> None:
    name, device, size, folder = sys.argv[1:]
    os.environ.update(CUBLAS)
    given = setting(device, size == "tiny", Path(folder))
    row = carry_out(name, CHECKS[name].function(), given)
    (given.folder / f"{name}.json").write_text(json.dumps(row))


if __name__ == "__main__":
    main()
