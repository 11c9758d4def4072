"""Critics: networks that judge what a policy does."""
