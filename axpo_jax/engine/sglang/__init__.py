"""The engine of SGLang servers: client, fleet, weight pushes, and the servers themselves (server/)."""
