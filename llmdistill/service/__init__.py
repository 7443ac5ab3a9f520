"""The rollout service and the format in which teacher evidence travels and rests."""
