"""`python -m nca_align COMMAND …`."""

import sys

from .cli import main

sys.exit(main())
