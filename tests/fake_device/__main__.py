"""What edits and meta-training ask of a GPU, counted without one: ``python tests/fake_device`` prints docs/speed.md's table.

With ``--jobs`` (a list of ``jobs.Job``'s fields as JSON) it runs those, and prints their counts as JSON.
"""

from __future__ import annotations

import argparse
import json
import logging

from device import register_device
from jobs import JOBS, SAVED, Job, run_job, saved_bytes, shapes_of_layer

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # numbers that are not there tell of facts that are not learnt
    register_device()
    if arguments.jobs:
        print(json.dumps([vars(run_job(Job(**values))) for values in json.loads(arguments.jobs)]))
        return
    print("| Llama-3-8B, layer 9, K = 10 | reads | copies to / from the host | launches | GiB moved | peak, GiB |")
    print("|---|---|---|---|---|---|")
    for job in JOBS:
        counts = run_job(job)
        copies = f"{counts.to_device} / {counts.to_host}"
        row = (job.name, counts.reads, copies, f"{counts.launches:,}", f"{counts.moved / GIB:,.0f}", f"{counts.peak / GIB:.2f}")
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print("\n| an edit of low rank of Llama-3-8B, on disk | MB |\n|---|---|")
    for name, (ranks, bytes_a_number) in SAVED.items():
        print(f"| {name} | {saved_bytes(shapes_of_layer(), ranks, bytes_a_number) / 1e6:.1f} |")


if __name__ == "__main__":
    main()
