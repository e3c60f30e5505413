"""Print docs/settings.md."""

import sys

from .page import write_page

if __name__ == "__main__":
    sys.stdout.write(write_page())
