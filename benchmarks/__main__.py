"""Run benchmarks, each in a process of its own, and write one table of figures."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._common import DATA, HEAD, Figure, load_of_others, machine, table_row
from benchmarks._common import versions as installed_versions

NAMES = (
    "import_time",
    "grid_search",
    "images",
    "texts",
    "peers",
    "fine_tuning",
    "epoch",
    "few_shot",
    "threads",
    "memory",
    "quality",
    "precision",
)


def run(name: str, options: list[str]) -> tuple[list[Figure], str]:
    """Figures of one benchmark, and a note where it failed.

    A process of its own: a network's threads and caches, or a crash, must not
    reach the next measurement.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(out)]
        code = subprocess.run([*command, *options], check=False).returncode
        if not out.exists():
            return [], f"failed with exit status {code}"
        return [Figure(**entry) for entry in json.loads(out.read_text())], ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="show that they work")
    parser.add_argument("--data", type=Path, default=DATA, help="the real data")
    parser.add_argument("--out", type=Path, help="a markdown file for the tables")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    options = ["--data", str(args.data), *["--quick"] * args.quick]
    lines = [
        "# Benchmarks",
        "",
        f"`python -m benchmarks {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"- {machine()}",
        f"- {installed_versions()}",
        f"- {load_of_others():.0%} of the processors in use by others at the start",
    ]
    failed, missed = [], []
    for name in args.names or NAMES:
        start = time.perf_counter()
        print(f"\n## {name}", flush=True)
        figures, note = run(name, options)
        seconds = time.perf_counter() - start
        lines += ["", f"## {name} ({seconds:.0f} s)", "", note or HEAD]
        lines += map(table_row, figures)
        failed += [name] * bool(note)
        missed += [f"{name}: {f.what}" for f in figures if f.met is False]
    print("\n".join(["", *lines]))
    print("\nfailed:", ", ".join(failed) or "none")
    print("bounds not met:", "; ".join(missed) or "none")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return bool(failed or missed)


if __name__ == "__main__":
    sys.exit(main())
