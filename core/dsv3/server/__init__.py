"""`dsv3 serve`: an OpenAI-compatible HTTP server over one engine, and a chat page."""
