"""The command line: ``fusednorm info | demo | selftest | bench``, also ``python -m fusednorm``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fusednorm
from fusednorm.cli import bench, demo, info, selftest
from fusednorm.cli.extras import Missing


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: a check failed; 2: a library or a GPU is missing, a file cannot be written, or there is nothing to do;
    130: Ctrl-C. Arguments that argparse refuses, and none at all, leave by SystemExit(2).
    """
    parser = argparse.ArgumentParser(
        prog="fusednorm",
        description="Fused normalization kernels. The commands show them, check them and time them on this "
        "machine; `fusednorm COMMAND --help` tells more.",
    )
    parser.add_argument("--version", action="version", version=f"fusednorm {fusednorm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (info, demo, selftest, bench):
        command.add(commands)
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    args = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show ×, – or a bar gets a question mark, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return int(args.run(args))
    except Missing as missing:
        print(missing, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
