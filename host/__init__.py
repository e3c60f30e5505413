"""Everything that touches the host's own modules (`comfy.*`)."""
