"""`python -m data_prep`: make shards, check them, look at them."""

import sys

if __name__ == "__main__":  # workers import this file too, and need none of the command line
    from data_prep.commands import main

    sys.exit(main())
