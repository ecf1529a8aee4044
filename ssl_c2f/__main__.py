"""`python -m ssl_c2f` is `ssl_c2f`."""

import sys

from ssl_c2f.cli import main

sys.exit(main())
