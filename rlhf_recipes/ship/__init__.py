"""What a run made, given to others: folders that need nothing of this package, and how close each is to the run."""
