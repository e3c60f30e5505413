"""Registration with the host, and nothing else: importing this loads neither torch nor the engine.

There are no nodes yet, and the host takes an empty table for an answer.  The engine is `modular_concepts/`.
"""

NODE_CLASS_MAPPINGS = {}
