"""Print docs/settings.md."""

import sys

from .page import write_page

sys.stdout.write(write_page())
