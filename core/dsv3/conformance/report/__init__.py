"""Reports of a conformance run, each in a module: terminal, junit, jsonl, support, html, certificate."""
