"""`python -m hoberproxy` is the same as `hoberproxy`."""

import sys

from .cli import main

sys.exit(main())
