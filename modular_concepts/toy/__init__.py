"""The toy base: a procedural pixel world, a small real diffusion model of it, and three judges."""
