"""Registration with the host, and nothing else: importing this loads neither torch nor the engine."""

WEB_DIRECTORY = "./js"  # the editor of regions; help pages, in docs/


async def comfy_entrypoint():
    """Called by the host once it has started; the nodes, and all that they need, are loaded here."""
    from .nodes import ModularConcepts

    return ModularConcepts()
