"""What answers say, as typed values, and which of them are equal."""
