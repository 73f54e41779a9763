"""What an agent can do besides thinking and answering."""
