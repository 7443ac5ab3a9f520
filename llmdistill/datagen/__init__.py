"""Data to distil from: traces written by teachers, verified, paired, curated and clean."""
