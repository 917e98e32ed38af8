"""`python scripts/evaluate.py CHECKPOINT [key.path=value ...]`: the same as `rltok eval CHECKPOINT ...`."""

import sys

from rltok.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
