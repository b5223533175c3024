"""``python -m cwfast.benchmarks``: runs the benchmarks of the installed package and prints their ratios."""

import argparse
import os
import sys
from pathlib import Path

from cwfast.benchmarks import _harness

FOLDER = Path(__file__).resolve().parent
NAMES = tuple(sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")))


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks (default: all; ``saliency`` includes ``saliency_op``); returns pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m cwfast.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run, of {', '.join(NAMES)}; default: all")
    sizes = "tiny: do they run; normal: all of them in a few minutes; full: every case (default: %(default)s)"
    parser.add_argument("--size", choices=_harness.SIZES, default="tiny", help=sizes)
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
    wanted = [name for name in NAMES if not options.names or any(f"{name}_".startswith(f"{n}_") for n in options.names)]
    files = [str(FOLDER / f"bench_{name}.py") for name in wanted]
    # The figures are the harness's own; no option of a checkout applies, and nothing is written beside the package.
    return int(pytest.main([*files, "-q", "--benchmark-disable", "--override-ini=addopts=", "-p", "no:cacheprovider"]))


if __name__ == "__main__":
    sys.exit(main())
