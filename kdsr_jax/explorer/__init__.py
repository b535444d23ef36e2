"""A page of one's own to look at a finished run with: the answers it asks for, the server, and the page itself."""
