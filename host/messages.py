"""Words that appear on a node in the browser."""

from __future__ import annotations

from typing import Any, cast

from comfy_execution.utils import get_executing_context
from server import PromptServer


def show_text(text: str) -> None:
    """Show `text` on the node that runs just now, while and after it runs; nothing happens without a browser.

    Browsers take what stands in < and > for markup and leave it out, so trigger words come in other brackets.
    """
    running = get_executing_context()
    if running is not None:
        cast(Any, PromptServer).instance.send_progress_text(text.replace("<", "‹").replace(">", "›"), running.node_id)
