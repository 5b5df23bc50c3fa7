"""The images API, without Ray: what a server asks of the stages' groups, and what it says to its clients."""
