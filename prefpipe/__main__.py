"""`python -m prefpipe` and the console script: run the command line, or say why it cannot be imported."""

import sys


def main() -> None:
    """Run the command line. Where a package that it needs is broken, `doctor` runs without it, and every other command
    is an error of two lines."""
    try:
        from prefpipe.cli import main as run  # noqa: PLC0415  (its packages may be what is broken)
    except Exception as error:
        if sys.argv[1:2] == ["doctor"]:
            from prefpipe.doctor import command  # noqa: PLC0415

            sys.exit(command.main(sys.argv[2:], error))
        print(f"error: the command line cannot be imported: {type(error).__name__}: {error}", file=sys.stderr)
        print("hint: `prefpipe doctor` says which package is broken", file=sys.stderr)
        sys.exit(66)
    run()


if __name__ == "__main__":
    main()
