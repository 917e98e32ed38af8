"""`python -m rltok`, the same as `rltok`."""

from rltok.cli import main

if __name__ == "__main__":
    main()
