"""`python -m fuzz`, in the folder of the tests: bad inputs, so many in all or of one reader."""

import argparse
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fuzz import originals, values
from fuzz.frame import OUTCOMES, Result, try_all
from fuzz.readers import READERS, make_of, warm

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "outputs" / "fuzz"
REPORT = ROOT / "docs" / "reliability.md"
MARKERS = ("<!-- inputs -->", "<!-- end of inputs -->")
__all__ = ["values"]  # imported for its readers


def counts(total: int, names: Iterable[str]) -> dict[str, int]:
    """How many inputs each reader gets, by the readers' shares."""
    shares = {name: READERS[name][1] for name in names}
    found = {name: total * share // sum(shares.values()) for name, share in shares.items()}
    found[max(shares, key=shares.__getitem__)] += total - sum(found.values())
    return found


def table(results: Iterable[Result]) -> str:
    """Outcomes by reader, as Markdown."""
    by_reader = {name: [r for r in results if r.reader == name] for name in READERS}
    lines = [
        "| reader | inputs | accepted | refused | failures | slowest, s | largest, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    by_reader["all"] = [result for name in READERS for result in by_reader[name]]
    for name, of in by_reader.items():
        if of:
            count = Counter(result.outcome for result in of)
            slowest = max(result.seconds for result in of)
            largest = max(result.memory for result in of) / 2**20
            lines.append(
                f"| {name} | {len(of):,} | {count['accepted']:,} | {count['refused']:,} "
                f"| {sum(count[x] for x in OUTCOMES[2:]):,} | {slowest:.1f} | {largest:.0f} |"
            )
    return "\n".join(lines)


def replaced(text: str, content: str, markers: tuple[str, str] = MARKERS) -> str:
    """A document with other content between its markers."""
    before, _, rest = text.partition(markers[0])
    _, _, after = rest.partition(markers[1])
    return f"{before}{markers[0]}\n{content}\n{markers[1]}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="in all")
    parser.add_argument("--reader", action="append", choices=[*READERS], help="only this one")
    parser.add_argument("--without-training", action="store_true", help="it is slow to start")
    parser.add_argument("--seed", type=int, help="of one input, to try it again")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"the table into {REPORT.name}")
    options = parser.parse_args()
    names = options.reader or [*READERS]
    if options.without_training:
        names.remove("training states")
    valid = KEPT / f"originals-{os.getpid()}"
    originals.make(valid, training="training states" in names)
    warm(valid)
    first = options.first_seed if options.seed is None else options.seed
    numbers = counts(options.inputs, names) if options.seed is None else dict.fromkeys(names, 1)
    inputs = [
        (name, make_of(name, valid), seed)
        for name, count in numbers.items()
        for seed in range(first, first + count)
    ]
    start, results = time.monotonic(), []
    for result in try_all(inputs, KEPT / "failures", options.workers):
        results.append(result)
        if result.failed or options.seed is not None:
            print(f"{result.reader} {result.seed}: {result.outcome}: {result.words}", flush=True)
    shutil.rmtree(valid, ignore_errors=True)
    print(f"{table(results)}\n\n{time.monotonic() - start:.0f} s", flush=True)
    if missing := len(inputs) - len(results):
        print(f"{missing} inputs were not tried")
    if options.write:
        REPORT.write_text(replaced(REPORT.read_text("utf-8"), table(results)), "utf-8")
    return bool(missing or any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
