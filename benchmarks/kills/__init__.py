"""Kill harnesses: end what adds and revokes experts at any moment, start it again, and judge. Nothing here ships."""
