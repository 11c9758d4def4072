"""Networks that judge what a policy does."""
