"""The program: `sidecar`, or `python -m sidecar`.

What it consists of is imported after the signals are in order: until there is somebody to obey them, a reload must not end
us, and an interrupt is no defect.
"""

import signal
import sys


def main() -> int:
    """Run the command line. Exit codes: 0 done, 1 refused, 2 not a command, 130 interrupted."""
    if sys.argv[1:2] == ["run"]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        from sidecar import cli  # noqa: PLC0415  see above

        return cli.main(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
