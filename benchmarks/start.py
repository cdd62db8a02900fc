"""How long commands take to start:  python benchmarks/start.py [--rounds 5] [--check SET ...]

Takes what train.py takes as --set, for a `--check` of config_creative_writer.toml (paths of a model and of texts); gives the
least wall and CPU seconds of --help of every script, and of that check, in results/start.json.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import record  # noqa: E402


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, show and record."""
    command = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="starts of each, of which the least counts")
    command.add_argument("--check", nargs="+", default=[], metavar="KEY=VALUE", help="time a --check with these --set")
    command.add_argument("--out", type=Path, metavar="DIR", help="where to write (default benchmarks/results)")
    asked = command.parse_args()
    commands = [[script.name, "--help"] for script in sorted(ROOT.glob("*.py"))]
    if asked.check:
        sets = [part for setting in asked.check for part in ("--set", setting)]
        commands.append(["train.py", "--config", "config_creative_writer.toml", "--check", *sets])
    rows = []
    for words in commands:
        walls, cpus = zip(*(seconds(words) for _ in range(asked.rounds)), strict=True)
        name = " ".join(word for word in words[:4] if "=" not in word)
        rows.append({"command": name, "wall_s": round(min(walls), 3), "cpu_s": round(min(cpus), 3)})
        print(f"{name:55} {min(walls):6.2f} s, {min(cpus):6.2f} s of CPU", flush=True)
    print(record.write("start", {"rounds": asked.rounds, "check": asked.check}, rows, asked.out))


if __name__ == "__main__":
    main()
