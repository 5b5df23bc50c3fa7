"""Whether a cluster is fit for a large run: one file for each subject, measured on every node it concerns."""
