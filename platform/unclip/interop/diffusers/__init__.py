"""diffusers' UnCLIP folders, Karlo's format: in and out, whole pipelines with the same numbers."""
