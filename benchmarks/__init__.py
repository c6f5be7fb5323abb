"""Speed measurements; they import the package, never the reverse."""
