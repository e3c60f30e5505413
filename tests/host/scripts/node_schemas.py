"""In the host: what every node says of itself."""

from __future__ import annotations

import asyncio
import json

from in_host import FOLDER, pack_module, start

start()


async def main() -> None:
    extension = pack_module("nodes").ModularConcepts()
    await extension.on_load()
    said = []
    for node in await extension.get_node_list():
        schema = node.GET_SCHEMA()
        said.append(
            {
                "id": schema.node_id,
                "name": schema.display_name,
                "category": schema.category,
                "description": schema.description,
                "aliases": schema.search_aliases,
                "inputs": node.GET_NODE_INFO_V1()["input"],
                "outputs": [[output.id, output.io_type, output.tooltip] for output in schema.outputs],
                "output_node": schema.is_output_node,
            }
        )
    (FOLDER / "schemas.json").write_text(json.dumps(said))


asyncio.run(main())
