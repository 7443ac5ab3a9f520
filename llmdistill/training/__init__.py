"""The loop, and what it puts to work: data policies, held-out measuring, guards, rewards."""
