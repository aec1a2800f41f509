"""From weights to the counts of batches."""
