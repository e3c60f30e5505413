"""Registration with the host, and nothing else: importing this loads neither torch nor the engine."""

WEB_DIRECTORY = "./js"  # the editor of regions; help pages, in docs/


def refuse_an_older_host():
    """A host below the floor reads one sentence, and nothing is registered, not even the scripts of the page."""
    from .host.floor import check_host

    check_host()


async def comfy_entrypoint():
    """Called by the host once it has started; the nodes, and all that they need, are loaded here."""
    from .nodes import ModularConcepts

    return ModularConcepts()


refuse_an_older_host()
