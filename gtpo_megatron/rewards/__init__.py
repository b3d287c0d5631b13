"""What a completion is worth: reward terms, and the worker processes that compute them."""
