"""List the records on this machine that older source code made."""

from __future__ import annotations

from experiments import RUNS, exit_with

from natlib.records import current_source, read_all


def main() -> int:
    """Print the list; return the exit status."""
    total = 0
    stale = []
    for record in read_all(RUNS):
        total += 1
        if record.provenance["source"] != current_source(record):
            stale.append(record)
    for record in stale:
        made = str(record.provenance["finished"])[:16].replace("T", " ")
        revision = str(record.provenance["git"])[:10]
        print(f"{record.kind}  {record.key}  made {made} UTC by {revision or 'unknown'}")
    print(f"{len(stale)} of {total} records were made by older source.")
    if stale:
        print("They stay in use (a record's recipe number says when its meaning changes).")
        print("To compute all anew: make reproduce FRESH=1; for one: delete its folder in runs/.")
    return 0


if __name__ == "__main__":
    exit_with(main)
