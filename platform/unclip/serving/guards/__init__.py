"""What a server takes on, from whom, and what it refuses."""
