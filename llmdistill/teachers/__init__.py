"""What the teacher says about sequences: the Teacher protocol and its engines."""
