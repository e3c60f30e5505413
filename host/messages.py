"""Words that appear on a node in the browser."""

from __future__ import annotations

from server import PromptServer


def show_text(node_id: str | None, text: str) -> None:
    """Show `text` on the node while and after it runs; nothing happens without a browser."""
    if node_id:
        PromptServer.instance.send_progress_text(text, node_id)
