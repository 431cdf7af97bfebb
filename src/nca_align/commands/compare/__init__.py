"""`nca-align compare`: methods and settings beside each other."""
