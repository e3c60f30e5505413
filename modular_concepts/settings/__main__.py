"""Print docs/settings.md."""

import sys

from .page import settings_page

sys.stdout.write(settings_page())
