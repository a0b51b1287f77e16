"""``python -m glare`` is the command ``glare``."""

import sys

from glare.cli import main

sys.exit(main())
