"""`python -m prefpipe` and the console script: run the command line."""

from prefpipe.cli import main

if __name__ == "__main__":
    main()
