"""The program: `sidecar`, or `python -m sidecar`."""

import sys

from sidecar import cli


def main() -> int:
    """Run the command line. Exit codes: 0 done, 1 refused, 2 not a command."""
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
