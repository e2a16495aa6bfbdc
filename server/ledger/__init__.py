"""What requests used, kept for good: a journal of this server's own."""
