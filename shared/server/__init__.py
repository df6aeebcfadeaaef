"""HTTP: login, the guard before everything, REST, events, OpenAI's address, and the page mounted in it."""
