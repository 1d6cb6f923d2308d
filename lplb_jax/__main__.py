"""`python -m lplb_jax`: the command `lplb-jax`, where its folder is not on the PATH."""

import sys

from lplb_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
