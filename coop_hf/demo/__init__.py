"""What comes with the repository: the embedded emoji data set and its small CLIP."""
