"""Which files one chat request visits from HTTP to the router, and in what order."""
