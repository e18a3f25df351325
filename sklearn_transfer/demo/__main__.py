"""``python -m sklearn_transfer.demo``: four jobs, a table and a picture.

The pictures of the README are made by ``--picture docs/images/demo-light.png`` and
``--dark --picture docs/images/demo-dark.png``.
"""

from __future__ import annotations

import argparse
import os
import time

from threadpoolctl import threadpool_limits

from sklearn_transfer.demo.picture import draw
from sklearn_transfer.demo.report import footer, header, lines
from sklearn_transfer.demo.tasks import MINILM, Size, jobs
from sklearn_transfer.exceptions import BackboneNotFoundError


def main(arguments: list[str] | None = None, size: Size | None = None) -> None:
    """Run the jobs, print the table as it grows, draw the picture."""
    options = _options(arguments)
    start, done = time.perf_counter(), []
    print(header())
    # Hundreds of small fits: on a busy machine threads would wait for each other
    # far longer than they compute.
    with threadpool_limits(1):
        for job in jobs(size or Size(), options.images, options.texts):
            try:
                outcomes = list(job.outcomes())
            except BackboneNotFoundError as error:
                print(f"\n{job.question}\n  left out: {error}")
                continue
            done.append((job, outcomes))
            print(lines(job, outcomes), flush=True)
    print(footer([outcome for _, outcomes in done for outcome in outcomes]))
    print(draw(done, options.picture, dark=options.dark))
    print(f"{time.perf_counter() - start:.0f} s in all.")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sklearn_transfer.demo",
        description="Frozen pretrained networks against honest baselines, on "
        "photographs, digits and docstrings that lie in installed packages.",
    )
    add = parser.add_argument
    add("--images", default="embedded", help="image backbone (default: %(default)s)")
    add("--texts", default=MINILM, help="text backbone (default: %(default)s)")
    add("--picture", default="demo.png", help="file to draw to (default: %(default)s)")
    add("--dark", action="store_true", help="draw on a dark ground")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # torch, which is loaded later, reads this: its threads then sleep while they
    # wait for each other, which a busy machine shows as four times the speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
