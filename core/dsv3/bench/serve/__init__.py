"""A server under load: requests at a rate, how long each waits for its tokens, and what comes out together. No torch."""
