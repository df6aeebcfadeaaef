"""One job: from settings to pictures."""
