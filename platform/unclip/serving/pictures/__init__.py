"""Pictures as files: encoded, labelled, signed, kept."""
