"""Lists of requests that the bulk job works off: OpenAI's batch API."""

from unclip.serving.batches.batches import Batches, BatchRunner

__all__ = ["BatchRunner", "Batches"]
