"""The one error class for everything that a user can cause."""


class AdapterError(ValueError):
    """A file, setting or input that cannot be used; the message names it and the way out."""

    # A host shows this before the message, and would put the pack's folder there.
    __module__ = "modular_concepts"
