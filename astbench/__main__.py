"""`python -m astbench`."""

import sys

from astbench.cli import main

sys.exit(main())
