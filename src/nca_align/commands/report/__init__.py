"""`nca-align report`: a page and plots of what runs logged."""
