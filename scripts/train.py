"""`python scripts/train.py --config RECIPE [key.path=value ...]`: as `rltok train`."""

import argparse

from rltok.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the recipe's")
    arguments = parser.parse_args()
    main(["train", arguments.config, *arguments.overrides])
