"""The two services. They never import each other: they meet at the shared volume and on Redis."""
