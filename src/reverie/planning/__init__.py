"""What a run needs on machines that are not here: its step counted on shapes, and what that takes there."""
