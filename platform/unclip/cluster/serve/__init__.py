"""The server on Ray Serve: `unclip.cluster.serve:build` for `serve run`, `serve deploy` and RayServices."""

from unclip.cluster.serve.application import build

__all__ = ["build"]
