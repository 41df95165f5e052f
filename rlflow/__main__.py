"""`python -m rlflow`: the command line."""

import sys

from rlflow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
