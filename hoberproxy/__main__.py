"""`python -m hoberproxy` is the same as `hoberproxy`."""

import sys

from .cli.main import main

sys.exit(main())
