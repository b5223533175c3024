"""``python -m cwfast.benchmarks``: runs the benchmarks of the installed package and prints their ratios."""

import argparse
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NAMES = tuple(sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")))


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks (all of them by default); returns pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m cwfast.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run, of {', '.join(NAMES)}; default: all")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny", help="tiny: do they run; full: figures")
    parser.add_argument("--out", type=Path, help="append one JSON line per case to this file")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"NAME must be one of {', '.join(NAMES)}; got {unknown[0]!r}")
    os.environ["CWFAST_BENCH_SIZE"] = options.size
    os.environ.pop("CWFAST_BENCH_OUT", None)
    if options.out is not None:
        out = options.out.resolve()
        if not out.parent.is_dir() or out.is_dir():
            parser.error(f"--out must name a file in a folder that exists; got {options.out}")
        os.environ["CWFAST_BENCH_OUT"] = str(out)
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        parser.error(f'pytest and pytest-benchmark must be installed (pip install "cwfast[bench]"); got {error}')
    files = [str(FOLDER / f"bench_{name}.py") for name in options.names or NAMES]
    # The figures are the harness's own; no option of a checkout applies, and nothing is written beside the package.
    return int(pytest.main([*files, "-q", "--benchmark-disable", "--override-ini=addopts=", "-p", "no:cacheprovider"]))


if __name__ == "__main__":
    sys.exit(main())
