"""`python -m hkvprof`, and `torchrun ... -m hkvprof`: the command line."""

from hkvprof.cli import main

if __name__ == "__main__":
    main()
