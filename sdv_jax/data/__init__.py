"""Reading and writing pictures and videos: everything that crosses the border between files and arrays."""
