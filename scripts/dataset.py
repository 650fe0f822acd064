"""Decide which images all notebooks of a run use, have them on disk, and say so in one line.

The answer is kept in .make/dataset.json until the request or the folders it was found in change.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from experiments import STATE, exit_with, write_text

from natlib.files import read_json

ANSWER = STATE / "dataset.json"


def folders() -> dict[str, list[str]]:
    """Return what lies in the folders that are searched for images."""
    places = [Path(os.environ[name]) for name in ("NATLIB_DATA",) if os.environ.get(name)]
    return {
        str(place): sorted(p.name for p in place.glob("*") if p.name != "cache")
        for place in [*places, Path("data")]
    }


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", help="auto, cifar10, cifar100, fashion_mnist")
    request = parser.parse_args().dataset
    answer = read_json(ANSWER) if ANSWER.exists() else {}
    if answer.get("request") != request or answer.get("folders") != folders():
        from natlib import data  # not before: it is slow to import

        train = data.load(request, "train")
        test = data.load(train.name, "test")
        answer = {
            "request": request,
            "folders": folders(),
            "name": train.name,
            "checksums": [train.checksum, test.checksum],
            "source": train.source,
        }
        write_text(ANSWER, json.dumps(answer, indent=1) + "\n")
    print(f"data set: {answer['name']} ({answer['source']})")
    return 0


if __name__ == "__main__":
    exit_with(main)
