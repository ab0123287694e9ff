"""The program: `sidecar`, or `python -m sidecar`.

What it consists of is imported after the signals are in order: until there is somebody to obey them, a reload must not end
us, and an interrupt is no defect.
"""

import signal
import sys


def main() -> int:
    """Run the command line. Exit codes: 0 done, 1 refused, 2 not a command, 130 interrupted, 143 told to end."""
    if sys.argv[1:2] == ["run"]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    elif sys.argv[1:2] == ["policy"] or sys.argv[1:3] == ["bundle", "build"]:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, _end)
    try:
        from sidecar import cli  # noqa: PLC0415  see above

        return cli.main(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


def _end(number: int, _frame: object) -> None:
    """End as after an error: what such a command has made for itself (a private OPA, a directory) is cleared away."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
