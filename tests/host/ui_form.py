"""A workflow as the browser keeps it, turned into what the browser sends to /prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def api_form(workflow: Mapping, object_info: Mapping) -> dict:
    """Node id -> {"inputs", "class_type", "_meta"}.

    Widget values are read by their position in `widgets_values`, as every version of the browser's side does; a
    node's widgets stand in the order of its inputs in /object_info.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        about = object_info[node["type"]]
        names = list(_widgets(about))
        values = node.get("widgets_values", [])
        assert len(values) == len(names), f"{node['type']} has the widgets {names}, the workflow the values {values}"
        inputs = {name: value for name, value in zip(names, values, strict=True) if name is not None}
        for socket in node["inputs"]:
            if socket.get("link") is not None:
                inputs[socket["name"]] = sources[socket["link"]]
        title = node.get("title") or about["display_name"]
        prompt[str(node["id"])] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    return prompt


def _widgets(about: Mapping) -> Iterator[str | None]:
    """Names of a node's widgets; None for the one that the browser adds behind a seed, which is not sent."""
    for group in ("required", "optional"):
        for name in about["input_order"].get(group, ()):
            kind, *rest = about["input"][group][name]
            options = rest[0] if rest else {}
            if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
                continue
            yield name
            if options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed")):
                yield None
